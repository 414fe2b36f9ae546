"""Fixed times that fall where a layer moves less than the cache holds."""

import numpy as np
import pytest

from basis import validate
from hwmodels.cluster import Cluster
from simulator.batches import Composition, StepBatch
from simulator.dispatch import Dispatcher
from simulator.loads import count_loads
from simulator.lowering import lower
from simulator.pricing import price_step

KERNELS = (
    "gemm", "grouped_gemm", "attention_decode", "attention_prefill", "route", "permute", "stream",
)  # fmt: skip


def _cluster(cache="1 GB", near=None):
    """One rank whose kernels are nothing but 10 us each."""
    flat = {"launch": "10 us", "compute_efficiency": 1, "memory_efficiency": 1}
    processor = {
        "memory": "host",
        "flops": {"bf16": "1e6 TFLOP/s"},
        "cache": cache,
        "kernels": {name: {"bf16": flat} for name in KERNELS},
    }
    if near is not None:
        processor["near_fixed"] = near
    device = {
        "name": "t",
        "memories": {"host": {"kind": "t", "capacity": "1 TB", "bandwidth": "1e6 TB/s"}},
        "processors": {"cpu": processor},
    }
    return validate({"name": "t", "device": device, "node": {"devices": 1}}, Cluster, "t")


def _seconds(make_model, make_trace, contiguous, cluster):
    model = make_model()
    trace = make_trace(model, requests=1, length=8)
    rows = np.arange(4)
    batch = StepBatch(rows=rows, context=rows + 1, home=np.zeros(4, dtype=int), last=rows >= 0)
    steps = Composition(batches=(batch,), decode=True, statement="", stand_in=False)
    dispatcher = Dispatcher(
        placement=contiguous(model, 1), dispatch="even", node_of=np.zeros(1, dtype=np.int64)
    )
    loads = count_loads(model, trace, steps, dispatcher)
    return price_step(lower(model, loads), loads, cluster).seconds


@pytest.mark.parametrize(
    ("cache", "near", "share"),
    [("1 GB", None, 1.0), ("1 GB", 0.4, 0.4), ("1 B", 0.4, 1.0), ("1 GB", 1.0, 1.0)],
)
def test_near_steps_have_a_share_of_their_fixed_times(
    make_model, make_trace, contiguous, cache, near, share
):
    plain = _seconds(make_model, make_trace, contiguous, _cluster())
    found = _seconds(make_model, make_trace, contiguous, _cluster(cache, near))
    assert found == pytest.approx(share * plain, rel=1e-3)
