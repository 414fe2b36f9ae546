"""Step times of a deployment as tables: what a step of so many tokens takes.

The kernels of a step fall into groups that depend on one or two numbers each: tokens of a rank,
tokens of all ranks, decode tokens and their context, prompt tokens and their pairs, sequences.
Each group is lowered and priced by the simulator on a grid and interpolated linearly. Routing is
drawn with the skew of measured loads; a few layers of each kind stand for all of it. Seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from basis.evidence import Evidence, weakest
from hwmodels.cluster import Cluster
from hwmodels.cost import price
from hwmodels.ops import AttentionDecode, AttentionPrefill, Gemm, Op, Stage
from moeplan.served_routing import DRAWN, drawn_routing, in_order, shortened
from simulator.attention import attention
from simulator.batches import Composition, StepBatch
from simulator.loads import StepLoads, count_loads
from simulator.lowering import lower
from simulator.parallelism import Parallelism
from simulator.work import Rows, Work
from traces.model_spec import ModelSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PARTS = ("dense", "attention", "experts", "communication")
"""What the seconds of a step are split into: GEMMs and elementwise work, scores, experts with
their routing, collectives."""
_BY_TOTAL = (Stage.ROUTER, Stage.EXPERTS, Stage.DISPATCH, Stage.COMBINE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
    """Steps by what they hold on each of D attention data-parallel ranks, all [N, D]."""

    decodes: Floats
    """Decode tokens."""
    context: Floats
    """Keys that they attend to, summed."""
    prompts: Floats
    """Prompt tokens."""
    pairs: Floats
    """(query, key) pairs of the chunks."""
    ends: Floats
    """Prompts that end with the step."""


class StepTables:
    """Step times of one model on one cluster in one layout.

    Parameters
    ----------
    model, cluster, parallelism : ModelSpec, Cluster, Parallelism
        What runs where; experts lie in order, without replicas.
    decodes, prompts : int
        Decode and prompt tokens of a step on an attention rank, at most.
    context : int
        Context of a sequence, at most.
    formats : dict, optional
        Weight formats of GEMMs by the name of their work, where they differ from the model's.
    seed : int
        Of the drawn routing.
    """

    def __init__(
        self,
        model: ModelSpec,
        cluster: Cluster,
        parallelism: Parallelism,
        *,
        decodes: int,
        prompts: int,
        context: int,
        formats: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.times = shortened(model)
        self._formats = dict(formats or {})
        self.cluster = cluster
        self.deployment = in_order(self.model, parallelism)
        self.layout = self.deployment.layout_for(self.model, cluster)
        self.evidence: Evidence = "measured"
        self._trace = drawn_routing(self.model, seed)
        self._tokens = grid(decodes + prompts)
        self._total = grid((decodes + prompts) * self.layout.dp)
        self._decodes, self._prompts = grid(decodes), grid(prompts)
        self._contexts = grid(context)
        self._price_all()

    def seconds(self, steps: Steps, drafts: int = 0) -> Floats:
        """Return the seconds of each step by part, [N, parts].

        Ranks differ in their tokens: the slowest counts up to the experts, which all share. With
        drafts every decode token brings so many more, which share its reads of the cache.
        """
        decodes = steps.decodes * (1 + drafts)
        tokens = decodes + steps.prompts
        each = _at(self._tokens, self._of_rank, tokens)
        each += _at(self._tokens, self._head, decodes + steps.ends)
        each += _at(self._decodes, self._absorb, decodes)
        each += _at(self._prompts, self._expand, steps.prompts)
        each += self._scores_at(self._decodes, self._decode, steps.decodes, steps.context)
        each += self._scores_at(self._prompts, self._prefill, steps.prompts, steps.pairs)
        slowest = each.sum(axis=-1).argmax(axis=1)
        of_rank = np.take_along_axis(each, slowest[:, None, None], axis=1)[:, 0]
        return np.asarray(of_rank + _at(self._total, self._of_all, tokens.sum(axis=1)))

    def _scores_at(self, points: Ints, table: Floats, tokens: Floats, keys: Floats) -> Floats:
        """Look scores up by tokens and keys per token; linear in both."""
        mean = np.divide(keys, tokens, out=np.ones_like(keys), where=tokens > 0)
        high = np.clip(np.searchsorted(self._contexts, mean), 1, len(self._contexts) - 1)
        below, above = self._contexts[high - 1], self._contexts[high]
        share = np.clip((mean - below) / (above - below), 0, 1)[..., None]
        near, far = (_at(points, table, tokens, column) for column in (high - 1, high))
        return near * (1 - share) + far * share

    def _price_all(self) -> None:
        layout, n = self.layout, self._tokens
        plain = self._loads(n * layout.dp)
        works = lower(self.model, plain)
        scores = [w for w in works if isinstance(w.op, AttentionDecode)]
        decode = {w.name for w in attention(Rows(self.model, plain))}
        expanded = attention(Rows(self.model, replace(plain, decode=False)))
        both = {w.name for w in expanded} & decode
        head = [w for w in works if w.stage == Stage.HEAD or w.name == "logits all-gather"]
        aside = [*scores, *head]
        rank = [w for w in works if w.stage not in _BY_TOTAL and w not in aside]
        self._of_rank = self._seconds([w for w in rank if w.name in both or w.name not in decode])
        self._head = self._seconds(head)
        self._absorb = self._rows(
            self._decodes, [w.name for w in rank if w.name in decode - both], decode=True
        )
        self._expand = self._rows(
            self._prompts, [w.name for w in expanded if w.name not in decode], decode=False
        )
        everyone = lower(self.model, self._loads(self._total))
        self._of_all = self._seconds([w for w in everyone if w.stage in _BY_TOTAL])
        alone = [w for w in everyone if w.stage in _BY_TOTAL]
        self.kernels = round(sum(self.times[n] for w in (*rank, *scores, *alone) for n in w.layers))
        """Kernels and collectives of a decode step on one rank, the head's left out."""
        self._decode = self._scores(self._decodes, decode=True)
        self._prefill = self._scores(self._prompts, decode=False)

    def _rows(self, points: Ints, names: Sequence[str], *, decode: bool) -> Floats:
        """Seconds of what only one phase has (MLA absorbs or expands), by tokens of a rank."""
        if not names:
            return np.zeros((len(points), len(PARTS)))
        loads = self._plain(points, np.ones_like(points), decode=decode)
        works = attention(Rows(self.model, loads))
        return self._seconds([w for w in works if w.name in names])

    def _scores(self, points: Ints, *, decode: bool) -> Floats:
        """Seconds of scores, [tokens, keys per token, parts]."""
        n, keys = (g.ravel() for g in np.meshgrid(points, self._contexts, indexing="ij"))
        works = attention(Rows(self.model, self._plain(n, keys, decode=decode)))
        works = [w for w in works if isinstance(w.op, AttentionDecode | AttentionPrefill)]
        return self._seconds(works).reshape(len(points), len(self._contexts), len(PARTS))

    def _plain(self, tokens: Ints, keys: Ints, *, decode: bool) -> StepLoads:
        """Count equal ranks of so many tokens and keys per token, without experts."""
        ranks, windows = self.layout.lanes, self.model.attention.windows
        each = np.repeat(tokens[:, None], ranks, axis=1)
        context = np.stack([tokens * np.minimum(keys, w or keys) for w in windows], axis=1)
        none = np.zeros((len(tokens), 1), dtype=np.int64)
        return StepLoads(
            decode=decode,
            tokens=each,
            sequences=each,
            context=np.repeat(context[:, :, None], ranks, axis=2),
            per_slot=none[..., None],
            sent=np.zeros((1, 1, ranks, ranks)),
            cross_node=none,
            cross_rank=none,
            of_layout=self.layout,
        )

    def _loads(self, tokens: Ints) -> StepLoads:
        """Count decode steps of so many tokens over all attention ranks, with their routing."""
        batches = []
        for n in tokens.tolist():
            rows = np.arange(n)
            once = np.ones(n, dtype=np.int64)
            batches.append(
                StepBatch(
                    rows=rows % DRAWN, context=once, home=rows % self.layout.dp, last=once > 0
                )
            )
        return count_loads(
            self.model,
            self._trace,
            Composition(batches=tuple(batches), decode=True, statement="", stand_in=False),
            self.deployment.dispatcher_for(self.model, self.cluster),
            layout=self.layout,
            node_of=np.asarray(self.cluster.node_of, dtype=np.int64),
        )

    def _seconds(self, works: Sequence[Work]) -> Floats:
        """Seconds [steps, parts]: of each kernel its slowest rank, times the layers it is for."""
        found = np.zeros((works[0].shape[0], len(PARTS)))
        for work in works:
            priced = price(self._formatted(work), self.cluster, on=work.on)
            slowest = priced.seconds.reshape(work.shape).max(axis=2)
            stand_for = np.array([self.times[layer] for layer in work.layers])
            found[:, _part(work)] += (
                np.broadcast_to(slowest, (len(slowest), len(stand_for))) @ stand_for
            )
            self.evidence = weakest([self.evidence, priced.evidence])
        return found

    def _formatted(self, work: Work) -> Op:
        """Return the operation in the checkpoint's format of this kernel."""
        if work.name in self._formats and isinstance(work.op, Gemm):
            return replace(work.op, weight_dtype=self._formats[work.name])
        return work.op


def grid(most: int) -> Ints:
    """Return whole numbers from 1 to ``most``: four an octave up to 64, then two."""
    fine, coarse = np.arange(0, 6, 0.25), np.arange(6, 24, 0.5)
    points = np.unique(np.round(2.0 ** np.concatenate([fine, coarse])))
    last = max(most, 2)
    return np.append(points[points < last], last).astype(np.int64)


def _at(points: Ints, table: Floats, where: Floats, column: Ints | None = None) -> Floats:
    """Interpolate rows of a table; nothing at zero. ``column`` picks along the second axis."""
    high = np.clip(np.searchsorted(points, where), 1, len(points) - 1)
    below, above = points[high - 1], points[high]
    share = np.clip((where - below) / (above - below), 0, 1)[..., None]
    rows = (table[high - 1], table[high]) if column is None else (
        table[high - 1, column], table[high, column]
    )  # fmt: skip
    found = rows[0] * (1 - share) + rows[1] * share
    return np.asarray(np.where(where[..., None] > 0, found, 0.0))


def _part(work: Work) -> int:
    if isinstance(work.op, AttentionDecode | AttentionPrefill):
        return 1
    if work.groups is not None:
        return 3
    return 2 if work.stage in _BY_TOTAL else 0
