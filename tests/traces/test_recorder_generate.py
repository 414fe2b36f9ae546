"""Requests, positions and phases that the recorder reads from a model's own inputs."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from basis.errors import InputError  # noqa: E402
from traces.record_model import TraceOrigin, record  # noqa: E402
from traces.routing_trace import read_trace  # noqa: E402
from traces.trace_set import open_traces  # noqa: E402

END = 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=END,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def forced(rows):
    """Make ``generate`` sample these tokens: ``rows[row][step]``, 7 where nothing is said."""

    class Forced(transformers.LogitsProcessor):
        step = 0

        def __call__(self, input_ids, scores):
            scores = torch.full_like(scores, -1e9)
            for row, tokens in enumerate(rows):
                scores[row, tokens[self.step] if self.step < len(tokens) else 7] = 0
            self.step += 1
            return scores

    return transformers.LogitsProcessorList([Forced()])


IDS = torch.tensor([[0, 0, 5, 9, 11], [3, 4, 8, 30, 21]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def recorded(model, path, run, **options):
    with record(model, path, **options):
        run()
    return read_trace(path)


def generate(model, rows=((), ()), new=4, **options):
    options = {"input_ids": IDS, "attention_mask": MASK, "do_sample": False} | options
    return model.generate(max_new_tokens=new, logits_processor=forced(rows), **options)


def rows_of(trace):
    columns = (trace.request_id, trace.position, trace.decode, trace.step)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def same(a, b):
    assert rows_of(a) == rows_of(b)
    np.testing.assert_array_equal(a.experts, b.experts)


def test_a_row_that_ended_is_recorded_no_more(model, tmp_path):
    run = lambda: generate(model, ((7, END), (7, 7, 7, END)), new=6)  # noqa: E731
    trace = recorded(model, tmp_path / "a.parquet", run)
    expected = [(0, p, False, 0) for p in range(3)] + [(0, 3, True, 1)]
    expected += [(1, p, False, 0) for p in range(5)] + [(1, 4 + s, True, s) for s in (1, 2, 3)]
    assert rows_of(trace) == expected


def test_the_end_token_of_a_call_counts_and_one_in_the_prompt_does_not(model, tmp_path):
    run = lambda: generate(model, ((9, 9, END), (8,)), new=4, eos_token_id=[9, 50])  # noqa: E731
    trace = recorded(model, tmp_path / "a.parquet", run)  # 9 is in the prompt of row 0
    assert [r for r in rows_of(trace) if r[2]] == [(1, 4 + s, True, s) for s in (1, 2, 3)]


def test_a_loop_of_ones_own_records_what_generate_does(model, tmp_path):
    @torch.no_grad()
    def loop():
        out = model(IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0))
        mask, position = MASK, MASK.sum(1, keepdim=True)
        for _ in range(3):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            out = model(
                torch.full((2, 1), 7), attention_mask=mask, position_ids=position,
                past_key_values=out.past_key_values,
            )  # fmt: skip
            position = position + 1

    own = recorded(model, tmp_path / "a.parquet", loop)
    same(own, recorded(model, tmp_path / "b.parquet", lambda: generate(model)))


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_a_prompt_in_chunks_is_prefill(model, tmp_path, chunk):
    ids = torch.tensor([[5, 9, 11, 4, 33]])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "rows": ((),)}
    whole = recorded(model, tmp_path / "a.parquet", lambda: generate(model, **call))
    parts = recorded(
        model, tmp_path / "b.parquet", lambda: generate(model, **call, prefill_chunk_size=chunk)
    )
    same(whole, parts)
    assert parts.decode.sum() == 3


def test_a_second_turn_goes_on_with_the_requests(model, tmp_path):
    def turns():
        cache = transformers.DynamicCache(config=model.config)
        said = generate(model, ((7, END), (7, 8)), past_key_values=cache)
        asked = torch.cat([said, torch.tensor([[12, 13], [14, 15]])], 1)
        mask = torch.cat([MASK, torch.ones(2, asked.shape[1] - 5, dtype=MASK.dtype)], 1)
        generate(model, new=3, input_ids=asked, attention_mask=mask, past_key_values=cache)

    trace = recorded(model, tmp_path / "a.parquet", turns)
    second = [row for row in rows_of(trace) if row[0] == 1]
    assert [row[1] for row in second] == list(range(5 + 4 + 2 + 2))
    assert [row[2] for row in second] == [False] * 5 + [True] * 3 + [False] * 3 + [True] * 2
    first = [row[1] for row in rows_of(trace) if row[0] == 0]
    # its end and the padding after it are in the cache and count as positions, but have no row
    assert first == [0, 1, 2, 3, *range(6, 3 + 4 + 2 + 2)]


def test_several_samples_of_a_prompt_are_several_requests(model, tmp_path):
    run = lambda: model.generate(  # noqa: E731
        input_ids=IDS, attention_mask=MASK, do_sample=True, num_return_sequences=2,
        max_new_tokens=2, eos_token_id=None,
    )  # fmt: skip
    trace = recorded(model, tmp_path / "a.parquet", run)
    assert np.bincount(trace.request_id).tolist() == [4, 4, 6, 6]


def test_batches_have_domains_and_the_file_says_what_it_is(model, tmp_path):
    path = tmp_path / "a.parquet"
    origin = TraceOrigin(model="tiny", source="test", licence="CC0-1.0", note="random weights")
    with record(model, path, domain=["code", "chat"], origin=origin) as recording:
        recording.next_domains = ["chat", "code"]
        generate(model)
        recording.next_domains = ["chat"]
        with torch.no_grad():
            model(IDS[1:])
        assert (recording.num_requests, recording.num_tokens) == (3, 3 + 5 + 2 * 3 + 5)
    trace = read_trace(path)
    domains = dict(zip(trace.request_id.tolist(), trace.domain.tolist(), strict=True))
    assert [trace.domains[domains[request]] for request in range(3)] == ["chat", "code", "chat"]
    meta = trace.meta
    assert (meta.model, meta.licence, meta.note) == ("tiny", "CC0-1.0", "random weights")
    assert meta.source.startswith(
        f"test; recorded with transformers {transformers.__version__}, torch "
    )
    assert not meta.synthetic
    assert open_traces(path).files[0].ordered


def test_half_precision_and_candidates(model, tmp_path):
    half = copy.deepcopy(model).to(torch.bfloat16)
    trace = recorded(half, tmp_path / "a.parquet", lambda: generate(half), candidates=4)
    assert trace.meta.num_candidates == 4
    # Mixtral takes the best
    np.testing.assert_array_equal(trace.candidates[..., :2], trace.experts)


REFUSED = [
    ({"num_beams": 2}, "num_beams=2: beams reorder"),
    ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2: a draft"),
    ({"use_cache": False}, "use_cache=False: each pass would"),
    ({"guidance_scale": 1.5}, "guidance runs each text a second time"),
    ({"cache_implementation": "static"}, "its masks do not tell padding"),
    ({"stop_strings": ["a"]}, "stop_strings: of several rows"),
    ({"custom_generate": lambda *a, **k: None}, "it may run what it likes"),
    ({"num_beams": 2, "use_cache": False}, "num_beams=2.*; use_cache=False"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(list(o)) for o, _ in REFUSED])
def test_what_cannot_be_attributed_is_refused_and_leaves_no_file(model, tmp_path, options, message):
    def run():
        generate(model)
        generate(model, **options)

    with pytest.raises(InputError, match=message):
        recorded(model, tmp_path / "a.parquet", run)
    assert list(tmp_path.iterdir()) == []


def test_a_generation_config_is_looked_at_as_well(model, tmp_path):
    config = transformers.GenerationConfig(num_beams=3)
    with (
        pytest.raises(InputError, match="num_beams=3"),
        record(model, tmp_path / "a.parquet"),
    ):
        model.generate(IDS, config)


@torch.no_grad()
def test_inputs_that_do_not_tell_are_refused(model, tmp_path):
    before = model(IDS).past_key_values
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    calls = [
        (lambda: model(torch.tensor([[3]]), past_key_values=before), "recorder saw none of them"),
        (lambda: model(IDS[:1], position_ids=packed), "do not ascend along a row"),
        (lambda: model(IDS, attention_mask=torch.ones(2, 1, 5, 5)), r"not \[requests, tokens\]"),
        (lambda: model(IDS, attention_mask=MASK[:1]), r"attention mask \[1, 5\] for 2 requests"),
        (lambda: model.model(IDS), "outside a forward pass of the recorded model"),
        (lambda: None, "no forward pass was recorded"),
    ]
    for call, message in calls:
        with (
            pytest.raises(InputError, match=message),
            record(model, tmp_path / "a.parquet"),
        ):
            call()
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_cut_or_reordered_cache_is_refused(model, tmp_path):
    def cut():
        cache = model(IDS).past_key_values
        cache.crop(-2)
        model(torch.tensor([[3], [4]]), past_key_values=cache)

    def fewer():
        cache = model(IDS).past_key_values
        cache.batch_select_indices(torch.tensor([1]))
        model(torch.tensor([[3]]), past_key_values=cache)

    for call, message in ((cut, "saw 5 of 2 requests"), (fewer, "pass of 1 rows")):
        with (
            pytest.raises(InputError, match=message),
            record(model, tmp_path / "a.parquet"),
        ):
            call()


def test_domains_must_be_those_of_the_rows(model, tmp_path):
    def run(names):
        with record(model, tmp_path / "a.parquet", domain=["code", "chat"]) as recording:
            recording.next_domains = names
            generate(model)

    for names, message in ((["code"], "1 domains for 2"), (["code", "x"], "unknown: x")):
        with pytest.raises(InputError, match=message):
            run(names)
    with (
        pytest.raises(InputError, match="0 domains for 2 requests"),
        record(model, tmp_path / "a.parquet", domain=["code", "chat"]),
    ):
        generate(model)
    with pytest.raises(InputError, match="no domain"), record(model, tmp_path / "a", domain=[]):
        pass
    with (
        pytest.raises(InputError, match="no such folder"),
        record(model, tmp_path / "none" / "a.parquet"),
    ):
        pass


def test_hooks_and_the_watch_are_gone_afterwards(model, tmp_path):
    def run():
        generate(model)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        recorded(model, tmp_path / "a.parquet", run)
    assert list(tmp_path.iterdir()) == []
    assert "generate" not in vars(model)
    modules = list(model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)


def test_checkpointed_training_is_refused(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.activation_checkpointing_enable()
    model.train()
    with (
        pytest.raises(InputError, match="gradient checkpointing"),
        record(model, tmp_path / "a.parquet"),
    ):
        model(IDS % 32, labels=IDS % 32).loss.backward()
