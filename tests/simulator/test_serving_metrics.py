"""The definitions of TTFT, TPOT, latency and throughput, on a hand-made record."""

import numpy as np
import pytest

from simulator.serving import measured
from simulator.serving_metrics import RequestTimes, ServingResult, StepLog


def _requests() -> RequestTimes:
    """Three requests of 3, 1 and 2 tokens."""
    return RequestTimes(
        inputs=np.array([10, 20, 30]),
        outputs=np.array([3, 1, 2]),
        arrival=np.array([1.0, 2.0, 4.0]),
        admitted=np.array([1.0, 2.5, 4.5]),
        token=np.array([2.0, 3.0, 5.0, 3.5, 6.0, 9.0]),
    )


def _result(**changes: object) -> ServingResult:
    ones = np.ones(4, dtype=np.int64)
    steps = StepLog(
        start=np.arange(4.0), seconds=np.array([1.0, 1.0, 1.0, 3.0]), decodes=ones,
        prefills=15 * ones,
        running=np.array([1, 2, 2, 1]), waiting=0 * ones, preempted=0 * ones,
        kv_bytes=np.array([1.0, 4.0, 2.0, 3.0]),
    )  # fmt: skip
    fields: dict[str, object] = {
        "requests": _requests(),
        "steps": steps,
        "measured": np.array([True, True, True]),
        "kv_capacity": 10.0,
        "slo": {},
        "events": 7,
        "statements": (),
        "seconds_by_cause": {},
        "evidence": (),
        "ends": {},
    }
    return ServingResult(**(fields | changes))  # type: ignore[arg-type]


def test_times_of_requests() -> None:
    requests = _requests()
    assert requests.ttft.tolist() == [1.0, 1.5, 2.0]
    np.testing.assert_array_equal(requests.tpot, [1.5, np.nan, 3.0])
    assert requests.latency.tolist() == [4.0, 1.5, 5.0]
    assert requests.queue_wait.tolist() == [0.0, 0.5, 0.5]
    assert requests.gaps(np.array([True, True, True])).tolist() == [1.0, 2.0, 3.0]
    assert requests.gaps(np.array([False, True, True])).tolist() == [3.0]


def test_throughput() -> None:
    summary = _result().summary()
    assert summary["makespan_s"] == 8.0
    assert summary["output_tokens_per_second"] == 6 / 8
    assert summary["total_tokens_per_second"] == 66 / 8
    assert summary["requests_per_second"] == 3 / 8
    assert summary["steady_output_tokens_per_second"] == 3 / 3  # three tokens in (1, 4]
    assert summary["ttft_s"] == 1.5
    assert summary["tpot_s_p50"] == 2.25
    assert summary["busy_share"] == 6 / 8
    assert summary["running"] == (1 + 2 + 2 + 3) / 6
    assert summary["kv_peak_bytes_fullest_rank"] == 4.0
    assert "goodput_requests_per_second" not in summary


def test_warm_up_leaves_latencies_out_but_not_throughput() -> None:
    result = _result(measured=np.array([False, True, True]))
    summary = result.summary()
    assert summary["requests_measured"] == 2
    assert summary["ttft_s"] == 1.75
    assert summary["output_tokens_per_second"] == 6 / 8
    assert summary["steady_output_tokens_per_second"] == 2 / 2  # in (2, 4]
    assert measured(10, 0.25).tolist() == [False] * 2 + [True] * 8
    assert measured(1, 0.9).tolist() == [True]


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    summary = _result(slo={"ttft": 1.5, "tpot": 2.0}).summary()
    assert (
        summary["goodput_requests_per_second"] == 2 / 8
    )  # the third is late, the second has no TPOT
    assert summary["slo_share"] == pytest.approx(2 / 3)


def test_a_number_that_does_not_exist_is_none() -> None:
    one = RequestTimes(
        inputs=np.array([1]), outputs=np.array([1]), arrival=np.zeros(1), admitted=np.zeros(1),
        token=np.ones(1),
    )  # fmt: skip
    summary = _result(requests=one, measured=np.array([True])).summary()
    assert summary["tpot_s_p99"] is None
    assert summary["itl_s"] is None
    assert summary["steady_output_tokens_per_second"] is None
    assert _result(requests=one, measured=np.array([True])).to_dict()["requests"]["tpot_s"] == [
        None
    ]
