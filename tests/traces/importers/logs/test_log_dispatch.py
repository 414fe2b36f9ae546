"""JSON lines with header and footer: what is missing is noticed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.base import Asked
from traces.importers.formats import Imported, import_file
from traces.importers.log_dispatch import FORMATS_DISPATCH
from traces.routing_trace import RoutingTrace, read_trace

Records = list[dict[str, Any]]


@pytest.fixture
def records(
    writers: dict[str, Callable[[RoutingTrace, Path], Path]], trace: RoutingTrace, tmp_path: Path
) -> Records:
    path = writers["dispatch-jsonl"](trace, tmp_path)
    return [json.loads(line) for line in path.read_text().splitlines()]


def do_import(
    records: Records, tmp_path: Path, asked: Asked | None = None
) -> tuple[Imported, RoutingTrace]:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = import_file(
        tmp_path / "d.jsonl", tmp_path / "a.parquet", asked=asked, formats=FORMATS_DISPATCH
    )
    return found, read_trace(tmp_path / "a.parquet")


def test_rows_of_a_request_in_any_order(
    records: Records, trace: RoutingTrace, tmp_path: Path
) -> None:
    rows = records[2:10]  # of the first request
    for row in rows:
        row["routing"].reverse()
    _, back = do_import([*records[:2], *reversed(rows), *records[10:]], tmp_path)
    assert np.array_equal(back.experts, trace.experts)
    assert np.array_equal(back.position, trace.position)
    assert back.meta.model == "tiny"


def test_without_request_rows_the_prompt_is_what_was_prefilled(
    records: Records, trace: RoutingTrace, tmp_path: Path
) -> None:
    _, back = do_import([r for r in records if r["row_type"] != "request"], tmp_path)
    assert np.array_equal(back.position, trace.position)


def test_blocks_of_any_size(
    records: Records, trace: RoutingTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traces.json_lines._BLOCK_BYTES", 100)
    _, back = do_import(records, tmp_path)
    assert np.array_equal(back.experts, trace.experts)
    assert back.weights is not None
    assert trace.weights is not None
    assert np.array_equal(back.weights, trace.weights)


def test_no_weights(records: Records, trace: RoutingTrace, tmp_path: Path) -> None:
    for record in records:
        for cell in record.get("routing", ()):
            del cell["gate_weights"]
    _, back = do_import(records, tmp_path)
    assert back.weights is None
    assert np.array_equal(back.experts, trace.experts)


def test_a_token_without_a_layer_is_dropped(records: Records, tmp_path: Path) -> None:
    del records[4]["routing"][1]
    found, back = do_import(records, tmp_path)
    assert found.dropped == {"tokens with a missing layer": 1}
    assert back.num_tokens == 19


def drop(start: int, stop: int | None) -> Callable[[Records], Records]:
    return lambda records: records[:start] + (records[stop:] if stop else [])


def change(at: int, **fields: Any) -> Callable[[Records], Records]:
    return lambda records: [*records[:at], records[at] | fields, *records[at + 1 :]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop(-1, None), "no footer after .*'tokens': 20.* cut off"),
        (drop(4, 6), "18 tokens, the footer says 20 -- lines are missing"),
        (drop(15, -1), "requests, the footer says 3|tokens, the footer says 20"),
        (lambda r: [*r, r[3]], "after the footer"),
        (lambda r: [*r[:12], r[3], *r[12:]], "request 'p0' comes again|one position"),
        (lambda r: [*r[:4], r[3], *r[4:]], "two tokens of a request have one position"),
        (change(3, phase="warmup"), "phase 'warmup' -- prefill or decode"),
        (change(3, request_id=None), "has no 'request_id'"),
        (change(3, routing=[{"layer_index": 1, "expert_ids": [1]}]), "expert_ids has 1 values"),
        (change(3, routing=[{"layer_index": 0, "expert_ids": [1, 2]}]), "layer 0 is none of"),
        (change(3, routing=[{"layer_index": 1, "expert_ids": [1, 2]}] * 2), "a layer twice"),
        (change(3, routing=[{"layer_index": 1, "expert_ids": [1, 8]}]), "expert 8 in layer 1"),
        (change(3, routing=[{"expert_ids": [1, 2]}]), "no layer_index"),
        (change(0, provenance={"top_k": 2}), "expert_count None, top_k 2"),
        (change(0, provenance={"expert_count": 8, "top_k": 3, "moe_layer_indices": [1, 2, 3]}),
         "expert_ids has 2 values, 3 are right"),
        (change(0, provenance={"expert_count": 8, "top_k": 2, "moe_layer_indices": [1, 2]}),
         "layer 3 is none of the layers 1, 2"),
    ],
)  # fmt: skip
def test_damage(
    records: Records, spoil: Callable[[Records], Records], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        do_import(spoil(records), tmp_path)
    assert not (tmp_path / "a.parquet").exists()
