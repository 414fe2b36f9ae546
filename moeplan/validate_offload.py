"""Experts behind a cache, simulated and run for real: the same accesses, and time against time.

A decoder runs decode steps of recorded requests with its experts in pageable memory or in a file,
behind a cache of so many slots per layer that begins empty and is warmed by the steps before.
The simulator is asked about the same deployment and the same steps. What the cache did must be
equal in every access; what a step takes is judged by the rules of `moeplan.validate_verdict`.
Seconds. S steps, L MoE layers, B tokens of a step, K choices, E experts.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache as remember
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from basis import InputError, format_quantity
from hwmodels.cluster import Cluster
from moeplan.calibrate_tier import NAMES, PAGES
from moeplan.reference import import_kernels, uncollected
from moeplan.validate_verdict import NOISY, Row, Summary, Verdict, measured
from simulator.batches import compose
from simulator.deployment import Deployment, Workload
from simulator.offload import Cache, Offload
from simulator.offload_result import OffloadResult
from simulator.offload_simulate import simulate_offload
from simulator.placement import Placement
from traces.caches import Replay, replay
from traces.caches_inputs import active_experts
from traces.caches_scores import score_keys
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace

if TYPE_CHECKING:
    import torch

    from kernels_ref import Access
    from kernels_ref.expert_cache import Load

BOUND = 0.15
"""Largest |error| of a step's time that passes."""
FILES = tuple(name for name in NAMES.values() if name != PAGES)
"""Memories of a cluster that stand for a file."""
LOOKUP = "cache lookup"
"""Kernel that the simulator does not have: it is timed by itself and added for every layer."""
_RUN_WARM = 2  # last warming steps that run in full: what a step leaves in the caches is then there
Score = Literal["lru", "lfu"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class OffloadQuestion:
    """What is run and simulated."""

    model: ModelSpec
    trace: RoutingTrace
    """Requests that nothing was fitted or planned on."""
    cluster: Cluster
    """One rank of this machine, with its slow tiers (`moeplan.calibrate_tier`)."""
    folder: Path
    """Where a file of all experts is written, and removed at the end."""
    threads: int = 1
    """Of the rank."""
    batches: tuple[int, ...] = (1, 4)
    """Tokens of a step."""
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Slots of a layer over its experts."""
    scores: tuple[Score, ...] = ("lru", "lfu")
    warmup: int = 12
    """Steps that fill an empty cache; at least 2."""
    steps: int = 8
    """Steps that are timed."""
    rounds: int = 5
    """Times that each configuration runs, in shuffled order; at least 5."""
    seed: int = 0
    bound: float = BOUND


@dataclass(frozen=True, kw_only=True)
class OffloadCase:
    """One configuration."""

    home: str
    """Memory of the cluster that holds every expert."""
    slots: int
    """Of each layer."""
    score: Score
    batch: int


@dataclass(frozen=True, kw_only=True)
class OffloadRow(Row):
    """The time of a step (per output token of a request) of one configuration."""

    home: str
    slots: int
    score: str
    batch: int
    hit_rate: float
    """Of the timed steps."""
    accesses: int
    """(step, layer) accesses whose hits, misses and evictions were compared, warming ones too."""
    differences: int
    """Of these, in any of the runs, unequal to the replay, or to the simulator's residency."""
    kernels: dict[str, tuple[float, float]]
    """Seconds per step by kernel name: predicted, measured."""


@dataclass(frozen=True, kw_only=True)
class OffloadReport:
    """All configurations."""

    rows: tuple[OffloadRow, ...]
    bound: float

    @property
    def accesses(self) -> int:
        """Accesses that were compared."""
        return sum(row.accesses for row in self.rows)

    @property
    def differences(self) -> int:
        """Accesses that were not equal."""
        return sum(row.differences for row in self.rows)

    @property
    def summary(self) -> Summary:
        """All rows in one line."""
        return Summary.of("offload", self.rows)

    @property
    def passed(self) -> bool:
        """Whether no access differs and times are within the bound."""
        return self.verdict == "ok"

    @property
    def verdict(self) -> Verdict:
        """Off where an access differs, else by the median |error| of the decidable rows."""
        return "off" if self.differences else self.summary.verdict(self.bound)

    def to_dict(self) -> dict[str, Any]:
        """Return rows and verdict as plain JSON data."""
        return {
            "verdict": self.verdict,
            "bound": self.bound,
            "accesses": self.accesses,
            "differences": self.differences,
            "summary": self.summary.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class ForcedSteps:
    """The steps of a batch size, warming ones first; all that the real run is forced to do."""

    rows: list[Ints]
    """Rows of the trace, [B] each."""
    ids: Ints
    """Experts, [S, L, B, K]."""
    lengths: Ints
    """Tokens that each request holds before the step, [S, B]."""
    active: NDArray[np.bool_]
    """Experts in use, [S, L, E]."""


class Measured(NamedTuple):
    """One configuration as it ran; R rounds, S timed steps."""

    samples: Floats
    """Seconds of each step, [R, S]."""
    kernel_s: dict[str, float]
    """Seconds per step by kernel name, median over rounds."""
    logs: "list[list[Access]]"
    """Of every access of each round, warming ones too."""


Tell = Callable[[str], None]


def validate_offload(question: OffloadQuestion, tell: Tell = lambda _: None) -> OffloadReport:
    """Run every configuration for real, simulate it, and compare.

    Raises
    ------
    InputError
        Without torch; if the cluster has no slow tier or the folder is of another one; if there is
        no room for the file, or too few steps or rounds.
    """
    _check(question)
    cases = cases_of(question)
    with import_kernels().pinned(question.threads):
        ran = measure(question, cases, tell)
        lookups = {at: _lookup(question, *at) for at in sorted({(c.slots, c.batch) for c in cases})}
    tell("simulate")
    rows = tuple(
        compare(question, c, simulated(question, c), ran[c], lookups[c.slots, c.batch])
        for c in cases
    )
    return OffloadReport(rows=rows, bound=question.bound)


def cases_of(question: OffloadQuestion) -> list[OffloadCase]:
    """Return every configuration, over the slow tiers that the cluster has.

    Raises
    ------
    InputError
        If it has none.
    """
    homes = [name for name in NAMES.values() if name in question.cluster.node.memories]
    if not homes:
        raise InputError(
            f"{question.cluster.name} has none of the memories {', '.join(NAMES.values())} -- at "
            "least one slow tier -- run moeplan calibrate on this machine"
        )
    experts = question.model.num_experts
    slots = [max(1, round(share * experts)) for share in question.shares]
    return [
        OffloadCase(home=home, slots=count, score=score, batch=batch)
        for home, batch, count, score in product(homes, question.batches, slots, question.scores)
    ]


def deployment_of(model: ModelSpec, case: OffloadCase) -> Deployment:
    """Write a configuration as what the simulator deploys: one rank, which copies by itself."""
    slots = np.tile(np.arange(model.num_experts, dtype=np.int32), (model.num_moe_layers, 1))
    placement = Placement(slots=slots, num_experts=model.num_experts, num_ranks=1)
    cache = Cache(slots=case.slots, score=case.score)
    offload = Offload(home=case.home, cache=cache, copy_engine="none")
    return Deployment.of(placement).model_copy(update={"offload": offload})


def simulated(question: OffloadQuestion, case: OffloadCase) -> OffloadResult:
    """Simulate the very steps that are run."""
    q = question
    return simulate_offload(
        q.model,
        q.trace,
        q.cluster,
        deployment_of(q.model, case),
        Workload(decode_batch=case.batch),
        steps=q.steps,
        seed=q.seed,
        warmup=q.warmup,
    )


def sequence_of(question: OffloadQuestion, batch: int) -> ForcedSteps:
    """Compose the steps as the simulator does it."""
    q = question
    every = compose(
        q.trace, Workload(decode_batch=batch), 1, steps=q.warmup + q.steps, seed=q.seed
    ).batches
    rows = [step.rows for step in every]
    ids = np.stack([q.trace.experts[at].astype(np.int64).swapaxes(0, 1) for at in rows])
    return ForcedSteps(
        rows=rows,
        ids=ids,
        lengths=np.stack([step.context - 1 for step in every]),
        active=active_experts(q.trace, rows),
    )


def compare(
    question: OffloadQuestion,
    case: OffloadCase,
    result: OffloadResult,
    ran: Measured,
    lookup_s: float,
) -> OffloadRow:
    """Put what was simulated beside what ran; ``lookup_s`` is of one layer."""
    layers = question.model.num_moe_layers
    active = sequence_of(question, case.batch).active
    played = replay(active, slots=case.slots, score=case.score)
    differing = set().union(
        *(differences(log, played) for log in ran.logs), residency_differences(result, played)
    )
    per_step = result.played.busy[..., 0].mean(axis=0)
    predicted: dict[str, float] = {LOOKUP: layers * lookup_s}
    for item, seconds in zip(result.played.items, per_step.tolist(), strict=True):
        predicted[item.name] = predicted.get(item.name, 0.0) + seconds
    time, floor = measured(ran.samples)
    names = [*predicted, *(name for name in ran.kernel_s if name not in predicted)]
    return OffloadRow(
        **vars(case),
        label=f"{case.home}, {case.slots} slots, {case.score}, batch {case.batch}",
        predicted_s=float(result.step_times.mean()) + predicted[LOOKUP],
        measured_s=time,
        floor=floor,
        bound=question.bound,
        hit_rate=result.hit_rate,
        accesses=active.shape[0] * active.shape[1],
        differences=len(differing),
        kernels={n: (predicted.get(n, 0.0), ran.kernel_s.get(n, 0.0)) for n in names},
    )


def differences(log: "Sequence[Access]", played: Replay) -> set[tuple[int, int]]:
    """Return the accesses (step, layer) whose hits, misses or evictions are not the replay's.

    A replay says who is there when a layer runs: what was there or came in, and is not there the
    next time, was evicted.
    """
    after = np.concatenate([played.resident[1:], played.final[None]])
    gone = (played.resident | played.active) & ~after
    steps, layers = played.active.shape[:2]
    expected = {
        (step, layer): tuple(
            frozenset(np.flatnonzero(which[step, layer]).tolist())
            for which in (played.hit, played.fetched, gone)
        )
        for step, layer in np.ndindex(steps, layers)
    }
    found = {
        (a.step, a.layer): (
            frozenset(a.hits),
            frozenset(a.misses),
            frozenset(expert for _, expert in a.evicted),
        )
        for a in log
    }
    either = expected.keys() | found.keys()
    return {access for access in either if expected.get(access) != found.get(access)}


def residency_differences(result: OffloadResult, played: Replay) -> set[tuple[int, int]]:
    """Return the timed accesses where the simulator held or used other experts than the replay."""
    held = result.decisions.residency.held[:, :, 0]
    used = result.decisions.tokens[:, :, 0] > 0
    first = len(played.active) - len(held)
    other = (held != played.resident[first:]) | (used != played.active[first:])
    return {(first + int(s), int(layer)) for s, layer in np.argwhere(other.any(axis=-1))}


def measure(
    question: OffloadQuestion, cases: Sequence[OffloadCase], tell: Tell = lambda _: None
) -> dict[OffloadCase, Measured]:
    """Run every configuration once in each round, in another random order each round.

    A run begins with an empty cache and the same warming steps; only then is it timed.
    """
    random = np.random.default_rng(question.seed)
    runs: dict[OffloadCase, list[Any]] = {case: [] for case in cases}
    with ExitStack() as opened:
        tell("write the experts")
        bench = _Bench(question, {case.home for case in cases}, opened)
        opened.enter_context(uncollected())
        for number in range(question.rounds):
            tell(f"offload: round {number + 1} of {question.rounds}, {len(cases)} configurations")
            for place in random.permutation(len(cases)).tolist():
                runs[cases[place]].append(bench.run(cases[place]))
    return {case: _collected(each) for case, each in runs.items()}


def _collected(runs: "list[tuple[list[Any], list[Access]]]") -> Measured:
    """Bring a configuration's rounds together."""
    names = dict.fromkeys(n for seconds, _ in runs for step in seconds for n in step.kernel_s)
    means = {
        name: [np.mean([step.kernel_s.get(name, 0.0) for step in each]) for each, _ in runs]
        for name in names
    }
    return Measured(
        samples=np.array([[step.total_s for step in each] for each, _ in runs]),
        kernel_s={name: float(np.median(each)) for name, each in means.items()},
        logs=[log for _, log in runs],
    )


class _Bench:
    """What all runs share: weights, homes, and the steps of each batch size."""

    def __init__(self, question: OffloadQuestion, homes: set[str], opened: ExitStack) -> None:
        from kernels_ref import MemoryHome, Weights

        model = question.model
        self._question, self._dtype = question, _dtype(model)
        self._weights: Weights = Weights.random(model, dtype=self._dtype, seed=question.seed)
        self._sequence = remember(lambda batch: sequence_of(question, batch))
        self._homes: dict[str, Load] = {}
        if PAGES in homes:
            self._homes[PAGES] = MemoryHome(model, dtype=self._dtype, seed=question.seed)
        for name in homes - {PAGES}:
            self._homes[name] = _file_home(question, name, self._dtype, opened)

    def run(self, case: OffloadCase) -> "tuple[list[Any], list[Access]]":
        """Warm an empty cache and time the steps; seconds of each, and the log."""
        from kernels_ref import CachedExperts, Decoder, ExpertCache, recorded_policy

        model, steps = self._question.model, self._sequence(case.batch)
        keys = score_keys(case.score, steps.active)
        cache = ExpertCache(
            model,
            slots=case.slots,
            policy=recorded_policy(keys, model.num_moe_layers),
            load=self._homes[case.home],
            dtype=self._dtype,
        )
        decoder = Decoder(
            model,
            self._weights,
            CachedExperts(model, cache),
            requests=case.batch,
            context=int(steps.lengths.max()) + 1,
            laps=True,
        )
        first = self._question.warmup - _RUN_WARM
        for used_LE in steps.active[:first]:
            for layer, used_E in enumerate(used_LE):
                cache.pass_by(layer, np.flatnonzero(used_E).tolist())
        tokens = np.random.default_rng(self._question.seed).integers(
            model.vocab_size, size=(len(steps.ids), case.batch)
        )
        seconds = []
        for step in range(first, len(steps.ids)):
            _hold(decoder, steps.lengths[step].tolist())
            decoder.decode(tokens[step], range(case.batch), steps.ids[step])
            seconds.append(decoder.clock.seconds())
        return seconds[_RUN_WARM:], cache.take_log()


def _hold(decoder: Any, lengths: list[int]) -> None:
    """Let requests hold so many tokens, drawn ones where they held fewer."""
    if any(new > old for new, old in zip(lengths, decoder.lengths, strict=True)):
        decoder.warm_cache(lengths)
    else:
        decoder.rewind(lengths)


def _file_home(
    question: OffloadQuestion, name: str, dtype: "torch.dtype", opened: ExitStack
) -> "Load":
    """Write all experts to a file, checking that there is room and that it is of this tier."""
    from kernels_ref import ExpertFile, FileHome, expert_records, write_expert_file

    model, folder = question.model, question.folder
    size = model.num_moe_layers * model.num_experts * model.expert_matrix_params * dtype.itemsize
    if (room := shutil.disk_usage(folder).free) < 1.1 * size:
        raise InputError(
            f"{folder}: {format_quantity(room, 'B')} free -- the experts take "
            f"{format_quantity(size, 'B')} -- make room, or name another folder"
        )
    path = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=folder))) / "experts"
    write_expert_file(path, expert_records(model, dtype, question.seed))
    file = opened.enter_context(ExpertFile(path))
    if NAMES[file.tier] != name:
        raise InputError(
            f"{folder}: its files are read from tier {NAMES[file.tier]}, the cluster has {name} -- "
            "the same tier -- name the folder that was calibrated, or calibrate again"
        )
    return FileHome(model, file)


