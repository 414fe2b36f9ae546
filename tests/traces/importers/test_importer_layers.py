"""Layer axes against the model."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.importers.base import Asked
from traces.importers.layers import (
    asked_routing,
    count_layers,
    moe_columns,
    named_layers,
    routing_of,
    token_cells,
)


def test_columns(engines: Any) -> None:
    routing = routing_of(engines.model())
    for axis, six, three in (("all", [1, 2, 4], None), ("moe", None, [0, 1, 2]),
                             ("either", [1, 2, 4], [0, 1, 2])):  # fmt: skip
        for found, wanted in ((6, six), (3, three), (5, None)):
            columns = moe_columns(found, routing, axis)  # type: ignore[arg-type]
            assert (None if columns is None else columns.tolist()) == wanted


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(0, 6), blanks=st.sets(st.integers(0, 5)), blank=st.sampled_from([0, -1]))
def test_cells_are_those_of_the_moe_layers(
    engines: Any, rows: int, blanks: set[int], blank: int
) -> None:
    routing = routing_of(engines.model())
    ids = np.full((rows, 6, 2), blank)
    wanted = []
    for row in range(rows):
        if row in blanks:
            continue
        cells = [[(row + layer) % 12, (row + layer + 1) % 12] for layer in (1, 2, 4)]
        ids[row, [1, 2, 4]] = cells
        wanted.append(cells)
    cells, recorded = token_cells(ids, routing, "all", "x", blank=blank)
    assert cells.dtype == np.uint16
    assert cells.tolist() == wanted
    assert np.flatnonzero(~recorded).tolist() == sorted(b for b in blanks if b < rows)


def test_all_problems_of_a_shape_at_once(engines: Any) -> None:
    routing = routing_of(engines.model())
    with pytest.raises(InputError, match=r"5 layers recorded, .*; 3 experts per token and layer"):
        token_cells(np.zeros((2, 5, 3), int), routing, "either", "x")


@pytest.mark.parametrize("ids", [np.zeros((2, 6)), np.zeros((2, 6, 2))])
def test_what_is_no_ids(engines: Any, ids: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"x: float64.* -- expert ids are integers \[tokens"):
        token_cells(ids, routing_of(engines.model()), "all", "x")


def test_choices_that_do_no_work(engines: Any) -> None:
    ids = np.full((2, 3, 2), [3, 13])
    for zero, remedy in (
        (0, "give the config"),
        (1, "give the config"),
        (2, "a trace cannot hold"),
    ):
        routing = routing_of(engines.model(zero_experts=zero))
        with pytest.raises(InputError, match=rf"first: 13, row 0, layer 1\) -- 0 to 11 .*{remedy}"):
            token_cells(ids, routing, "moe", "x")


def test_unsigned_ids_and_a_negative_blank(engines: Any) -> None:
    ids = np.ones((2, 3, 2), np.uint8)
    cells, recorded = token_cells(ids, routing_of(engines.model()), "moe", "x", blank=-1)
    assert recorded.all()
    assert (cells == 1).all()


def test_names_of_layers(engines: Any) -> None:
    assert named_layers([3, 4], Asked(), "x")[0] == (3, 4)
    asked = engines.asked()
    assert named_layers([1, 2, 4], asked, "x") == ((1, 2, 4), [])
    ids, notes = named_layers([0, 1, 2], asked, "x")
    assert ids == (1, 2, 4)
    assert len(notes) == 1
    with pytest.raises(InputError, match="x: layers 1, 2, 3 recorded -- small has MoE layers 1, 2"):
        named_layers([1, 2, 3], asked, "x")
    with pytest.raises(InputError, match=r"layers 0, 1, 2, 3, \.\.\. 57 \(58\) recorded"):
        named_layers(range(58), asked, "x")


def test_counts_without_a_model_keep_the_layers_that_counted() -> None:
    counts = np.zeros((2, 4, 3), np.int32)
    counts[1, [1, 3]] = 5
    kept, layers = count_layers(counts, Asked(), "all", "x")
    assert layers == (1, 3)
    assert np.array_equal(kept, counts[:, [1, 3]])


def test_no_model(engines: Any) -> None:
    with pytest.raises(InputError, match="x: it does not say which layers are MoE"):
        asked_routing(Asked(), "x")
    assert asked_routing(engines.asked(), "x").moe_layer_ids == (1, 2, 4)
