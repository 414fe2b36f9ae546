"""Local activation rates against plain loops and placements whose rate is known."""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.measures.base import About, measure
from traces.measures.placement import LocalActivation, LocalActivations, contiguous_slots
from traces.routing_trace import RoutingTrace, request_order
from traces.trace_set import chunks_of

Make = Callable[..., RoutingTrace]


def local_activation(
    trace: RoutingTrace, slots: np.ndarray, ranks: int, rows: int = 10**6
) -> LocalActivation:
    counted = LocalActivations(About.of(trace), slots, ranks)
    measure(trace, [counted], rows=rows)
    return counted.result()


def with_replicas(ranks: int, seed: int) -> np.ndarray:
    """Return slots [3, S] of 8 experts and as many replicas as fill the ranks."""
    rng = np.random.default_rng(seed)
    extra = -8 % ranks + ranks
    return np.stack(
        [rng.permutation(np.append(np.arange(8), rng.integers(8, size=extra))) for _ in range(3)]
    )


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 999),
    rows=st.integers(1, 20),
)
def test_plain_loops(
    make_trace: Make, lengths: tuple[int, ...], ranks: int, seed: int, rows: int
) -> None:
    trace = make_trace(lengths=lengths, seed=seed)
    slots = with_replicas(ranks, seed)
    found = local_activation(trace, slots, ranks, rows)
    per_rank = slots.shape[1] // ranks
    local = np.zeros((len(lengths), ranks), int)
    for request, token in zip(request_order(trace), trace.experts, strict=True):
        for rank in range(ranks):
            held = slots[:, rank * per_rank : (rank + 1) * per_rank].tolist()
            for layer in range(3):
                local[request, rank] += sum(int(e) in held[layer] for e in token[layer])
    total = trace.num_tokens * 3 * 2
    assert np.array_equal(found.local, local)
    assert found.choices.sum() == total
    assert found.round_robin == pytest.approx(
        sum(local[r, r % ranks] for r in range(len(lengths))) / total
    )
    assert found.best_rank == pytest.approx(sum(max(row) for row in local) / total)
    assert found.any_rank == pytest.approx(local.mean(axis=1).sum() / total)
    assert found.any_rank <= found.best_rank
    assert found.in_rounds <= found.best_rank
    busiest = [0] * ranks
    for request, row in enumerate(local.tolist()):
        busiest[row.index(max(row))] += lengths_in_order(trace)[request]
    assert found.best_rank_busiest == pytest.approx(max(busiest) / (sum(busiest) / ranks))


def lengths_in_order(trace: RoutingTrace) -> list[int]:
    return np.bincount(request_order(trace)).tolist()


@given(cut=st.integers(0, 6), rows=st.integers(1, 15))
def test_parts_add_up(make_trace: Make, cut: int, rows: int) -> None:
    trace = make_trace(lengths=(4, 6, 3, 5, 7))
    slots = with_replicas(2, 0)
    first, second = (LocalActivations(About.of(trace), slots, 2) for _ in range(2))
    for chunk in chunks_of(trace, rows):
        for part, of_part in ((first, chunk.request_id < cut), (second, chunk.request_id >= cut)):
            if of_part.any():
                part.add(chunk.select(of_part))
    second.merge(first)
    assert second.result().to_dict() == local_activation(trace, slots, 2).to_dict()


def test_known_placements(make_trace: Make) -> None:
    trace = make_trace(lengths=(8,) * 6)
    one = local_activation(trace, contiguous_slots(3, 8), 1)
    assert one.round_robin == one.best_rank == one.in_rounds == 1
    everywhere = local_activation(trace, np.tile(np.arange(8), (3, 4)), 4)
    assert everywhere.round_robin == everywhere.any_rank == 1
    assert local_activation(trace, contiguous_slots(3, 8), 4).any_rank == pytest.approx(1 / 4)


def test_rounds_give_each_rank_one_request() -> None:
    local = np.array([[5, 4, 0], [6, 5, 1], [6, 5, 2], [0, 0, 9]])
    found = LocalActivation(ranks=3, local=local, choices=np.full(4, 10))
    # first round: 5 (rank 0), 5 (rank 1, rank 0 is taken), 2 (rank 2); second: 9
    assert found.in_rounds == (5 + 5 + 2 + 9) / 40
    assert found.best_rank == (5 + 6 + 6 + 9) / 40
    assert found.round_robin == (5 + 5 + 2 + 0) / 40
    assert found.best_rank_busiest == 30 / (40 / 3)
    best = max(sum(local[r, rank] for r, rank in enumerate(p)) for p in permutations(range(3)))
    assert found.in_rounds * 40 - 9 <= best


@pytest.mark.parametrize(
    ("slots", "ranks", "message"),
    [
        (np.zeros((2, 8), int), 2, r"slots: int64\[2, 8\] -- must be \[3 layers, slots\]"),
        (np.zeros((3, 8)), 2, r"slots: float64\[3, 8\]"),
        (contiguous_slots(3, 8), 3, "slots: 8 a layer on 3 ranks"),
        (contiguous_slots(3, 8), 0, "8 a layer on 0 ranks"),
        (contiguous_slots(3, 9)[:, 1:], 2, "slots: ids 1 to 8"),
        (np.zeros((3, 8), int), 2, r"expert 1 of layer index 0 has none \(21 such\)"),
    ],
)
def test_bad_input(make_trace: Make, slots: np.ndarray, ranks: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LocalActivations(About.of(make_trace()), slots, ranks)
