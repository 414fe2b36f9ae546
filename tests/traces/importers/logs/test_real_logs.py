"""Recorded traces, written in the layouts that their recorders use, and read again.

Needs the recorded traces: set MOEPLAN_DATA to their folder.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.base import Asked
from traces.importers.formats import import_file
from traces.importers.log_lines import FORMATS_LINES
from traces.meta import MISSING, TraceMeta
from traces.model_spec import ModelSpec
from traces.parquet_columns import TraceFile
from traces.routing_trace import RoutingTrace, TraceWarning, read_trace

DATA = Path(os.environ.get("MOEPLAN_DATA", "absent")) / "traces"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="set MOEPLAN_DATA to the folder of the recorded traces"
)


def asked_for(model: ModelSpec, meta: TraceMeta) -> Asked:
    """Return the small model with the geometry of a recorded one."""
    change = {
        "num_experts": meta.num_experts,
        "top_k": meta.top_k,
        "moe_layer_ids": meta.moe_layer_ids,
    }
    return Asked(model=model.model_copy(update=change))


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_quietly(name: str) -> RoutingTrace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)  # rows without a request
        return read_trace(DATA / name)


@needs_data
@pytest.mark.parametrize("name", ["qwen1.5-moe-gsm8k", "granite-3.0-1b-artificial"])
def test_the_steps_of_an_engine(name: str, model: ModelSpec, tmp_path: Path) -> None:
    """Several requests in a step, as vLLM ran them; the logger counts the rows of the step."""
    trace = read_quietly(f"{name}.parquet")
    order = np.lexsort((trace.position, trace.request_id, trace.step))
    trace = trace.select(order)
    records: list[dict[str, Any]] = []
    for step in np.unique(trace.step):
        rows = np.flatnonzero(trace.step == step).tolist()
        for place, layer in enumerate(trace.meta.moe_layer_ids):
            for token, row in enumerate(rows):
                records.append(
                    {
                        "type": "route", "req_id": f"r{trace.request_id[row]}", "layer": layer,
                        "token_idx": token, "topk_ids": trace.experts[row, place].tolist(),
                    }
                )  # fmt: skip
    source = write(tmp_path / "routes.jsonl", records)
    asked = asked_for(model, trace.meta)
    found = import_file(source, tmp_path / "a.parquet", asked=asked, formats=FORMATS_LINES)
    back = read_trace(tmp_path / "a.parquet")
    assert found.dropped == {}
    assert np.array_equal(back.experts, trace.experts)
    requests = trace.request_id.tolist()
    first = list(dict.fromkeys(requests))
    assert back.request_id.tolist() == [first.index(request) for request in requests]
    _, steps = np.unique(trace.step, return_inverse=True)
    assert np.array_equal(back.step, steps)


@needs_data
def test_the_log_that_lost_cells(model: ModelSpec, tmp_path: Path) -> None:
    """Most tokens lost a layer, so it is refused; with fewer of them the whole ones come back."""
    path = DATA / "dirty-mixtral-8x7b-humaneval.parquet"
    with TraceFile(path, weights=False, candidates=False) as file:
        columns, meta = next(file.batches(10**6)), file.meta
    experts = columns["experts"]
    broken = {row for row in range(len(experts)) if (experts[row] == MISSING).any()}

    def records(rows: list[int]) -> list[dict[str, Any]]:
        found = []
        for step in np.unique(columns["step"]):
            inside = [row for row in rows if columns["step"][row] == step]
            for layer in range(len(meta.moe_layer_ids)):
                for row in inside:
                    if experts[row, layer, 0] != MISSING:
                        found.append(
                            {
                                "dataset": "humaneval", "problem_id": 0, "layer": layer,
                                "experts": experts[row, layer].tolist(),
                                "token_idx": int(columns["position"][row]),
                            }
                        )  # fmt: skip
        return found

    everything = list(range(len(experts)))
    whole = [row for row in everything if row not in broken]
    source = write(tmp_path / "all.jsonl", records(everything))
    asked = asked_for(model, meta)
    said = f"{len(broken)} tokens with a missing layer, only {len(whole)} whole"
    with pytest.raises(InputError, match=said):
        import_file(source, tmp_path / "a.parquet", asked=asked, formats=FORMATS_LINES)
    some = [row for row in everything if row not in broken or row % 3 == 0]
    source = write(tmp_path / "some.jsonl", records(some))
    found = import_file(source, tmp_path / "a.parquet", asked=asked, formats=FORMATS_LINES)
    back = read_trace(tmp_path / "a.parquet")
    assert found.dropped == {"tokens with a missing layer": len(some) - len(whole)}
    assert np.array_equal(back.experts, experts[whole])
    assert np.array_equal(back.position, columns["position"][whole])