def _dtype(model: ModelSpec) -> "torch.dtype":
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16}
    formats = {model.weight_dtype, model.expert_dtype, model.activation_dtype, model.kv_dtype}
    if len(formats) > 1 or not formats <= known.keys():
        raise InputError(
            f"{model.name} has weights, experts, activations and cache in "
            f"{', '.join(sorted(formats))} -- all of them fp32 or all bf16 -- change the geometry"
        )
    return known[model.weight_dtype]


def _lookup(question: OffloadQuestion, slots: int, batch: int) -> float:
    """Seconds of the cache's lookup in a layer, measured on choices of its own."""
    from kernels_ref.tier_sweep import time_lookup

    return time_lookup(question.model, slots=slots, batch=batch, seed=question.seed).seconds


def _check(question: OffloadQuestion) -> None:
    q = question
    for name, value, least in (
        ("warmup", q.warmup, _RUN_WARM),
        ("steps", q.steps, 1),
        ("rounds", q.rounds, 5),
    ):
        if value < least:
            raise InputError(f"offload: {name} {value} -- at least {least} -- raise it")
    if q.cluster.num_ranks != 1:
        raise InputError(
            f"{q.cluster.name}: {q.cluster.num_ranks} ranks -- experts behind a cache run on one "
            "-- set gpus: 1"
        )


def show_offload(screen: Console, report: OffloadReport) -> None:
    """Print the rows, what the caches did, and the verdict."""
    table = Table("home", "batch", "slots", "policy", "hits", "predicted", "measured", "error",
                  "floor", "verdict", title="Experts behind a cache, seconds per step")  # fmt: skip
    for row in report.rows:
        times = (format_quantity(t, "s") for t in (row.predicted_s, row.measured_s))
        table.add_row(
            row.home, str(row.batch), str(row.slots), row.score, f"{row.hit_rate:.0%}", *times,
            f"{row.error:+.1%}", f"{row.floor:.1%}", row.verdict,
        )  # fmt: skip
    screen.print(table)
    total = report.summary
    screen.print(
        f"Cache behaviour, access by access: {report.accesses} accesses (hits, misses, evictions) "
        f"compared, {report.differences} differ."
    )
    screen.print(
        f"Time per step: median |error| {total.median:.1%}, worst {total.worst:.1%} of "
        f"{total.decidable} decidable rows (bound {report.bound:.0%}); {total.undecidable} "
        f"undecidable (floor above {NOISY:.0%}): {report.verdict}"
    )
