"""What mixed steps ask of each rank: tokens of both phases, context, tokens per slot, bytes.

The counts equal those of `simulator.loads.count_loads`. Where attention DP = EP and every expert
has one replica they come from running sums (`simulator.serving_routes`); otherwise, where the
choice of a replica depends on the whole step, from `count_loads` itself. S steps, L MoE layers,
R ranks in D attention groups, P slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import bytes_of
from simulator.batches import Composition, StepBatch
from simulator.dispatch import Dispatcher
from simulator.layout import Layout
from simulator.loads import StepLoads, count_loads
from simulator.serving_routes import Routes, sent_between
from simulator.serving_scheduler import ServingStep
from traces.model_spec import ModelSpec
from traces.request_source import RequestSource
from traces.routing_trace import RoutingTrace

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedLoads:
    """Counts of S steps, with what attention sees of each phase."""

    total: StepLoads
    """All tokens; its ``context`` is that of the decode tokens."""
    decode_tokens: Ints
    """[S, R]."""
    decode_context: Ints
    """Keys that the decode tokens attend to, summed, [S, layers of the model, R]."""
    prefill_tokens: Ints
    """[S, R]."""
    prefill_pairs: Ints
    """(query, key) pairs of the chunks, context before the chunk included, [S, layers, R]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tokens:
    """The decode tokens and chunks of S steps, one after another."""

    steps: int
    groups: int
    """Attention data-parallel groups, D."""
    decode: Ints
    decode_key: Ints
    """step * groups + group."""
    context: Ints
    chunk: Ints
    chunk_key: Ints
    start: Ints
    stop: Ints
    ends: NDArray[np.bool_]

    @classmethod
    def of(cls, steps: Sequence[ServingStep], groups: int) -> "_Tokens":
        def joined(name: str) -> Ints:
            return np.concatenate([getattr(step, name) for step in steps])

        def keys(name: str) -> Ints:
            sizes = [len(getattr(step, name)) for step in steps]
            return np.repeat(np.arange(len(steps)) * groups, sizes) + joined(name)

        return cls(
            steps=len(steps),
            groups=groups,
            decode=joined("decode"),
            decode_key=keys("decode_rank"),
            context=joined("decode_context"),
            chunk=joined("chunk"),
            chunk_key=keys("chunk_rank"),
            start=joined("chunk_start"),
            stop=joined("chunk_stop"),
            ends=np.concatenate([step.chunk_ends for step in steps]),
        )

    def by_group(self, key: Ints, weight: NDArray[Any] | None = None) -> Ints:
        """Sum weights over tokens or chunks, [S, D]; exact below 2**53."""
        sums = np.bincount(key, weights=weight, minlength=self.steps * self.groups)
        return sums.astype(np.int64).reshape(self.steps, self.groups)


