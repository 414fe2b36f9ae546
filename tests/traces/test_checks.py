"""The checks of expert ids against plain loops over the cells."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import traces.checks
from basis.errors import InputError
from traces.checks import check_cells
from traces.meta import MISSING, TraceMeta


def columns_of(experts: np.ndarray) -> dict[str, np.ndarray]:
    tokens = len(experts)
    return {
        "request_id": np.zeros(tokens, np.int32),
        "position": np.arange(tokens, dtype=np.int32),
        "step": np.zeros(tokens, np.int32),
        "domain": np.zeros(tokens, np.int16),
        "experts": experts.astype(np.uint16),
    }


def meta_of(layers: int, experts: int, top_k: int) -> TraceMeta:
    return TraceMeta(
        model="m", num_experts=experts, top_k=top_k, moe_layer_ids=tuple(range(layers))
    )


def counted(experts: np.ndarray, num_experts: int) -> dict[str, int]:
    """How many cells have each fault, cell by cell."""
    found = {"missing": 0, "out of range": 0, "with a repeated expert": 0}
    for cell in experts.reshape(-1, experts.shape[-1]).tolist():
        if MISSING in cell:
            found["missing"] += 1
            continue
        found["out of range"] += any(id_ >= num_experts for id_ in cell)
        found["with a repeated expert"] += len(set(cell)) < len(cell)
    return found


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 12), layers=st.integers(1, 3), top_k=st.integers(1, 5),
    faults=st.integers(0, 3), block=st.integers(1, 9), few=st.sampled_from([0, 64]),
    seed=st.integers(0, 10_000),
)  # fmt: skip
def test_every_fault_is_counted(
    tokens: int, layers: int, top_k: int, faults: int, block: int, few: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    experts = rng.random((tokens, layers, 6)).argsort(axis=-1)[..., :top_k]
    for _ in range(faults):
        cell = experts[rng.integers(tokens), rng.integers(layers)]
        cell[rng.integers(top_k)] = rng.choice([6, 7, MISSING, cell[rng.integers(top_k)]])
    expected = {kind: n for kind, n in counted(experts, 6).items() if n}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traces.checks, "_BLOCK_CELLS", block)
        patch.setattr(traces.checks, "_FEW", few)
        try:
            check_cells(columns_of(experts), meta_of(layers, 6, top_k), 1, "x")
            message = ""
        except InputError as error:
            message = str(error)
    found = {kind: int(n) for n, kind in re.findall(r"(\d+) cells ([a-z ]+) \(first", message)}
    assert found == expected


@pytest.mark.parametrize("at", [(0, 0), (9_999, 1), (8_192, 0), (8_191, 1)])
@pytest.mark.parametrize("pair", [(0, 1), (3, 7), (6, 7)])
def test_one_repeated_expert_among_many_cells(at: tuple[int, int], pair: tuple[int, int]) -> None:
    experts = np.broadcast_to(np.arange(8), (10_000, 2, 8)).copy()
    check_cells(columns_of(experts), meta_of(2, 8, 8), 1, "x")
    experts[at][pair[1]] = experts[at][pair[0]]
    with pytest.raises(InputError, match=rf"1 cells with a rep.*row {at[0]}, layer {at[1]}\)"):
        check_cells(columns_of(experts), meta_of(2, 8, 8), 1, "x")
