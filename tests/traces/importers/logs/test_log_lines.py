"""Logs of one line per cell: warm-up, batches, restarting counters, missing cells."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.importers import log_cells
from traces.importers.base import Asked
from traces.importers.formats import Imported, import_file
from traces.importers.log_lines import FORMATS_LINES
from traces.routing_trace import RoutingTrace, read_trace

WARM_UP = "warm-up tokens (the same experts in a whole step)"
MISSING = "tokens with a missing layer"
Record = dict[str, Any]
rng = np.random.default_rng(3)


def route(request: Any, token: int, layer: int, ids: list[int]) -> Record:
    return {"type": "route", "req_id": request, "token_idx": token, "layer": layer, "topk_ids": ids}


def hook(problem: int, token: int, layer: int, ids: list[int]) -> Record:
    return {"problem_id": problem, "layer": layer, "experts": ids, "token_idx": token}


def draw() -> list[int]:
    return rng.permutation(8)[:2].tolist()


def step(requests: list[Any], layers: tuple[int, ...] = (1, 2, 3)) -> list[Record]:
    """Return the records of a forward step with one row per entry of ``requests``."""
    return [route(r, t, layer, draw()) for layer in layers for t, r in enumerate(requests)]


def do_import(
    records: list[Record], tmp_path: Path, asked: Asked, name: str | None = None
) -> tuple[Imported, RoutingTrace]:
    source = tmp_path / "log.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    target = tmp_path / "a.parquet"
    found = import_file(source, target, format=name, asked=asked, formats=FORMATS_LINES)
    return found, read_trace(target)


def cells(records: list[Record]) -> list[list[list[int]]]:
    """Return ``[T][L][K]`` of steps made by `step`, by a plain loop."""
    found: list[dict[int, list[int]]] = []
    current: dict[int, dict[int, list[int]]] = {}
    last = -1
    for record in records:
        if record["layer"] < last:
            found += current.values()
            current = {}
        last = record["layer"]
        current.setdefault(record["token_idx"], {})[record["layer"]] = record["topk_ids"]
    found += current.values()
    return [[layers[i] for i in sorted(layers)] for layers in found]


def test_a_batch_with_request_ids(tmp_path: Path, asked: Asked) -> None:
    records = [
        *step(["a", "a", "a", "b", "b"]),
        *step(["a", "b"]),
        *step(["b", "a", "c", "c"]),
        *step(["c", "b"]),
    ]
    found, trace = do_import(records, tmp_path, asked)
    assert trace.experts.tolist() == cells(records)
    assert trace.request_id.tolist() == [0, 0, 0, 1, 1, 0, 1, 1, 0, 2, 2, 2, 1]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 3, 2, 3, 4, 0, 1, 2, 4]
    assert trace.step.tolist() == [0] * 5 + [1] * 2 + [2] * 4 + [3] * 2
    assert trace.decode.tolist() == [False] * 5 + [True] * 4 + [False] * 2 + [True] * 2
    assert found.dropped == {}


def test_a_batch_under_one_id_keeps_no_sequences(tmp_path: Path, asked: Asked) -> None:
    records = [*step(["x"] * 9), *step(["x"] * 4), *step(["x"] * 4)]
    found, trace = do_import(records, tmp_path, asked)
    assert trace.experts.tolist() == cells(records)
    assert trace.request_id.tolist() == list(range(17))
    assert not trace.position.any()
    assert any("each token is a request of its own" in note for note in found.notes)


def test_absent_ids_are_one_id(tmp_path: Path, asked: Asked) -> None:
    records = [*step([None] * 3), *step([None]), *step([None] * 2), *step([None])]
    found, trace = do_import(records, tmp_path, asked)
    assert trace.request_id.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert trace.position.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert trace.decode.tolist() == [False] * 3 + [True] + [False] * 2 + [True]
    assert any("prompt of a new request" in note for note in found.notes)


def test_numbers_as_request_ids(tmp_path: Path, asked: Asked) -> None:
    _, trace = do_import([*step([7, 7, 9]), *step([9, 7])], tmp_path, asked)
    assert trace.request_id.tolist() == [0, 0, 1, 1, 0]


def test_one_layer_of_many(tmp_path: Path, asked: Asked) -> None:
    meta = {"type": "meta", "layers_logged": [2], "top_k": 2}
    records = [*step(["a"] * 3, (2,)), *step(["a"], (2,)), *step(["a"], (2,))]
    _, trace = do_import([meta, *records], tmp_path, asked)
    assert trace.meta.moe_layer_ids == (2,)
    assert trace.experts[:, 0].tolist() == [r["topk_ids"] for r in records]
    assert trace.position.tolist() == [0, 1, 2, 3, 4]


def test_indices_of_moe_layers_are_told_from_layers(tmp_path: Path, asked: Asked) -> None:
    found, trace = do_import(step(["a"] * 4, (0, 2)), tmp_path, asked)
    assert trace.meta.moe_layer_ids == (1, 3)  # 0 is a dense layer, so these are indices
    assert "layers 0, 2 were read as indices of MoE layers: layers 1, 3" in found.notes[0]


def dummies(tokens: int, ids: list[int]) -> list[Record]:
    return [route("x", t, layer, ids) for layer in (1, 2, 3) for t in range(tokens)]


def test_warm_up_is_dropped_and_counted(tmp_path: Path, asked: Asked) -> None:
    real = [*step(["x"] * 5), *step(["x"])]
    warm = [*dummies(300, [6, 2]), *dummies(4, [2, 6]), *dummies(1, [6, 2]), *dummies(2, [1, 0])]
    found, trace = do_import([*warm, *real], tmp_path, asked)
    assert found.dropped == {WARM_UP: 307}
    assert trace.experts.tolist() == cells(real)
    assert trace.step.tolist() == [0] * 5 + [1]


def test_equal_rows_after_the_start_are_kept(tmp_path: Path, asked: Asked) -> None:
    records = [*step(["x"] * 5), *dummies(20, [6, 2]), *step(["x"])]
    found, trace = do_import(records, tmp_path, asked)
    assert (found.dropped, trace.num_tokens) == ({}, 26)


def test_each_start_of_the_recorder_has_its_warm_up(tmp_path: Path, asked: Asked) -> None:
    meta = {"type": "meta", "layers_logged": [1, 2, 3], "top_k": 2}
    first, second = [*step(["x"] * 5), *step(["x"])], [*step(["x"] * 2), *step(["x"])]
    records = [meta, *dummies(30, [6, 2]), *first, meta, *dummies(50, [3, 5]), *second]
    found, trace = do_import(records, tmp_path, asked)
    assert found.dropped == {WARM_UP: 80}
    assert trace.experts.tolist() == cells(first) + cells(second)
    assert trace.request_id.tolist() == [0] * 6 + [1] * 3


def test_tokens_that_lack_a_layer_are_dropped(tmp_path: Path, asked: Asked) -> None:
    records = [hook(0, t, layer, draw()) for layer in (1, 2, 3) for t in range(6)]
    records += [hook(0, t, layer, draw()) for t in range(6, 10) for layer in (1, 2, 3)]
    kept = [r for i, r in enumerate(records) if i not in (1, 8, 20, 28)]  # tokens 1, 2, 6, 9
    found, trace = do_import(kept, tmp_path, asked)
    assert found.dropped == {MISSING: 4}
    assert trace.position.tolist() == [0, 3, 4, 5, 7, 8]  # the gaps stay
    assert trace.decode.tolist() == [False] * 4 + [True] * 2
    for position, experts in zip(trace.position, trace.experts.tolist(), strict=True):
        assert experts == [r["experts"] for r in records if r["token_idx"] == position]


def test_mostly_missing_is_refused(tmp_path: Path, asked: Asked) -> None:
    records = [hook(0, t, layer, draw()) for t in range(10) for layer in (1, 2, 3)]
    lost = [r for r in records if not (r["layer"] == 2 and r["token_idx"] % 3)]
    with pytest.raises(InputError, match="6 tokens with a missing layer, only 4 whole"):
        do_import(lost, tmp_path, asked)
    assert not (tmp_path / "a.parquet").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_padding_rows_are_dropped(tmp_path: Path, asked: Asked) -> None:
    records = step(["a"] * 6)
    for record in records:
        if record["token_idx"] == 5:
            record["topk_ids"] = [0, 0]
        elif record["token_idx"] == 4 and record["layer"] == 2:
            record["topk_ids"] = [3, -1]
    found, trace = do_import(records, tmp_path, asked)
    assert found.dropped == {MISSING: 1, "tokens with the same expert twice (padding)": 1}
    assert trace.num_tokens == 4


def test_copied_layers_are_noted(tmp_path: Path, asked: Asked) -> None:
    records = [hook(0, t, layer, draw()) for t in range(20) for layer in (1, 2)]
    records = [
        record | {"layer": layer}
        for record in records
        for layer in ((1, 3) if record["layer"] == 1 else (2,))
    ]
    records.sort(key=lambda r: (r["token_idx"], r["layer"]))
    found, trace = do_import(records, tmp_path, asked)
    assert trace.num_tokens == 20
    assert "layer 3 has the same experts as layer 1 in all rows: a copy?" in found.notes
    assert sum("copy" in note for note in found.notes) == 1


def test_two_data_sets_are_domains_and_their_problems_differ(tmp_path: Path, asked: Asked) -> None:
    records = [
        hook(0, t, layer, draw()) | {"dataset": name}
        for name in ("gsm8k", "humaneval")
        for t in range(3)
        for layer in (1, 2, 3)
    ]
    _, trace = do_import(records, tmp_path, asked)
    assert trace.domains == ("gsm8k", "humaneval")
    assert trace.domain.tolist() == [0] * 3 + [1] * 3
    assert trace.request_id.tolist() == [0] * 3 + [1] * 3


def test_weights_in_some_rows_only_are_left_out(tmp_path: Path, asked: Asked) -> None:
    records = step(["a"] * 4)
    for record in records[3:]:
        record["topk_weights"] = [0.5, 0.25]
    found, trace = do_import(records, tmp_path, asked)
    assert trace.weights is None
    assert "router weights are not in all rows, so they are left out" in found.notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_ids": [1, 2, 3]}, r"'topk_ids' of a record in 1 to 12 has 3 values, 2 are right"),
        ({"topk_ids": [1, 8]}, r"expert 8 in layer 2 -- .* has 8 experts"),
        ({"topk_ids": [1, 2**40]}, "lines 1 to 12"),
        ({"topk_ids": [1, None]}, "has nulls"),
        ({"topk_ids": "1, 2"}, "lines 1 to 12"),
        ({"layer": 7}, "layers 1, 2, 3, 7; .* has 3 MoE layers"),
        ({"layer": None}, "record 6 has no 'layer'"),
        ({"token_idx": -1}, "token_idx -1"),
        ({"req_id": 5}, "lines 1 to 12"),
        ({"topk_weights": [0.5]}, "'topk_weights' has 1 values, 2 are right"),
        ({"topk_weights": [-0.5, 0.5]}, "cells with bad weights"),
        ({"topk_weights": [1e6, 0.5]}, "cells with bad weights"),
    ],
)
def test_bad_cells(change: Record, message: str, tmp_path: Path, asked: Asked) -> None:
    records = step(["a"] * 4)
    for record in records:
        record["topk_weights"] = [0.5, 0.25]
    records[5] |= change
    with pytest.raises(InputError, match=message):
        do_import(records, tmp_path, asked)
    assert not (tmp_path / "a.parquet").exists()


def test_no_route_at_all(tmp_path: Path, asked: Asked) -> None:
    with pytest.raises(InputError, match="no line is a route"):
        do_import([{"type": "meta", "layers_logged": [1], "top_k": 2}], tmp_path, asked)


def test_only_warm_up_leaves_nothing(tmp_path: Path, asked: Asked) -> None:
    with pytest.raises(InputError, match=r"no token is left .*warm-up"):
        do_import(dummies(40, [6, 2]), tmp_path, asked)


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_schedule_comes_back(
    data: st.DataObject, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and answers in any order of steps, read in blocks of any size."""
    monkeypatch.setattr("traces.json_lines._BLOCK_BYTES", 1)
    prompts = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=5))
    waiting, running, schedule = list(enumerate(prompts)), [], []
    while waiting or running:
        rows = [f"r{r}" for r in running]
        if waiting and (not running or data.draw(st.booleans())):
            request, prompt = waiting.pop(0)
            rows += [f"r{request}"] * prompt
            running.append(request)
        schedule.append(rows)
        running = [r for r in running if data.draw(st.integers(0, 3))]
    records = [record for rows in schedule for record in step(rows)]
    _, trace = do_import(records, tmp_path, asked, "vllm-logger")
    names = [name for rows in schedule for name in rows]
    order = list(dict.fromkeys(names))
    assert trace.request_id.tolist() == [order.index(name) for name in names]
    assert trace.position.tolist() == [names[:i].count(name) for i, name in enumerate(names)]
    assert trace.decode.tolist() == [rows.count(n) == 1 for rows in schedule for n in rows]
    assert trace.experts.tolist() == cells(records)
    (tmp_path / "a.parquet").unlink()


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), answer=st.integers(0, 6), prompt=st.integers(1, 6))
def test_any_cells_may_be_missing(
    data: st.DataObject, answer: int, prompt: int, tmp_path: Path, asked: Asked
) -> None:
    """What has all layers comes back, at its position; the rest is counted."""
    records = [
        hook(problem, t, layer, draw())
        for problem in range(3)
        for tokens in (range(prompt), *([prompt + i] for i in range(answer)))
        for layer in (1, 2, 3)
        for t in tokens
    ]
    # the last token of a prompt stays, so that what is lost leaves a gap
    losable = [i for i, record in enumerate(records) if record["token_idx"] != prompt - 1]
    some = (
        st.sets(st.sampled_from(losable), max_size=len(records) // 8) if losable else st.just(set())
    )
    lost = data.draw(some)
    left = [record for i, record in enumerate(records) if i not in lost]
    tokens: dict[tuple[int, int], dict[int, list[int]]] = {}
    for record in left:
        key = record["problem_id"], record["token_idx"]
        tokens.setdefault(key, {})[record["layer"]] = record["experts"]
    whole = {key: layers for key, layers in tokens.items() if len(layers) == 3}
    found, trace = do_import(left, tmp_path, asked)
    assert found.dropped.get(MISSING, 0) == len(tokens) - len(whole)
    assert list(zip(trace.request_id, trace.position, strict=True)) == list(whole)
    assert trace.experts.tolist() == [[layers[i] for i in (1, 2, 3)] for layers in whole.values()]
    (tmp_path / "a.parquet").unlink()


def test_a_log_sorted_by_layer(tmp_path: Path, asked: Asked) -> None:
    records = [hook(p, t, layer, draw()) for p in (0, 1) for layer in (1, 2, 3) for t in range(7)]
    found, trace = do_import(records, tmp_path, asked)
    assert trace.position.tolist() == [*range(7), *range(7)]
    assert trace.experts[:, 1].tolist() == [r["experts"] for r in records if r["layer"] == 2]
    assert not trace.decode.any()
    assert any("sorted by layer looks like one step" in note for note in found.notes)


def test_tokens_numbered_after_a_loss_are_left_out(tmp_path: Path, asked: Asked) -> None:
    """Problem 1 lost rows of two layers and was numbered again; 0 and 2 are whole."""
    records = [
        hook(p, t, layer, draw())
        for p in (0, 1, 2)
        for layer in (1, 2, 3)
        for t in range(7 - (p == 1) * (layer - 1))
    ]
    found, trace = do_import(records, tmp_path, asked)
    name = "tokens of steps that were numbered after rows were lost (layers do not line up)"
    assert found.dropped == {name: 7}
    assert trace.request_id.tolist() == [0] * 7 + [2] * 7
    with pytest.raises(InputError, match=r"no token is left .*layers do not line up"):
        do_import([r for r in records if r["problem_id"] == 1], tmp_path, asked)


def test_a_repeated_cell_costs_its_token(tmp_path: Path, asked: Asked) -> None:
    """A token that comes again in its layer begins a step, so that both halves lack a layer."""
    records = [hook(0, t, layer, draw()) for t in range(5) for layer in (1, 2, 3)]
    found, trace = do_import(
        [*records[:5], records[4] | {"experts": [0, 1]}, *records[5:]], tmp_path, asked
    )
    assert found.dropped == {MISSING: 2}
    whole = [r["experts"] for r in records if r["token_idx"] != 1]
    assert trace.experts.reshape(-1, 2).tolist() == whole


def test_a_cell_twice_among_others_is_refused(tmp_path: Path, asked: Asked) -> None:
    records = [hook(p, 4, layer, draw()) for layer in (1, 2, 3) for p in (0, 1, 0)]
    with pytest.raises(InputError, match="record 3 repeats layer 1 of its token"):
        do_import(records, tmp_path, asked)


def test_a_batch_in_which_each_request_counts_its_tokens(tmp_path: Path, asked: Asked) -> None:
    """Numbers go down from one request to the next within a step."""
    records, position = [], [7, 3, 5]
    for running in ((0, 1, 2), (0, 1, 2), (0, 2), (2,)):
        step_records = [(p, position[p]) for p in running]
        records += [hook(p, t, layer, draw()) for layer in (1, 2, 3) for p, t in step_records]
        for p in running:
            position[p] += 1
    found, trace = do_import(records, tmp_path, asked)
    assert found.dropped == {}
    rows = sorted(zip(trace.request_id, trace.position, trace.step, strict=True))
    assert rows == [(0, 7, 0), (0, 8, 1), (0, 9, 2), (1, 3, 0), (1, 4, 1)] + [
        (2, 5 + i, i) for i in range(4)
    ]
    assert trace.decode.all()
    for request, at, experts in zip(
        trace.request_id, trace.position, trace.experts.tolist(), strict=True
    ):
        same = [r for r in records if (r["problem_id"], r["token_idx"]) == (request, at)]
        assert experts == [r["experts"] for r in same]


def test_a_counter_that_never_restarts_in_one_layer(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traces.json_lines._BLOCK_BYTES", 500)
    monkeypatch.setattr("traces.importers.log_cells._MOST_CELLS", 20)
    records = [hook(0, t, 2, draw()) for t in range(300)]
    _, trace = do_import(records, tmp_path, asked)
    assert trace.position.tolist() == list(range(300))
    assert trace.experts[:, 0].tolist() == [r["experts"] for r in records]


def test_a_step_of_many_layers_must_end(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traces.json_lines._BLOCK_BYTES", 500)
    monkeypatch.setattr("traces.importers.log_cells._MOST_CELLS", 20)
    with pytest.raises(InputError, match=r"a step of more than 20 cells at record .* layers must"):
        do_import(
            [hook(0, t, layer, draw()) for layer in (1, 2) for t in range(99)], tmp_path, asked
        )


def test_memory_does_not_hold_the_file(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more cells are joined than a block and a step have."""
    longest = 0
    join: Callable[..., Any] = vars(log_cells.Cells)["join"].__func__

    def watched(cls: Any, parts: Any) -> Any:
        nonlocal longest
        longest = max(longest, sum(len(part.step) for part in parts))
        return join(cls, parts)

    monkeypatch.setattr(log_cells.Cells, "join", classmethod(watched))
    monkeypatch.setattr("traces.json_lines._BLOCK_BYTES", 1000)
    records = [record for _ in range(200) for record in step(["a"])]
    do_import(records, tmp_path, asked)
    assert longest < 60  # of 600 cells
