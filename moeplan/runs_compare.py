"""How far a prediction is from what others measured: a run's load, simulated under a scenario.

Requests are served by `simulator.serve`, decode steps played by `simulator.simulate`; the workload
of the scenario gives way to that of the run, and the routing is of the later half of its trace.
Errors are predicted / measured - 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from basis.errors import InfeasibleError, InputError
from moeplan.asked import deployment_of, facts_of, steps_of
from moeplan.runs import MeasuredRun
from moeplan.scenario import Scenario
from moeplan.workload import ScenarioWorkload
from planner.layouts_question import Sweep, at_lengths
from simulator.deployment import Deployment
from simulator.offload_simulate import simulate_offload
from simulator.serving import serve
from simulator.serving_metrics import ServingResult
from simulator.simulate import simulate
from traces.splits import split_requests

_MAX_TOKENS = 2**26  # generated in one simulated run: half a GiB of times
_MAX_BATCH = 2**16
_REQUESTS, _TURNS = 300, 4  # requests where a file does not say: at least, and for each user
_NAMES = {
    "ttft": "ttft_s",
    "tpot": "tpot_s",
    "itl": "itl_s",
    "e2e": "latency_s",
}
_Figures = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric that was measured and predicted."""

    metric: str
    """Such as ttft_mean, step, output_tokens_per_s."""
    unit: str
    """``s`` or ``tokens/s``."""
    measured: float
    predicted: float
    spread: float | None
    """Standard deviation of the measurement over repeats, relative; None if not repeated."""

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One measured run beside its prediction."""

    run: MeasuredRun
    rows: tuple[Compared, ...]
    """Metrics that both have; empty if the run could not be predicted."""
    remarks: tuple[str, ...]
    """What was left out or could not be compared, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON data."""
        return {
            "run": self.run.model_dump(mode="json"),
            "rows": [vars(row) | {"error": row.error} for row in self.rows],
            "remarks": list(self.remarks),
        }


def compare(
    runs: Sequence[MeasuredRun], scenario: Scenario, deployment: str = "contiguous"
) -> list[Comparison]:
    """Predict measured runs under a scenario.

    Parameters
    ----------
    runs : sequence of MeasuredRun
        From `moeplan.runs_read.read_runs`.
    scenario : Scenario
        Model, trace, cluster and how the server schedules; its workload is not used, but for the
        baseline deployments' sake.
    deployment : str
        As ``--deployment`` of ``moeplan simulate``.

    Returns
    -------
    list of Comparison
        One for each run, in order.

    Raises
    ------
    InputError
        If the deployment is none. What concerns one run alone is a remark on it.
    """
    seen = split_requests(scenario.trace, "early_late")[0]
    facts = facts_of(scenario, step=scenario.file.workload.step)
    chosen = deployment_of(deployment, facts, seen)
    return [_compare(run, scenario, deployment, chosen) for run in runs]


def _compare(run: MeasuredRun, scenario: Scenario, name: str, chosen: Deployment) -> Comparison:
    remarks = [*run.remarks, *_other_model(run, scenario)]
    reason, predicted = run.incomparable or _out_of_reach(run), _Figures()
    if reason is None:
        try:
            if run.batch_size is not None:
                predicted = _steps(run, scenario, name, chosen)
            else:
                predicted = _requests(run, scenario, chosen)
        except (InputError, InfeasibleError) as error:
            reason = str(error)
    if reason is not None:
        return Comparison(run=run, rows=(), remarks=(*remarks, f"not predicted: {reason}"))
    rows = []
    for metric, measured in run.metrics.items():
        value = predicted.get(metric)
        if value is None:
            remarks.append(f"{metric} was measured, but is not predicted for such a run")
            continue
        unit = "tokens/s" if metric.endswith("_per_s") else "s"
        rows.append(
            Compared(
                metric=metric, unit=unit, measured=measured, predicted=value, spread=run.spread
            )
        )
    return Comparison(run=run, rows=tuple(rows), remarks=(*remarks, *_filled_in(run)))


def _steps(run: MeasuredRun, scenario: Scenario, name: str, chosen: Deployment) -> _Figures:
    """Play decode steps of the run's batch at its contexts; without them, at the trace's."""
    workload = ScenarioWorkload(decode_batch=run.batch_size)
    asked = steps_of(_with(scenario, workload), name)
    assert asked is not None  # the workload is a step
    part = asked.part
    if run.input_tokens is not None:
        after, count = max(1, round(run.input_tokens)), max(1, round(run.output_tokens or 1))
        part = at_lengths(part, Sweep(input_tokens=after, output_tokens=count))
    facts = (scenario.model, part, scenario.cluster, chosen, asked.workload)
    if chosen.offload is None:
        played = simulate(*facts, steps=asked.count, seed=asked.seed)
    else:
        played = simulate_offload(*facts, steps=asked.count, seed=asked.seed, warmup=asked.warmup)
    return {"step": played.step_time_s["mean"]}


def _requests(run: MeasuredRun, scenario: Scenario, chosen: Deployment) -> _Figures:
    """Serve requests of the run's mean lengths, all that it had, none left out as a warm-up."""
    requests = _requests_of(run)
    lengths: dict[str, Any] = {
        "input_tokens": max(1, run.cached_tokens + round(run.input_tokens or 0)),
        "output_tokens": max(1, round(run.output_tokens or 0)),
        "requests": requests,
    }
    if run.request_rate is not None:
        lengths["rate"] = run.request_rate
    else:
        lengths["concurrency"] = min(run.concurrency or requests, requests)
    server = scenario.file.serving.model_copy(update={"warm_up": 0.0})
    if run.chunk_tokens is not None:  # a lone prompt, in steps of so many tokens
        server = server.model_copy(update={"max_batch_tokens": run.chunk_tokens, "max_running": 1})
    seed = scenario.file.plan.seed
    result = serve(
        scenario.model,
        split_requests(scenario.trace, "early_late")[1],
        scenario.cluster,
        chosen,
        ScenarioWorkload(**lengths).source(scenario.folder, seed),
        server,
        seed=seed,
    )
    return _figures(result, _head_start(result, run.cached_tokens))


