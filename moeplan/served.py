"""Predict measured serving runs: mean TTFT, mean TPOT and request latency of a closed loop.

Kernel prices come from the cluster, the schedule from the request level, the engine's overhead
from a fit on the runs of other models: each cell (model family, system, engine) is predicted with
its own runs held out of every fit of end-to-end data.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from basis.evidence import Evidence
from hwmodels.silicon.served_rows import ServedRow
from moeplan.served_loop import Schedule, play
from moeplan.served_models import (
    Clusters,
    Policy,
    Setup,
    cache_of,
    jitter_of,
    kept_in,
    model_of,
    policy_of,
    prices_of,
)
from moeplan.served_overhead import Overhead, Sample, Sums, fit_overhead
from moeplan.served_routing import in_order
from moeplan.served_steps import StepTables
from simulator.batches import StepBatch
from simulator.memory import memory_need
from simulator.serving_memory import sequence_bytes

Ints = NDArray[np.int64]
ROUNDS = 10
"""Requests of a run per user, as in the recipes."""
ACCEPTED = 0.8
"""Chance that a drafted token is accepted, if those before it were: 1.8 tokens a step with one
draft (DeepSeek-V3 report, section 5.4.3); assumed for later drafts too."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """What a run's prediction is made of, before the engine's overhead."""

    row: ServedRow
    sums: Sums
    parts: tuple[float, ...]
    """Kernel seconds of its mean TPOT by `served_steps.PARTS`."""
    evidence: Evidence
    """The weakest of what its kernel prices rest on."""
    remark: str
    """What stands in for what; may be empty."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run with its predicted times, s."""

    row: ServedRow
    ttft: float
    tpot: float
    own_system: bool
    """Whether the overhead was fitted on runs of this engine on this system."""

    @property
    def latency(self) -> float:
        """Time of a whole request, s: TTFT + TPOT (outputs - 1)."""
        return self.ttft + self.tpot * (self.row.outputs - 1)


def profiles(rows: Sequence[ServedRow], clusters: Clusters | None = None) -> list[Profile]:
    """Play every run's closed loop with the kernel prices of its cluster.

    Runs of one setup share their step tables, repeated runs everything. Without ``clusters`` the
    catalog's, with an engine's fits where there are some.
    """
    clusters = clusters or prices_of()
    by_setup: dict[Setup, list[ServedRow]] = defaultdict(list)
    for row in rows:
        by_setup[Setup.of(row)].append(row)
    made: dict[tuple[object, ...], Profile] = {}
    for setup, mine in by_setup.items():
        bench = _Bench(setup, mine, clusters)
        for row in mine:
            if _key(row) not in made:
                made[_key(row)] = bench.profile(row)
    return [replace(made[_key(row)], row=row) for row in rows]


def leave_one_cell_out(
    found: Sequence[Profile], distrusted: Collection[str] = ()
) -> tuple[list[Prediction], dict[str, Overhead]]:
    """Predict each cell with the overhead fitted on all other cells of its engine.

    Parameters
    ----------
    found : sequence of Profile
    distrusted : collection of str
        Names of runs that no fit sees; they are predicted all the same.

    Returns
    -------
    predictions : list of Prediction
        In the order given.
    overheads : dict
        By cell: what its prediction used.
    """
    fitted = [p for p in found if p.row.name not in distrusted]
    used = {cell: overhead_without(fitted, cell) for cell in sorted({p.row.cell for p in found})}
    own = {cell: _has_sibling(found, cell) for cell in used}
    predictions = []
    for p in found:
        ttft, tpot = p.sums.times(used[p.row.cell])
        predictions.append(Prediction(row=p.row, ttft=ttft, tpot=tpot, own_system=own[p.row.cell]))
    return predictions, used


def overhead_without(found: Iterable[Profile], cell: str) -> Overhead:
    """Fit the overhead of a cell's engine and system on every other cell of the engine."""
    _, system, engine = cell.split("|")
    samples = [
        Sample(
            sums=p.sums,
            ttft=p.row.ttft,
            tpot=p.row.tpot,
            cell=p.row.cell,
            near=p.row.system == system,
        )
        for p in found
        if p.row.engine == engine and p.row.cell != cell
    ]
    return fit_overhead(samples) if samples else Overhead()


def lengths_of(row: ServedRow, seed: int = 0) -> tuple[Ints, Ints]:
    """Draw the prompt and output lengths of a run's requests."""
    rng, count = np.random.default_rng(seed), ROUNDS * row.concurrency

    def draw(stated: int) -> Ints:
        return rng.integers(max(int(stated * jitter_of(row)), 1), stated + 1, count)

    return draw(row.inputs), draw(row.outputs)


def tokens_per_step(drafts: int) -> float:
    """Return the tokens that a request gets in a step, on average."""
    return float(sum(ACCEPTED**n for n in range(drafts + 1)))


class _Bench:
    """The step tables and cache of one setup."""

    def __init__(self, setup: Setup, rows: Sequence[ServedRow], clusters: Clusters) -> None:
        model = model_of(setup.family, setup.precision, setup.system)
        cluster, self.remark = clusters(setup, rows[0].ranks.gpus)
        budget = max(policy_of(row).budget for row in rows)
        self.layers = model.num_layers
        self.tables = StepTables(
            model,
            cluster,
            setup.parallelism,
            decodes=max(row.concurrency * (1 + row.drafts) for row in rows),
            prompts=budget,
            context=max(row.inputs + row.outputs for row in rows),
            formats=kept_in(setup.family, setup.precision),
        )
        deployment = in_order(model, setup.parallelism)
        layout = deployment.layout_for(model, cluster)
        self.bytes = sequence_bytes(model, layout)
        home = np.repeat(np.arange(layout.dp), budget)
        step = StepBatch(  # the largest: its buffers count
            rows=0 * home, context=0 * home + 1, home=home, last=np.arange(len(home)) % budget < 256
        )
        placement = deployment.placement_for(model, cluster)
        need = memory_need(model, placement, (step,), layout)
        fixed = float((need.total - need.kv_cache).max())
        self.room = cache_of(setup.engine, cluster.device.memory.capacity.value, fixed)

    def profile(self, row: ServedRow) -> Profile:
        schedule = self._schedule(row, policy_of(row))
        seconds = self.tables.seconds(schedule.steps, row.drafts)
        seconds = seconds * (1 + row.drafts / self.layers)  # each draft takes a layer of its own
        of_parts = [Sums.of(schedule, part, 0.0) for part in np.ascontiguousarray(seconds.T)]
        return Profile(
            row=row,
            sums=Sums.of(schedule, seconds.sum(axis=1), self.tables.kernels),
            parts=tuple(float(s.decode[1] + s.prompts[1]) for s in of_parts),
            evidence=self.tables.evidence,
            remark=self.remark,
        )

    def _schedule(self, row: ServedRow, policy: Policy) -> Schedule:
        inputs, outputs = lengths_of(row)
        return play(
            inputs,
            outputs,
            row.concurrency,
            policy,
            ranks=row.ranks.dp,
            reserve=lambda tokens: float(self.bytes(np.array([tokens]))[0]),
            capacity=self.room,
            per_step=tokens_per_step(row.drafts),
        )


def _key(row: ServedRow) -> tuple[object, ...]:
    return (Setup.of(row), row.inputs, row.outputs, row.concurrency, row.drafts)


def _has_sibling(found: Iterable[Profile], cell: str) -> bool:
    """Whether another cell has runs of this engine on this system."""
    _, system, engine = cell.split("|")
    return any(
        (p.row.system, p.row.engine) == (system, engine) and p.row.cell != cell for p in found
    )
