"""Segment routing and chunk sparsity against plain loops over segments, and closed forms."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.measures.base import About, measure
from traces.measures.locality import Locality, Segments, segment_routing
from traces.routing_trace import RoutingTrace, TraceMeta
from traces.trace_set import chunks_of, open_traces

Make = Callable[..., RoutingTrace]
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple)


def locality(trace: RoutingTrace, rows: int = 1000, **options: object) -> Locality:
    segments = Segments(About.of(trace), **options)  # type: ignore[arg-type]
    measure(trace, [segments], rows=rows)
    return segments.result()


def segments_of(trace: RoutingTrace, length: int) -> list[list[np.ndarray]]:
    """Return the rows ``[L, K]`` of every segment, found by walking through the requests."""
    found = []
    for request in sorted(set(trace.request_id.tolist())):
        rows = {
            int(trace.position[row]): trace.experts[row]
            for row in np.flatnonzero(trace.request_id == request)
        }
        for start in rows:
            if all(start + i in rows for i in range(length)):
                found.append([rows[start + i] for i in range(length)])
    return found


def best_f1(uses: list[int], length: int) -> float:
    """Try every threshold on the uses of (expert, segment) pairs."""
    best = 0.0
    for threshold in range(length + 2):
        said = [f for f in uses if f >= threshold]
        right, wrong = sum(said), sum(length - f for f in said)
        missed = sum(uses) - right
        if right:
            best = max(best, 2 * right / (2 * right + wrong + missed))
    return best


@settings(max_examples=25)
@given(lengths=LENGTHS, rows=st.integers(1, 20), seed=st.integers(0, 999), gap=st.booleans())
def test_plain_loops(
    make_trace: Make, lengths: tuple[int, ...], rows: int, seed: int, gap: bool
) -> None:
    trace = make_trace(lengths=lengths, layers=2, experts=5, seed=seed)
    if gap:  # tokens that were not recorded end a run
        trace = trace.select(trace.position != 3)
    result = locality(trace, rows, routing=(2, 4), chunks=(1, 3))
    assert result.tokens == trace.num_tokens
    for routing in result.routing:
        found = segments_of(trace, routing.length)
        assert routing.segments == len(found)
        if not found:
            assert np.isnan(routing.of_layer).all()
            continue
        everything = []
        for layer in range(2):
            uses = [
                [sum(int(e in row[layer]) for row in segment) for e in range(5)]
                for segment in found
            ]
            flat = [f for segment in uses for f in segment]
            everything += flat
            assert routing.of_layer[layer] == pytest.approx(best_f1(flat, routing.length))
            for expert in range(5):
                mine = [segment[expert] for segment in uses]
                if sum(mine):
                    best = best_f1(mine, routing.length)
                    assert routing.of_expert[layer, expert] == pytest.approx(best)
                else:
                    assert np.isnan(routing.of_expert[layer, expert])
        assert routing.of_model == pytest.approx(best_f1(everything, routing.length))
    loads = np.array(
        [[(trace.experts[:, layer] == e).any(axis=1).mean() for e in range(5)] for layer in (0, 1)]
    )
    for sparsity in result.sparsity:
        found = segments_of(trace, sparsity.length)
        assert sparsity.chunks == len(found)
        for layer in range(2):
            unions = [len({int(e) for row in chunk for e in row[layer]}) for chunk in found]
            if unions:
                assert sparsity.observed[layer] == pytest.approx(1 - np.mean(unions) / 5)
            chance = ((1 - loads[layer]) ** sparsity.length).mean()
            assert sparsity.independent[layer] == pytest.approx(chance)


@settings(max_examples=20)
@given(lengths=LENGTHS, rows=st.integers(1, 20), cut=st.integers(0, 5))
def test_any_chunks_and_parts(
    make_trace: Make, lengths: tuple[int, ...], rows: int, cut: int
) -> None:
    trace = make_trace(lengths=lengths)
    first, second = Segments(About.of(trace)), Segments(About.of(trace))
    for chunk in chunks_of(trace, rows):
        for part, of_part in ((first, chunk.request_id < cut), (second, chunk.request_id >= cut)):
            if of_part.any():
                part.add(chunk.select(of_part))
    second.merge(first)
    assert second.result().to_dict() == locality(trace).to_dict()


def steady(tokens: int, layers: int = 1) -> RoutingTrace:
    """Every token of every request uses experts 0 and 1 of 8."""
    request = np.repeat(np.arange(3), tokens)
    experts = np.zeros((3 * tokens, layers, 2), np.uint16)
    experts[..., 1] = 1
    return RoutingTrace(
        meta=TraceMeta(
            model="steady", num_experts=8, top_k=2, moe_layer_ids=tuple(range(layers))
        ),
        request_id=request.astype(np.int32),
        position=np.tile(np.arange(tokens), 3).astype(np.int32),
        decode=np.ones(3 * tokens, bool),
        step=np.zeros(3 * tokens, np.int32),
        domain=np.zeros(3 * tokens, np.int16),
        domains=("all",),
        experts=experts,
    )  # fmt: skip


def test_perfectly_local_routing() -> None:
    result = locality(steady(20), routing=(4, 16, 64))
    for routing in result.routing[:2]:
        assert routing.of_layer.tolist() == [1]
        assert routing.of_model == 1
        assert routing.size_ratio.tolist() == [1]
        assert routing.of_expert[0, :2].tolist() == [1, 1]
        assert np.isnan(routing.of_expert[0, 2:]).all()
    assert result.routing[2].segments == 0
    assert np.isnan(result.routing[2].of_model)
    assert result.to_dict()["routing"][2]["f1_of_model"] is None
    for sparsity in result.sparsity:
        assert sparsity.observed.tolist() == [0.75] if sparsity.chunks else True


def test_independent_uniform_tokens_are_the_binomial_case() -> None:
    # one expert of two at a time, by coin: f is binomial, and F1 follows by enumeration
    rng = np.random.default_rng(0)
    trace = steady(40_000)
    coin = rng.integers(0, 2, size=(*trace.experts.shape[:2], 1))
    tossed = RoutingTrace(
        meta=TraceMeta(model="coin", num_experts=2, top_k=1, moe_layer_ids=(0,)),
        domains=trace.domains,
        **(trace.columns | {"experts": coin.astype(np.uint16)}),
    )
    result = locality(tossed, routing=(2,), chunks=(1, 4))
    # uses 0, 1, 2 with 1/4, 1/2, 1/4: "from 1 on" gives 2 * 1 / (2 * 3/4 + 1) = 0.8
    assert result.routing[0].of_layer[0] == pytest.approx(0.8, abs=0.01)
    assert result.routing[0].size_ratio[0] == pytest.approx(1.5, abs=0.02)
    assert result.sparsity[0].observed[0] == 0.5
    assert result.sparsity[1].observed[0] == pytest.approx(1 / 16, abs=0.005)
    assert result.sparsity[1].independent[0] == pytest.approx(1 / 16, abs=0.005)


def test_longer_segments_are_harder(make_trace: Make) -> None:
    trace = make_trace(lengths=(40, 30), experts=8, seed=3)
    best = [routing.of_model for routing in locality(trace, routing=(1, 2, 4, 8)).routing]
    assert best[0] == 1
    assert best == sorted(best, reverse=True)


def test_a_sample_looks_at_whole_requests(make_trace: Make) -> None:
    trace = make_trace(lengths=(5,) * 20)
    result = locality(trace, tokens=50)
    assert (result.tokens, result.tokens_share) == (50, 0.5)


@pytest.mark.parametrize("options", [{"routing": (0,)}, {"chunks": (10**8,)}])
def test_bad_input(make_trace: Make, options: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match=r"segments of \[.* from 1, and at most 1 GiB"):
        Segments(About.of(make_trace()), **options)


def test_routing_of_counts_by_hand() -> None:
    # two segments of 3 tokens; expert 0 used 3 and 1 times, expert 1 used 0 and 2 times
    counts = np.array([[[0, 1, 0, 1], [1, 0, 1, 0]]])
    found = segment_routing(counts, (7,))
    assert found.segments == 2
    # thresholds: 1 -> right 6, said 9; 2 -> right 5, said 6: 10 / 12; 3 -> right 3, said 3: 6 / 9
    assert found.of_layer[0] == pytest.approx(10 / 12)
    assert found.size_ratio[0] == pytest.approx(6 / 6)
    # alone: expert 0 best with 3 (2 * 3 / (3 + 4)), expert 1 with 2 (4 / 5)
    assert found.of_expert[0] == pytest.approx([6 / 7, 4 / 5])


def test_gpt_oss_is_more_local_than_chance(moeplan_data: Path) -> None:
    traces = open_traces(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet")
    segments = Segments(About.of(traces), tokens=5000, routing=(4, 16))
    measure(traces, [segments])
    result = segments.result()
    for sparsity in result.sparsity[1:]:
        assert (sparsity.observed > sparsity.independent).all()
    assert result.sparsity[0].observed == pytest.approx(np.full(24, 1 - 4 / 32))
