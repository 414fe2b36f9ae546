"""vLLM's layouts beyond the way there and back: starts, several choices, gaps, damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.importers.vllm import FORMATS_VLLM
from traces.routing_trace import RoutingTrace

V014, V021, V033 = FORMATS_VLLM
Join = Callable[[Any], RoutingTrace]


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_start_in_the_prompt(engines: Any, joined: Join, tmp_path: Path) -> None:
    source = engines.source()
    path = engines.vllm_033(source, tmp_path, start=2)
    found = joined(V033.read(path, engines.asked()))
    later = source.trace.position >= 2
    assert np.array_equal(found.position, source.trace.position[later])
    assert np.array_equal(found.decode, source.trace.decode[later])
    assert np.array_equal(found.experts, source.trace.experts[later])


def test_a_start_that_was_not_saved(engines: Any, joined: Join, tmp_path: Path) -> None:
    path = engines.vllm_033(engines.source(), tmp_path, start=2)
    answers = json.loads(path.read_text())
    del answers[1]["routed_experts_prompt_start"]
    path.write_text(json.dumps(answers))
    with pytest.raises(InputError, match=r"answer 1: 1 rows .* 3 prompt and 1 generated .* -- 3,"):
        joined(V033.read(path, engines.asked()))


@pytest.mark.parametrize("start", [-1, "2", True, 1.0])
def test_a_bad_start(engines: Any, joined: Join, tmp_path: Path, start: Any) -> None:
    path = engines.vllm_033(engines.source(), tmp_path)
    answers = json.loads(path.read_text())
    answers[0]["routed_experts_prompt_start"] = start
    path.write_text(json.dumps(answers))
    with pytest.raises(InputError, match=r"prompt_start: .* -- a whole number of at least 0"):
        joined(V033.read(path, engines.asked()))


def test_only_moe_layers_as_the_documentation_says(
    engines: Any, joined: Join, tmp_path: Path
) -> None:
    source = engines.source()
    path = engines.vllm_033(source, tmp_path)
    answers = json.loads(path.read_text())
    for number, answer in enumerate(answers):
        rows = source.rows(number)[:, list(engines.moe)].astype(np.uint16)
        answer["choices"][0]["routed_experts"] = engines.npy_text(rows)
    path.write_text(json.dumps(answers))
    found = joined(V033.read(path, engines.asked()))
    assert np.array_equal(found.experts, source.trace.experts)


def test_the_prompt_of_several_choices_counts_once(
    engines: Any, joined: Join, tmp_path: Path
) -> None:
    source = engines.source(prompts=(4, 4), outputs=(3, 5))
    choices = [
        {"token_ids": list(range(output)), "routed_experts": engines.npy_text(source.rows(number))}
        for number, output in enumerate(source.outputs)
    ]
    answer = {"prompt_token_ids": [1] * 4, "choices": choices}
    path = engines.lines(tmp_path / "n.jsonl", [answer])
    tokens = V033.read(path, engines.asked())
    found = joined(tokens)
    kept = (source.trace.request_id == 0) | (source.trace.position >= 4)
    assert np.array_equal(found.experts, source.trace.experts[kept])
    assert np.array_equal(found.request_id, source.trace.request_id[kept])
    assert list(tokens.dropped.values()) == [4]
    assert "further answers to the same prompt" in next(iter(tokens.dropped))


def test_rows_that_were_never_captured(engines: Any, joined: Join, tmp_path: Path) -> None:
    source = engines.source()
    path = engines.vllm_033(source, tmp_path)
    answers = json.loads(path.read_text())
    rows = source.rows(0).astype(np.uint8)
    rows[:2] = 0
    answers[0]["choices"][0]["routed_experts"] = engines.npy_text(rows)
    path.write_text(json.dumps(answers))
    tokens = V033.read(path, engines.asked())
    found = joined(tokens)
    assert list(tokens.dropped.values()) == [2]
    assert found.position[:2].tolist() == [2, 3]
    assert np.array_equal(found.experts, source.trace.experts[2:])


def test_zeros_of_a_top_1_model_are_ids(engines: Any, joined: Join, tmp_path: Path) -> None:
    rows = np.zeros((3, engines.layers, 1), np.uint8)
    answer = {"choices": [{"routed_experts": engines.npy_text(rows)}]}
    path = engines.lines(tmp_path / "top1.jsonl", [answer])
    tokens = V033.read(path, engines.asked(top_k=1))
    assert joined(tokens).num_tokens == 3
    assert not tokens.dropped


def test_answers_without_routing_are_noted(engines: Any, joined: Join, tmp_path: Path) -> None:
    source = engines.source()
    path = engines.write("vllm-0.21", tmp_path, source)
    values = lines_of(path)
    values.insert(1, {"choices": [{"routed_experts": None}], "usage": values[0]["usage"]})
    engines.lines(path, values)
    tokens = V021.read(path, engines.asked())
    assert np.array_equal(joined(tokens).experts, source.trace.experts)
    assert "1 answers carry no routing and are left out" in tokens.notes


def test_generated_rows_alone(engines: Any, joined: Join, tmp_path: Path) -> None:
    source = engines.source(outputs=(4, 3, 6))
    path = engines.write("vllm-0.21", tmp_path, source)
    values = lines_of(path)
    for value in values:
        value["prompt_routed_experts"] = None
    engines.lines(path, values)
    found = joined(V021.read(path, engines.asked()))
    assert np.array_equal(found.experts, source.trace.experts[source.trace.decode])
    assert np.array_equal(found.position, source.trace.position[source.trace.decode])
    del values[0]["usage"]
    engines.lines(path, values)
    with pytest.raises(InputError, match="line 1: neither the prompt's rows nor its length"):
        joined(V021.read(path, engines.asked()))


def test_prompt_and_answer_of_different_layers(engines: Any, joined: Join, tmp_path: Path) -> None:
    path = engines.write("vllm-0.21", tmp_path)
    values = lines_of(path)
    values[0]["prompt_routed_experts"] = [row[:2] for row in values[0]["prompt_routed_experts"]]
    engines.lines(path, values)
    with pytest.raises(
        InputError, match=r"line 1: the prompt's rows are \[2, 2\], those of the an"
    ):
        joined(V021.read(path, engines.asked()))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[[1, 2], [3]]], "cut off"),
        ([[1, 2]], r"int64\[1, 2\]"),
        ([[["a", "b"]] * 3], "integers"),
        ([[[0.5, 1.0]] * 3], "float64"),
        ([[[2**70, 1]] * 3], "object|integers"),
        ([[[True, False]] * 3], "bool"),
        ("text", "is text -- nested lists"),
        (7, r"int64\[\]"),
    ],
)
def test_lists_that_are_no_ids(
    engines: Any, joined: Join, tmp_path: Path, rows: Any, message: str
) -> None:
    answer = {"choices": [{"routed_experts": rows}], "prompt_token_ids": []}
    path = engines.lines(tmp_path / "bad.jsonl", [answer])
    with pytest.raises(InputError, match=message):
        joined(V021.read(path, engines.asked()))


def test_cut_rows_are_noticed_by_the_lengths(engines: Any, joined: Join, tmp_path: Path) -> None:
    path = engines.write("vllm-0.14 outputs", tmp_path)
    values = lines_of(path)
    values[2]["outputs"][0]["routed_experts"].pop()
    engines.lines(path, values)
    with pytest.raises(
        InputError, match=r"line 3: 12 rows .* 8 prompt and 6 generated .* -- 13, a"
    ):
        joined(V014.read(path, engines.asked()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-5], "no base64 text|there -- truncated"),
        (lambda text: "?" + text[1:], "no base64 text"),
        (lambda text: text[: len(text) // 8 * 4], "bytes, .* are there -- truncated"),
        (lambda text: text[:16], "no npy array"),
        (lambda text: 17, "a int -- base64 text"),
    ],
)
def test_damaged_base64(
    engines: Any, joined: Join, tmp_path: Path, change: Callable[[str], Any], message: str
) -> None:
    path = engines.vllm_033(engines.source(), tmp_path)
    answers = json.loads(path.read_text())
    choice = answers[2]["choices"][0]
    choice["routed_experts"] = change(choice["routed_experts"])
    path.write_text(json.dumps(answers))
    with pytest.raises(InputError, match=message):
        joined(V033.read(path, engines.asked()))


def test_objects_are_not_unpickled(engines: Any, joined: Join, tmp_path: Path) -> None:
    path = tmp_path / "objects.npy"
    np.save(path, np.array([[[None]]], object), allow_pickle=True)
    with pytest.raises(InputError, match="holds pickled objects, which are not read"):
        V014.read(path, engines.asked()) and joined(V014.read(path, engines.asked()))
    answer = {"choices": [{"routed_experts": None}]}
    import base64

    answer["choices"][0]["routed_experts"] = base64.b64encode(path.read_bytes()).decode()  # type: ignore[assignment]
    lines = engines.lines(tmp_path / "objects.jsonl", [answer])
    with pytest.raises(InputError, match="holds pickled objects, which are not read"):
        joined(V033.read(lines, engines.asked()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a int -- an answer is a JSON object"),
        ('{"error": "x"}', "neither choices nor outputs"),
        ('{"choices": [1]}', "neither choices nor outputs"),
        ('{"choices": []}\n{"cho', "line 2: no complete JSON"),
        ('{"choices": [{}], "usage": {"prompt_tokens": -1}}', "usage.prompt_tokens: -1"),
    ],
)
def test_answers_that_are_none(
    engines: Any, joined: Join, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "answers"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        joined(V021.read(path, engines.asked()))


def test_a_folder_of_other_files_is_not_claimed(engines: Any, tmp_path: Path) -> None:
    folder = engines.write("vllm-0.14 npz", tmp_path)
    assert V014.matches(folder, b"")
    (folder / "notes.txt").write_text("x")
    assert not V014.matches(folder, b"")


def test_an_npz_with_request_ids_is_left_to_its_own_format(engines: Any, tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    rows = engines.source().rows(0)
    np.savez(path, routed_experts=rows, request_id=np.array("a"))
    assert not V014.matches(path, path.read_bytes())
    np.savez(path, routed_experts=rows)
    assert V014.matches(path, path.read_bytes())


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    start=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_lengths_come_back(
    engines: Any,
    joined: Join,
    tmp_path: Path,
    lengths: list[tuple[int, int]],
    start: int,
    seed: int,
) -> None:
    prompts, outputs = zip(*lengths, strict=True)
    source = engines.source(prompts=prompts, outputs=outputs, seed=seed)
    start = min(start, *prompts)
    path = engines.vllm_033(source, tmp_path, start=start)
    rows = source.trace.position >= start
    if not rows.any():
        return
    found = joined(V033.read(path, engines.asked()))
    for name, column in found.columns.items():
        assert np.array_equal(column, source.trace.columns[name][rows]), name
