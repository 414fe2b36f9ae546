"""Requests over time against closed forms: queues, one request alone, a closed loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from basis.errors import InfeasibleError, InputError
from hwmodels import Cluster
from simulator.deployment import Deployment
from simulator.placement import Placement
from simulator.serving import ClosedLoop, Served, ServingOptions, Slo, run, serve
from simulator.serving_scheduler import Scheduler, ServingStep
from traces import ModelSpec, RoutingTrace
from traces.arrivals import Arrivals, Lengths, poisson

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _PerToken:
    """A fixed time per step and a time per token of it."""

    fixed: float = 1.0
    token: float = 0.01

    def seconds(self, steps: Sequence[ServingStep]) -> Floats:
        return np.array([self.fixed + self.token * step.tokens for step in steps])


def _scheduler(arrivals: Arrivals, **changes: object) -> Scheduler:
    fields: dict[str, object] = {
        "inputs": arrivals.inputs,
        "outputs": arrivals.outputs,
        "num_ranks": 1,
        "max_batch_tokens": 100,
        "max_running": 50,
        "admission": "reserve",
        "kv_bytes": lambda tokens: np.asarray(tokens, dtype=np.float64),
        "kv_capacity": 1e9,
    }
    return Scheduler(**(fields | changes))  # type: ignore[arg-type]


def _arrivals(seconds: Sequence[float], inputs: int = 1, outputs: int = 1) -> Arrivals:
    count = len(seconds)
    return Arrivals(
        seconds=np.array(seconds, dtype=np.float64),
        inputs=np.full(count, inputs),
        outputs=np.full(count, outputs),
        source="test",
    )


def _one_server(arrivals: Arrivals, service: float) -> Served:
    """One request at a time, each one step long."""
    rules = _scheduler(arrivals, max_batch_tokens=1, max_running=1)
    return run(arrivals, rules, _PerToken(fixed=service, token=0.0))


def _lindley(arrival: Floats, service: float) -> Floats:
    """Wait of each customer of one server: max(0, the one ahead's wait + service - gap)."""
    wait = np.zeros(len(arrival))
    for i, gap in enumerate(np.diff(arrival).tolist(), 1):
        wait[i] = max(0.0, wait[i - 1] + service - gap)
    return wait


@pytest.mark.parametrize(("rho", "requests"), [(0.5, 40_000), (0.8, 100_000)])
def test_the_mean_wait_is_that_of_an_m_d_1_queue(rho: float, requests: int) -> None:
    """rho / (2 mu (1 - rho)), Pollaczek and Khinchine with constant service.

    Over seeds the mean of so many waits has a standard error of 1.6 %, so the seed is fixed; that
    every single wait is right is the next test.
    """
    service = 0.25
    arrivals = poisson(rho / service, requests, Lengths.fixed(1, 1), seed=3)
    served = _one_server(arrivals.scaled_to(rho / service), service)
    wanted = rho * service / (2 * (1 - rho))
    assert served.requests.queue_wait.mean() == pytest.approx(wanted, rel=0.02)
    assert served.steps.seconds.sum() / served.requests.token[-1] == pytest.approx(rho, rel=1e-3)


@pytest.mark.parametrize("rho", [0.5, 0.95])
def test_every_wait_follows_lindley(rho: float) -> None:
    arrivals = poisson(rho, 3000, Lengths.fixed(1, 1), seed=1)
    served = _one_server(arrivals, 1.0)
    np.testing.assert_allclose(
        served.requests.queue_wait, _lindley(arrivals.seconds, 1.0), atol=1e-8
    )


def test_nobody_waits_in_a_d_d_1_queue_and_everybody_when_it_is_too_slow() -> None:
    arrivals = _arrivals([float(i) for i in range(50)])
    fast = _one_server(arrivals, 0.75).requests
    np.testing.assert_allclose(fast.queue_wait, 0.0, atol=1e-12)
    np.testing.assert_allclose(fast.ttft, 0.75)
    slow = _one_server(arrivals, 1.5).requests
    np.testing.assert_allclose(slow.queue_wait, 0.5 * np.arange(50))


def test_one_request_alone() -> None:
    """TTFT is the sum of its chunks' steps, TPOT a decode step."""
    arrivals = _arrivals([2.5], inputs=250, outputs=11)
    served = run(arrivals, _scheduler(arrivals), _PerToken())
    requests = served.requests
    assert served.steps.prefills.tolist() == [100, 100, 50, *[0] * 10]
    assert requests.ttft[0] == pytest.approx(3 * 1.0 + 2.5)
    assert requests.tpot[0] == pytest.approx(1.01)
    np.testing.assert_allclose(requests.gaps(np.array([True])), 1.01)
    assert requests.latency[0] == pytest.approx(5.5 + 10 * 1.01)
    assert requests.queue_wait[0] == 0.0


@pytest.mark.parametrize(("users", "outputs", "inputs"), [(1, 5, 3), (8, 10, 4), (5, 1, 7)])
def test_a_closed_loop_has_a_closed_form(users: int, outputs: int, inputs: int) -> None:
    """With steps of t seconds a request takes ``outputs`` of them, and users never wait."""
    loop = ClosedLoop(concurrency=users, requests=40, lengths=Lengths.fixed(inputs, outputs))
    arrivals, step = loop.arrivals(seed=0), 0.125
    steady = _PerToken(fixed=step, token=0.0)
    served = run(arrivals, _scheduler(arrivals, concurrency=users), steady)
    requests = served.requests
    np.testing.assert_allclose(requests.ttft, step)
    np.testing.assert_allclose(requests.latency, outputs * step)
    if outputs > 1:
        np.testing.assert_allclose(requests.tpot, step)
    rounds = -(-40 // users)
    assert len(served.steps) == rounds * outputs
    throughput = requests.outputs.sum() / requests.token.max()
    assert throughput == pytest.approx(40 * outputs / (rounds * outputs * step))


def test_throughput_of_a_closed_loop_obeys_littles_law() -> None:
    rng = np.random.default_rng(0)
    lengths = Lengths(inputs=rng.integers(1, 200, 300), outputs=rng.integers(1, 60, 300))
    arrivals = ClosedLoop(concurrency=12, requests=600, lengths=lengths).arrivals(seed=1)
    served = run(arrivals, _scheduler(arrivals, concurrency=12), _PerToken())
    requests = served.requests
    last = requests.arrival.max()  # until then twelve are in the system
    inside = np.minimum(requests.last_token, last) - np.minimum(requests.arrival, last)
    assert inside.sum() / last == pytest.approx(12)


@given(
    gaps=st.lists(st.floats(0.0, 6.0), min_size=1, max_size=25),
    seed=st.integers(0, 1000),
    admission=st.sampled_from(["reserve", "preempt"]),
)
def test_planning_ahead_changes_nothing(gaps: list[float], seed: int, admission: str) -> None:
    """The loop that prices several steps at once ends as one that takes them one by one."""
    rng = np.random.default_rng(seed)
    arrivals = Arrivals(
        seconds=np.cumsum(gaps),
        inputs=rng.integers(1, 150, len(gaps)),
        outputs=rng.integers(1, 40, len(gaps)),
        source="test",
    )
    capacity = 1.5 * float((arrivals.inputs + arrivals.outputs).max())
    rules = _scheduler(arrivals, num_ranks=2, admission=admission, kv_capacity=capacity)
    served = run(arrivals, rules, _PerToken())
    token, steps = _one_step_at_a_time(arrivals, rules, _PerToken())
    np.testing.assert_allclose(served.requests.token, token, rtol=1e-12)
    assert len(served.steps) == steps
    assert (served.requests.queue_wait >= 0).all()
    assert served.steps.decodes.sum() + served.steps.prefills.sum() >= (
        arrivals.inputs.sum() + arrivals.outputs.sum() - len(arrivals)
    )


def _one_step_at_a_time(
    arrivals: Arrivals, rules: Scheduler, cost: _PerToken
) -> tuple[Floats, int]:
    now, state, steps = 0.0, rules.start, 0
    token = np.zeros(arrivals.outputs.sum())
    first = np.cumsum(arrivals.outputs) - arrivals.outputs
    while True:
        state = rules.submit(state, int((arrivals.seconds <= now).sum()))
        planned = rules.plan(state)
        if planned is None:
            if state.tail == len(arrivals):
                return token, steps
            now = float(arrivals.seconds[state.tail])
            continue
        step, state = planned
        now += float(cost.seconds([step])[0])
        token[first[step.emitting] + step.nth] = now
        steps += 1


@pytest.fixture
def small(
    make_model: Callable[..., ModelSpec],
    make_trace: Callable[..., RoutingTrace],
    cluster_of: Callable[[int], Cluster],
    contiguous: Callable[[ModelSpec, int], Placement],
) -> tuple[ModelSpec, RoutingTrace, Cluster, Deployment]:
    model = make_model()
    return model, make_trace(model), cluster_of(4), Deployment.of(contiguous(model, 4))


Small = tuple[ModelSpec, RoutingTrace, Cluster, Deployment]


def test_serve_says_everything(small: Small) -> None:
    rng = np.random.default_rng(0)
    lengths = Lengths(inputs=rng.integers(10, 3000, 20), outputs=rng.integers(1, 30, 20))
    arrivals = poisson(500.0, 60, lengths, seed=0)
    slo = Slo.model_validate({"ttft": "1.2 ms", "tpot": "1 s"})
    options = ServingOptions(max_batch_tokens=512, warm_up=0.1, slo=slo)
    result = serve(*small, arrivals, options, seed=1, interval=True)
    summary = result.summary()
    assert summary["requests"] == 60
    assert summary["requests_measured"] == 54
    assert summary["preemptions"] == 0
    assert summary["recomputed_tokens"] == 0
    steps, requests = result.steps, result.requests
    assert steps.prefills.sum() == arrivals.inputs.sum()
    assert steps.decodes.sum() == (arrivals.outputs - 1).sum()
    assert (np.diff(steps.start) >= steps.seconds[:-1] * (1 - 1e-9)).all()
    assert float(summary["ttft_s_p50"]) <= float(summary["ttft_s_p99"])  # type: ignore[arg-type]
    good = (requests.ttft <= 0.0012).sum()
    assert 0 < good < 60
    assert summary["goodput_requests_per_second"] == pytest.approx(good / result.makespan)
    low, high = (
        float(summary[f"output_tokens_per_second_at_{end}_prices"])  # type: ignore[arg-type]
        for end in ("low", "high")
    )
    assert high < float(summary["output_tokens_per_second"]) < low  # type: ignore[arg-type]
    assert sum(result.seconds_by_cause.values()) > 0
    assert any("synthetic" in item.source for item in result.evidence)
    assert any("with replacement" in said for said in result.statements)
    plain = result.to_dict()
    assert len(plain["requests"]["ttft_s"]) == 60
    one_token = np.flatnonzero(arrivals.outputs == 1)
    assert [plain["requests"]["tpot_s"][i] for i in one_token] == [None] * len(one_token)


def test_serve_in_a_closed_loop_is_reproducible(small: Small) -> None:
    loop = ClosedLoop(concurrency=6, requests=30, lengths=Lengths.fixed(700, 8))
    first, second = (serve(*small, loop, seed=2) for _ in range(2))
    assert first.summary() == second.summary()
    assert first.summary()["running"] == pytest.approx(6, rel=0.1)
    assert "closed loop of 6" in first.statements[0]


def test_a_small_cache_preempts_or_holds_back(small: Small) -> None:
    model = small[0]
    per_token = model.kv_bytes_per_token
    loop = ClosedLoop(concurrency=12, requests=36, lengths=Lengths.fixed(100, 60))
    options = ServingOptions(kv_capacity=f"{330 * per_token:.0f} B")  # type: ignore[arg-type]
    grown = serve(*small, loop, options).summary()
    kept = serve(*small, loop, options.model_copy(update={"admission": "reserve"})).summary()
    assert int(grown["preemptions"]) > 0  # type: ignore[call-overload]
    assert int(grown["recomputed_tokens"]) > 0  # type: ignore[call-overload]
    assert kept["preemptions"] == 0
    assert kept["waiting"] > grown["waiting"]  # type: ignore[operator]
    for summary in (grown, kept):
        assert float(summary["kv_peak_bytes_fullest_rank"]) <= 330 * per_token  # type: ignore[arg-type]


def test_the_cache_is_what_the_memory_leaves(small: Small) -> None:
    model, trace, cluster, deployment = small
    loop = ClosedLoop(concurrency=2, requests=2, lengths=Lengths.fixed(10, 2))
    room = serve(*small, loop).kv_capacity
    capacity = 0.9 * cluster.device.memory.capacity.value
    experts = 2 * 2 * model.bytes_per_expert  # two slots in two layers
    assert 0 < capacity - experts - model.bytes_outside_experts - room < 1e9  # buffers
    larger = serve(*small, loop, ServingOptions(max_batch_tokens=8192)).kv_capacity
    assert larger < room
    wide = model.model_copy(update={"expert_width": 4_000_000})
    with pytest.raises(InfeasibleError, match="leaves no room for a KV cache") as caught:
        serve(wide, trace, cluster, deployment, loop)
    assert caught.value.levers


def test_bad_input(small: Small) -> None:
    loop = ClosedLoop(concurrency=2, requests=2, lengths=Lengths.fixed(10, 2))
    with pytest.raises(InputError, match="max_running 99 is above"):
        serve(*small, loop, ServingOptions(max_batch_tokens=50, max_running=99))
    arrivals = _arrivals([0.0, 1.0])
    with pytest.raises(InputError, match="1 arrivals for a scheduler of 2"):
        run(arrivals.first(1), _scheduler(arrivals), _PerToken(fixed=1.0, token=0.0))
    huge = ClosedLoop(concurrency=1, requests=1, lengths=Lengths.fixed(10**9, 2))
    with pytest.raises(InfeasibleError, match="request 0 of 1000000000 input"):
        serve(*small, huge)
    other = replace(small[1].meta, num_experts=9)
    with pytest.raises(InputError, match="num_experts"):
        serve(small[0], replace(small[1], meta=other), small[2], small[3], loop)
