"""A small table of predictions, so that a change of the models shows by how much.

To renew it on purpose: ``python tests/moeplan/test_golden.py``, and say why in the commit.
"""

import json
from pathlib import Path

import pytest

from hwmodels import load_cluster
from planner.baselines import contiguous
from simulator.deployment import Deployment, Workload
from simulator.simulate import simulate
from traces.model_spec import load_model
from traces.routing_trace import read_trace

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "examples" / "data"
TABLE = HERE / "golden" / "predictions.json"
CLUSTERS = ("hgx-a100-8", "hgx-h100-8", "hgx-h100-8x2", "hgx-b200-8", "mi300x-8")
WORKLOADS = ({"decode_batch": 256}, {"prefill_tokens": 4096})


def predictions() -> dict[str, dict[str, float]]:
    model = load_model(DATA / "gpt-oss-widths-12-layers.json")
    trace = read_trace(DATA / "example-moe-12x32.parquet")
    table = {}
    for name in CLUSTERS:
        cluster = load_cluster(name)
        place = contiguous(12, 32, 32, cluster.num_ranks)
        for workload in WORKLOADS:
            result = simulate(
                model, trace, cluster, Deployment.of(place), Workload(**workload), steps=4
            )
            row = {"step_time_s": result.step_time_s["mean"], **result.seconds_by_cause}
            table[f"{name} {next(iter(workload))}"] = row
    return table


def test_predictions_are_the_golden_ones() -> None:
    golden = json.loads(TABLE.read_text())
    found = predictions()
    assert found.keys() == golden.keys()
    moved = [
        f"{case} {cause}: {golden[case].get(cause, 0.0):.6g} -> {value:.6g} s"
        for case, row in found.items()
        for cause, value in row.items()
        if value != pytest.approx(golden[case].get(cause), rel=1e-6, abs=1e-12)
    ]
    assert not moved, "\n".join(moved)


if __name__ == "__main__":
    TABLE.write_text(json.dumps(predictions(), indent=1) + "\n")