def _figures(result: ServingResult, head_start: float) -> _Figures:
    """Return what was served under our names; the head start comes off what it is part of."""
    found: dict[str, Any] = result.summary()
    figures = _Figures()
    for ours, theirs in _NAMES.items():
        less = head_start if ours in ("ttft", "e2e") else 0.0
        for statistic, end in (("mean", ""), ("median", "_p50"), ("p99", "_p99")):
            value = found[f"{theirs}{end}"]
            figures[f"{ours}_{statistic}"] = None if value is None else value - less
    figures["output_tokens_per_s"] = found["output_tokens_per_second"]
    figures["total_tokens_per_s"] = found["total_tokens_per_second"]
    return figures


def _head_start(result: ServingResult, cached: int) -> float:
    """Return the seconds in which the first ``cached`` tokens of a lone prompt are computed.

    A step that is partly theirs counts in proportion.
    """
    log = result.steps
    tokens, seconds = np.cumsum(log.prefills), np.cumsum(log.seconds)
    return float(np.interp(cached, [0, *tokens], [0.0, *seconds]))


def _requests_of(run: MeasuredRun) -> int:
    """Return the requests of the run; where it does not say, so many that its middle is long."""
    return run.requests or max(_REQUESTS, _TURNS * (run.concurrency or 1))


def _with(scenario: Scenario, workload: ScenarioWorkload) -> Scenario:
    return replace(scenario, file=scenario.file.model_copy(update={"workload": workload}))


def _out_of_reach(run: MeasuredRun) -> str | None:
    """Say why a run is not simulated: it does not say enough, or it is too large."""
    if run.batch_size is not None:
        if run.batch_size > _MAX_BATCH:
            return f"batch_size {run.batch_size} -- at most {_MAX_BATCH} are simulated"
        return None
    if run.concurrency is None and run.request_rate is None:
        return "neither concurrency nor request rate is known -- a load is needed"
    if run.input_tokens is None or run.output_tokens is None:
        return "lengths of prompts and answers are not known -- both are needed"
    tokens = _requests_of(run) * (run.cached_tokens + run.input_tokens + run.output_tokens)
    if tokens > _MAX_TOKENS:
        return f"{tokens:.3g} tokens in all -- at most {_MAX_TOKENS} are simulated"
    return None


def _other_model(run: MeasuredRun, scenario: Scenario) -> list[str]:
    """Remark on a run whose model has another name; whether it is another one, the user knows."""
    ours, theirs = _plain(scenario.model.name), _plain((run.model or "").rsplit("/", 1)[-1])
    if not theirs or ours in theirs or theirs in ours:
        return []
    return [
        f"the file names the model {run.model!r}, the scenario {scenario.model.name!r}: make sure "
        "that they are the same"
    ]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _filled_in(run: MeasuredRun) -> list[str]:
    """Remark on what the run does not say, or says only of the mean."""
    if run.batch_size is not None:
        missing = run.input_tokens is None
        return ["no input_tokens: contexts are those of the trace"] if missing else []
    remarks = []
    if run.requests is None:
        remarks.append(f"requests not stated: simulated {_requests_of(run)}")
    lengths = (run.input_tokens or 0.0, run.output_tokens or 0.0)
    if all(length.is_integer() for length in lengths):
        return remarks
    shown = [f"{length:.1f}" for length in lengths]
    return [
        *remarks,
        f"lengths varied (mean {shown[0]} input and {shown[1]} output tokens): every request was "
        "simulated with the mean, which narrows the tails",
    ]
