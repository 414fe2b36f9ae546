"""What may become an offload plan: residencies under several site rules, caches, baselines.

Every candidate is a function from a number of slots (experts) to a deployment's tiers, so that it
can give back what landing buffers take; simulated on the part planned on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from basis.errors import InfeasibleError
from planner.offload_baselines import baseline_offloads, most_frequent, rows_of
from planner.offload_grain import layer_grain
from planner.offload_layer import Bools, Rule
from planner.offload_residency import Residency
from planner.offload_sample import OffloadFacts, Sample
from planner.offload_search import Search
from planner.scoring import Score
from simulator.deployment import Deployment
from simulator.offload import Cache, Offload, Site, SiteChoice
from simulator.offload_memory import EXPERT_TERMS
from traces.counts import expert_counts
from traces.routing_trace import RoutingTrace

_SHARES = (0.1, 0.25, 0.5)  # of the slots as a cache beside the split rule
_FETCHED_SHARES = (0.5, 1.0)  # and where every miss is fetched
_ROUNDS = 4  # of giving back slots for landing buffers
Maker = Callable[[int], Offload]
"""From a number of slots to a deployment's tiers."""
CacheScore = Literal["lru", "weight_ema"]
Fitted = tuple[Deployment, Score]
"""A deployment and its score on the part planned on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Menu:
    """Candidates and baselines for one part of a trace."""

    facts: OffloadFacts
    seen: RoutingTrace
    slots: int
    sample: Sample
    solved: dict[Rule, Residency]

    def fit_all(self) -> tuple[dict[str, Fitted], dict[str, InfeasibleError]]:
        """Simulate every candidate; those that some memory does not hold come with the reason."""
        fitted, refused = {}, {}
        for name, make in self.candidates().items():
            try:
                fitted[name] = self.fit(make)
            except InfeasibleError as error:
                refused[name] = error
        return fitted, refused

    def fit(self, make: Maker) -> Fitted:
        """Give back slots until residents, cache and landing buffers fit on the part planned on.

        Raises
        ------
        InfeasibleError
            If another memory does not hold what it must.
        """
        room = self.slots
        for _ in range(_ROUNDS):
            deployment = self.facts.deploy(make(room))
            score = self.facts.score(self.seen, deployment)
            over = _most_experts(score) - self.slots
            if over <= 0 or not room:
                break
            room = max(room - over, 0)
        return deployment, score

    def candidates(self) -> dict[str, Maker]:
        """Everything that may become the plan, baselines included."""
        return self._static() | self._caches() | self._plain()

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines."""
        return tuple(self._plain())

    def _plain(self) -> dict[str, Maker]:
        def maker(name: str) -> Maker:
            return lambda room: self._baselines(room).get(name) or full[name]

        full = self._baselines(self.slots)

        return {name: maker(name) for name in full}

    def _baselines(self, slots: int) -> dict[str, Offload]:
        home, processor = self.facts.options.home, self.facts.processor
        return baseline_offloads(self._counts(), slots, home, processor)

    def _counts(self) -> NDArray[np.int64]:
        return expert_counts(self.seen.experts, self.facts.model.num_experts)

    def _static(self) -> dict[str, Maker]:
        found: dict[str, Maker] = {}
        for rule, residency in self.solved.items():
            found[f"ilp_{rule}"] = self._of(residency.search, "planned")
            if self.facts.processor is not None:
                found[f"ilp_{rule}+split"] = self._of(residency.search, "split")
                found[f"ilp_{rule}+list"] = self._of(residency.search, "list")
        if self.facts.processor is not None:
            counts = self._counts()
            found["most_frequent+split"] = lambda room: self._offload(
                most_frequent(counts, room), None, "split"
            )
        return found

    def _of(self, search: Search, site: Literal["planned", "split", "list"]) -> Maker:
        def make(room: int) -> Offload:
            chosen = search.at(room)
            keep = np.array([c.keep for c in chosen])
            return self._offload(keep, np.array([c.fetch for c in chosen]), site)

        return make

    def _offload(
        self, keep: Bools, fetch: Bools | None, site: Literal["planned", "split", "list"]
    ) -> Offload:
        processor = self.facts.processor
        if site != "planned":
            where = Site(name=site, processor=processor)
        elif fetch is None or not fetch.any() or processor is None:
            where = Site(name="fetch" if processor is None else "home", processor=processor)
        else:
            where = Site(name="planned", processor=processor, table=_table(keep, fetch))
        return Offload(home=self.facts.options.home, resident=rows_of(keep), site=where)

    def _caches(self) -> dict[str, Maker]:
        """Part of the slots as a cache of each layer, the others for the most frequent experts.

        Misses are fetched, or, where a processor stands at home, as the split rule says.
        """
        if not self.facts.model.num_moe_layers <= self.slots < self.sample.counts[0].size:
            return {}  # less than a slot for each layer, or nothing that could be missed
        score: CacheScore = "lru" if self.seen.weights is None else "weight_ema"
        found = {f"{score}_{s:.0%}": self._cached(s, score, "fetch") for s in _FETCHED_SHARES}
        if self.facts.processor is not None:
            split = {f"{score}_{s:.0%}+split": self._cached(s, score, "split") for s in _SHARES}
            found |= split
        return found

    def _cached(self, share: float, score: CacheScore, site: Literal["fetch", "split"]) -> Maker:
        counts, layers = self._counts(), self.facts.model.num_moe_layers
        processor = self.facts.processor if site == "split" else None

        def make(room: int) -> Offload:
            each = max(int(share * room) // layers, 1)
            return Offload(
                home=self.facts.options.home,
                resident=rows_of(most_frequent(counts, max(room - each * layers, 0))),
                cache=Cache(slots=each, score=score),
                site=Site(name=site, processor=processor),
            )

        return make

    def engine(self, fitted: dict[str, Fitted]) -> dict[str, Deployment]:
        """Return what engines can load: the better of two residencies, and whole layers."""
        known = [name for name in ("ilp_home", "most_frequent") if name in fitted]
        if "home" not in self.solved or not known:
            return {}
        best = min(known, key=lambda n: float(fitted[n][1].step_times.mean()))
        grain, experts = layer_grain(self.sample.layers, self.slots), self.facts.model.num_experts

        def whole(layers: Bools) -> Deployment:
            keep = np.repeat(layers[:, None], experts, axis=1)
            return self.facts.deploy(self._offload(keep, None, "planned"))

        return {
            "experts": fitted[best][0],
            "layers": whole(grain.best),
            "last_layers": whole(grain.last),
        }


def _table(keep: Bools, fetch: Bools) -> tuple[tuple[SiteChoice, ...], ...]:
    names: list[SiteChoice] = ["side", "fetch", "fast"]
    codes = np.where(keep, 2, fetch.astype(int))
    return tuple(tuple(names[code] for code in row) for row in codes)


def _most_experts(score: Score) -> int:
    """Most experts that lie in the fast memory at a time in any of the simulations."""
    most = 0.0
    for result in score.results:
        fast = next(iter(result.tiers.values())).terms  # type: ignore[attr-defined]
        size = sum(fast.get(term, 0.0) for term in EXPERT_TERMS)
        most = max(most, size / result.expert_bytes)  # type: ignore[attr-defined]
    return round(most)
