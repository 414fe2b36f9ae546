"""`moeplan trace record` on a tiny model in a folder; prompts that are bad."""

import argparse
import json
import shutil

import numpy as np
import pytest

from basis.errors import InputError
from moeplan.record_command import Prompt, read_prompts, record
from traces.routing_trace import read_trace

WORDS = [
    "[UNK]",
    "[END]",
    *["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny random Mixtral and a tokenizer of whole words."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("model")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.3, eos_token_id=1,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(path)
    return path


def options(folder, prompts, out, **changes):
    return argparse.Namespace(
        **{
            "model": str(folder), "prompts": prompts, "out": out, "max_new_tokens": 3, "batch": 2,
            "candidates": 0, "domain_key": "domain", "device": "cpu", "dtype": "auto",
            "json": True,
        } | changes
    )  # fmt: skip


LINES = [
    {"prompt": "the cat sat on the mat", "domain": "cats"},
    {"prompt": "a dog", "domain": "dogs"},
    {"prompt": "the dog ran under a tree"},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    return path


def test_prompts_become_requests_of_the_trace(folder, prompts, tmp_path, capsys):
    out = tmp_path / "trace.parquet"
    answer = record(options(folder, prompts, out, candidates=3))
    trace = read_trace(out)
    assert answer == {
        "out": str(out), "model": str(folder), "requests": 3, "tokens": trace.num_tokens,
        "moe_layers": 2, "num_experts": 4, "top_k": 2, "candidates": 3,
    }  # fmt: skip
    prompt = ~trace.decode
    assert np.bincount(trace.request_id[prompt]).tolist() == [6, 2, 6]
    decoded = np.bincount(trace.request_id[~prompt], minlength=3)
    assert decoded.max() == 2  # of three new tokens the last is never fed
    names = dict(zip(trace.request_id.tolist(), trace.domain.tolist(), strict=True))
    assert [trace.domains[names[r]] for r in range(3)] == ["cats", "dogs", "text"]
    assert trace.meta.num_candidates == 3
    assert "prompts of prompts.jsonl, continued greedily by at most 3" in trace.meta.source
    assert "3 requests, 2 MoE layers x 4 experts, top-2" in capsys.readouterr().err


def test_batches_do_not_change_what_is_recorded(folder, prompts, tmp_path):
    traces = []
    for batch in (1, 3):
        out = tmp_path / f"{batch}.parquet"
        record(options(folder, prompts, out, batch=batch))
        traces.append(read_trace(out))
    one, three = traces
    assert one.position.tolist() == three.position.tolist()
    np.testing.assert_array_equal(one.experts, three.experts)


def test_lines_of_text_are_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the cat\n\n{not json}\n")
    assert read_prompts(path, "domain") == [
        Prompt(text="the cat", domain="text"),
        Prompt(text="{not json}", domain="text"),
    ]


def test_all_bad_lines_are_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\nno\n[1]\n{"prompt": 3}\n{"prompt": "a", "kind": 1}\n')
    with pytest.raises(InputError) as raised:
        read_prompts(path, "kind")
    message = str(raised.value)
    for part in (
        "line 2: not JSON", "line 3: list, not an object", "line 4: prompt is 3",
        "line 5: kind is 1", "4 of 5 lines are bad",
    ):  # fmt: skip
        assert part in message
    assert "line 1" not in message


def test_a_line_that_is_nested_too_deep(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match="line 1: not JSON"):
        read_prompts(path, "domain")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("num_local_experts", "x", "not loaded .*num_local_experts"),
        ("hidden_size", -4, "not loaded .*-4"),
        ("num_attention_heads", 0, "not loaded .*zero"),
        ("num_experts_per_tok", 9, "does not run .*out of range"),
        ("", None, "not loaded .*header"),  # the weights are cut off
    ],
)
def test_damaged_models_are_answered_by_one_message(
    folder, prompts, tmp_path, setting, value, message
):
    broken, out = tmp_path / "broken", tmp_path / "trace.parquet"
    shutil.copytree(folder, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | ({setting: value} if setting else {})))
    if not setting:
        weights = (broken / "model.safetensors").read_bytes()
        (broken / "model.safetensors").write_bytes(weights[: len(weights) // 9])
    with pytest.raises(InputError, match=message):
        record(options(broken, prompts, out))
    assert not list(tmp_path.glob("trace*"))


def test_a_name_with_brackets_is_printed_as_it_is(folder, prompts, tmp_path, capsys):
    out = tmp_path / "x[a][red].parquet"
    record(options(folder, prompts, out))
    assert f"wrote {out}" in capsys.readouterr().err


def test_bad_input_is_answered_by_one_message(folder, prompts, tmp_path):
    out = tmp_path / "trace.parquet"
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    cases = [
        ({"batch": 0}, "--batch 0 -- at least 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0 -- at least 1"),
        ({"prompts": empty}, "no prompts"),
        ({"prompts": tmp_path / "none"}, r"not readable .*No such file.* -- give a file"),
        ({"prompts": tmp_path}, r"not readable .*directory.* -- give a file"),
        ({"out": prompts}, "same file"),
        ({"out": tmp_path / "none" / "a.parquet"}, "no such folder"),
        ({"model": str(tmp_path)}, "not loaded"),
        ({"candidates": 2}, "allowed are 3"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            record(options(folder, **({"prompts": prompts, "out": out} | changes)))
    assert not out.exists()