class ServingCounter:
    """Counts mixed steps of served requests under one layout, placement and dispatch rule.

    Parameters
    ----------
    model, trace, source : ModelSpec, RoutingTrace, RequestSource
        What runs, and the rows of the trace for each served request.
    inputs : int64 array [N]
        Prompt tokens of each request.
    dispatcher, layout : Dispatcher, Layout
        As `simulator.loads.count_loads` takes them; one pipeline stage.
    node_of : int64 array [R]
        Node of each rank.
    seed : int
        Of the replica rotation.
    """

    def __init__(
        self,
        model: ModelSpec,
        trace: RoutingTrace,
        source: RequestSource,
        inputs: Ints,
        dispatcher: Dispatcher,
        layout: Layout,
        node_of: Ints,
        *,
        seed: int = 0,
    ) -> None:
        self.model, self.trace, self.source, self.inputs = model, trace, source, inputs
        self.dispatcher, self.layout, self.node_of, self.seed = dispatcher, layout, node_of, seed
        place = dispatcher.placement
        plain = layout == Layout.data_parallel(place.num_ranks)
        self.routes = None
        if plain and place.num_slots == place.num_experts:
            self.routes = Routes(trace, source.rows, dispatcher)

    def count(self, steps: Sequence[ServingStep]) -> MixedLoads:
        """Count steps that follow one another."""
        tokens = _Tokens.of(steps, self.layout.dp)
        total = self._exact(steps) if self.routes is None else self._fast(tokens, self.routes)
        decodes = tokens.by_group(tokens.decode_key)
        prefills = tokens.by_group(tokens.chunk_key, tokens.stop - tokens.start)
        ends = tokens.by_group(tokens.chunk_key, tokens.ends)
        context = self._context(tokens)
        return MixedLoads(
            total=replace(
                total,
                decode=True,
                tokens=self._each_rank(decodes + prefills),
                sequences=self._each_rank(decodes + ends),
                context=context,
            ),
            decode_tokens=self._each_rank(decodes),
            decode_context=context,
            prefill_tokens=self._each_rank(prefills),
            prefill_pairs=self._pairs(tokens),
        )

    def _each_rank(self, of_group: Ints) -> Ints:
        """Give a group's number to each of its ranks, [..., D] to [..., R]."""
        return np.repeat(of_group, self.layout.tp, axis=-1)

    def _context(self, t: _Tokens) -> Ints:
        return self._per_layer(
            lambda w: t.by_group(t.decode_key, np.minimum(t.context, w or np.inf))
        )

    def _pairs(self, t: _Tokens) -> Ints:
        """Sum of min(position + 1, window) over each chunk's tokens."""

        def before(stop: Ints, window: int | None) -> Ints:
            within = stop if window is None else np.minimum(stop, window)
            beyond = 0 if window is None else (stop - within) * window
            return np.asarray(within * (within + 1) // 2 + beyond)

        return self._per_layer(
            lambda w: t.by_group(t.chunk_key, before(t.stop, w) - before(t.start, w))
        )

    def _per_layer(self, of_window: Callable[[int | None], Ints]) -> Ints:
        windows = self.model.attention.windows
        sums = {window: of_window(window) for window in set(windows)}
        return self._each_rank(np.stack([sums[window] for window in windows], axis=1))

    def _exact(self, steps: Sequence[ServingStep]) -> StepLoads:
        """Assign every token to a replica, step by step."""
        composition = Composition(
            batches=tuple(self.batch(step) for step in steps),
            decode=True,
            statement=self.source.statement,
            stand_in=self.source.stand_in,
        )
        seed = self.seed + steps[0].number
        return count_loads(
            self.model,
            self.trace,
            composition,
            self.dispatcher,
            seed=seed,
            layout=self.layout,
            node_of=self.node_of,
        )

    def batch(self, step: ServingStep) -> StepBatch:
        """Write a step out token by token."""
        sizes = step.chunk_stop - step.chunk_start
        rows = [self._decode_rows(step.decode, step.decode_context)]
        context = [step.decode_context]
        for request, start, stop in zip(
            step.chunk.tolist(), step.chunk_start.tolist(), step.chunk_stop.tolist(), strict=True
        ):
            inputs = int(self.inputs[request])
            rows.append(self.source.token_rows(request, inputs, start, stop))
            context.append(np.arange(start + 1, stop + 1))
        last = np.zeros(int(sizes.sum()), dtype=np.bool_)
        last[np.cumsum(sizes) - 1] = step.chunk_ends
        return StepBatch(
            rows=np.concatenate(rows),
            context=np.concatenate(context),
            home=np.concatenate([step.decode_rank, np.repeat(step.chunk_rank, sizes)]),
            last=np.concatenate([np.ones(len(step.decode), dtype=np.bool_), last]),
        )

    def _decode_rows(self, request: Ints, context: Ints) -> Ints:
        return self.source.rows[self._decode_places(request, context)]

    def _decode_places(self, request: Ints, context: Ints) -> Ints:
        """Place of the token that is computed at the end of a context."""
        return self.source.answer.places(request, context - 1 - self.inputs[request])

    def _fast(self, t: _Tokens, routes: "Routes") -> StepLoads:
        """Look decode tokens up, take chunks from running sums."""
        place, source = self.dispatcher.placement, self.source
        inputs = self.inputs[t.chunk]
        prompt = source.prompt.span_ends(
            t.chunk, np.minimum(t.start, inputs), np.minimum(t.stop, inputs)
        )
        again = source.answer.span_ends(
            t.chunk, np.maximum(t.start - inputs, 0), np.maximum(t.stop - inputs, 0)
        )
        ends, weight = np.concatenate([np.stack(prompt), np.stack(again)], axis=1)
        key = np.broadcast_to(t.chunk_key, ends.shape)
        used = weight != 0
        slots, marks = routes.count(
            self._decode_places(t.decode, t.context),
            t.decode_key,
            ends[used],
            weight[used],
            key[used],
            t.steps,
        )
        layers, ranks = place.num_layers, place.num_ranks
        visits = marks[..., :ranks]  # [S, home, L, G]
        entered = marks[..., ranks:]  # [S, home, L, N]
        token_bytes = bytes_of(self.model.activation_dtype, self.model.comm_size)
        sent = sent_between(visits, entered, self.dispatcher.node_of)
        home = np.arange(ranks)
        other = visits.sum(axis=(1, 3)) - visits[:, home, :, home].sum(axis=0)
        nodes = entered.sum(axis=(1, 3))
        if entered.shape[-1]:
            nodes = nodes - entered[:, home, :, routes.node_index].sum(axis=0)
        return StepLoads(
            decode=True,
            tokens=t.by_group(t.decode_key),
            sequences=t.by_group(t.decode_key),
            context=np.zeros((t.steps, self.model.num_layers, ranks), dtype=np.int64),
            per_slot=slots.reshape(t.steps, layers, place.num_slots),
            sent=sent * token_bytes,
            cross_node=nodes,
            cross_rank=other,
            of_layout=self.layout,
        )
