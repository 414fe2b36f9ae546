"""The routed experts of a decoder: all of them here, over the ranks of a group, or behind a cache.

Each form runs the kernels that the simulator lowers for it, in that order, and ends a lap of the
clock after each: permute, experts, unpermute; between dispatch and combine where ranks exchange
tokens; with fetches, and a call of its own for each fetched expert, where a cache misses. Ids name
slots: of all ranks in rank order, and behind a cache the logical experts themselves.
Shape suffixes: T tokens of this rank, K choices, D width, L MoE layers, P slots of this rank, S
slots of all ranks, E experts, M rows received, R (row, slot) pairs, N rows of one expert.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hwmodels.ops import Stage
from kernels_ref.collectives import (
    Exchange,
    Group,
    combine_ranks,
    dispatch,
    plan_exchange,
    plan_known_exchange,
)
from kernels_ref.decoder_weights import Ids, SlotWeights, check_slot_map
from kernels_ref.expert_cache import ExpertCache
from kernels_ref.experts import gated_ffn, grouped_ffn
from kernels_ref.permute import combine, permute, sort_by_expert
from kernels_ref.stage_clock import StageClock
from traces.model_spec import ModelSpec

Forced = Ids | Sequence[Ids] | None
"""Slot of every choice, ``[L, T, K]``; of every rank's choices, one array per rank, where a rank
knows them all; None: the router's own choice."""


class RoutedExperts(Protocol):
    """What a decoder asks of its routed experts."""

    @property
    def slot_map_LS(self) -> Ids:
        """Logical expert of every slot that an id may name."""

    def prepare(self, forced: Forced) -> Ids | None:
        """Get ready for a step, before the clock starts; returns this rank's slots."""

    def run(
        self, layer: int, x_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor, clock: StageClock
    ) -> Tensor:
        """Return the weighted sum over each token's experts of an MoE layer, ``[T, D]``."""


def _own(forced: Forced, rank: int = 0) -> Ids | None:
    return forced if forced is None or isinstance(forced, np.ndarray) else forced[rank]


class ResidentExperts:
    """Every slot in this process's memory.

    Parameters
    ----------
    model
    slot_map_LP
        Logical expert of each slot in each MoE layer.
    slots
        `expert_slots` of this map.

    Raises
    ------
    ValueError
        If the map does not fit the model.
    """

    def __init__(self, model: ModelSpec, slot_map_LP: Ids, slots: Sequence[SlotWeights]) -> None:
        check_slot_map(model, slot_map_LP)
        self.slot_map_LS, self._slots = slot_map_LP, slots

    def prepare(self, forced: Forced) -> Ids | None:
        """Take the slots as they are."""
        return _own(forced)

    def run(
        self, layer: int, x_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor, clock: StageClock
    ) -> Tensor:
        """See `RoutedExperts`."""
        slots = self._slots[layer]
        permutation = sort_by_expert(slot_ids_TK, len(slots.records_PN))
        x_RD = permute(x_TD, permutation)
        counts = permutation.counts_E.tolist()
        clock.lap(Stage.EXPERTS, "permute")
        y_RD = grouped_ffn(x_RD, counts, slots.w13_PGD, slots.w2_PDF)
        clock.lap(Stage.EXPERTS, "experts")
        y_TD = combine(y_RD, weights_TK, permutation)
        clock.lap(Stage.EXPERTS, "unpermute")
        return y_TD


class ParallelExperts:
    """Slots divided over the ranks of a group: tokens go to their experts and come back.

    The combine weights travel as further columns of a token's row, in its dtype, so that one
    message carries both.

    Parameters
    ----------
    model
    slot_map_LS
        Logical expert of each slot of all ranks; rank r has the r-th equal run of them.
    slots
        `expert_slots` of this rank's run.
    group
        The ranks; None: all.

    Raises
    ------
    ValueError
        If the map does not fit the model, or is not divided into the ranks' slots.
    """

    def __init__(
        self,
        model: ModelSpec,
        slot_map_LS: Ids,
        slots: Sequence[SlotWeights],
        group: Group = None,
    ) -> None:
        check_slot_map(model, slot_map_LS)
        ranks, mine = dist.get_world_size(group), len(slots[0].records_PN)
        if mine * ranks != slot_map_LS.shape[1]:
            raise ValueError(
                f"{slot_map_LS.shape[1]} slots in the map, {mine} on this rank of {ranks} -- every "
                "rank holds as many -- divide the map equally"
            )
        self.slot_map_LS, self._slots, self._local = slot_map_LS, slots, mine
        self._group, self._rank = group, dist.get_rank(group)
        self._known: list[Exchange] = []

    def prepare(self, forced: Forced) -> Ids | None:
        """Work out the exchanges ahead where every rank's slots are known: rows alone move then."""
        self._known = []
        if forced is not None and not isinstance(forced, np.ndarray):
            device = self._slots[0].records_PN.device
            ids = [torch.from_numpy(each.astype(np.int64)).to(device) for each in forced]
            self._known = [
                plan_known_exchange([each[layer] for each in ids], self._rank, self._local)
                for layer in range(len(self._slots))
            ]
        return _own(forced, self._rank)

    def run(
        self, layer: int, x_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor, clock: StageClock
    ) -> Tensor:
        """See `RoutedExperts`."""
        slots, width = self._slots[layer], x_TD.shape[1]
        if self._known:
            exchange = self._known[layer]
        else:
            exchange = plan_exchange(slot_ids_TK, self._local, self._group)
        rows_TX = torch.cat([x_TD, weights_TK.to(x_TD.dtype)], dim=1)
        rows_MX = dispatch(rows_TX, exchange, self._group)
        clock.lap(Stage.DISPATCH, "dispatch")
        x_RD = permute(rows_MX[:, :width], exchange.permutation)
        counts = exchange.permutation.counts_E.tolist()
        clock.lap(Stage.EXPERTS, "permute")
        y_RD = grouped_ffn(x_RD, counts, slots.w13_PGD, slots.w2_PDF)
        clock.lap(Stage.EXPERTS, "experts")
        y_MD = combine(y_RD, rows_MX[:, width:], exchange.permutation)
        clock.lap(Stage.EXPERTS, "unpermute")
        y_TD = combine_ranks(y_MD, exchange, self._group)
        clock.lap(Stage.COMBINE, "combine")
        return y_TD


class CachedExperts:
    """Experts on a slow tier behind a cache; every step accesses every MoE layer once.

    Experts that are there run first, one after the other as in `grouped_ffn`; then each of the
    others is fetched and run, the one with most tokens first (of equals the smaller id). Where the
    cache copies beside, the next copy runs meanwhile, and a fetch takes the time waited for it.

    Parameters
    ----------
    model
    cache
    """

    def __init__(self, model: ModelSpec, cache: ExpertCache) -> None:
        layers, experts = model.num_moe_layers, model.num_experts
        self.slot_map_LS: Ids = np.tile(np.arange(experts), (layers, 1))
        self._experts, self._cache = experts, cache

    def prepare(self, forced: Forced) -> Ids | None:
        """Take the experts as they are."""
        return _own(forced)

    def run(
        self, layer: int, x_TD: Tensor, slot_ids_TK: Tensor, weights_TK: Tensor, clock: StageClock
    ) -> Tensor:
        """See `RoutedExperts`; the slots are logical experts."""
        cache = self._cache
        tokens = torch.bincount(slot_ids_TK.reshape(-1), minlength=self._experts).tolist()
        access = cache.access(layer, [e for e, count in enumerate(tokens) if count])
        misses = sorted(access.misses, key=lambda expert: -tokens[expert])
        order = [*access.hits, *misses]
        places_TK = self._places(order, slot_ids_TK)
        clock.lap(Stage.FETCH, "cache lookup")
        arrival = cache.fetch(layer, misses[0]) if misses else None
        clock.lap(Stage.FETCH, "fetch")

        permutation = sort_by_expert(places_TK, len(order))
        x_RD = permute(x_TD, permutation)
        rows = dict(zip(order, torch.split(x_RD, [tokens[e] for e in order]), strict=True))
        clock.lap(Stage.EXPERTS, "permute")
        results = [gated_ffn(rows[e], *cache.weights(layer, e)) for e in access.hits]
        cache.release(layer, access.hits)
        clock.lap(Stage.EXPERTS, "experts")
        for expert, following in zip_longest(misses, misses[1:]):
            assert arrival is not None
            arrival()
            arrival = None if following is None else cache.fetch(layer, following)
            clock.lap(Stage.FETCH, "fetch")
            results.append(gated_ffn(rows[expert], *cache.weights(layer, expert)))
            cache.release(layer, [expert])
            clock.lap(Stage.EXPERTS, "fetched expert")
        y_TD = combine(torch.cat(results or [x_RD]), weights_TK, permutation)
        clock.lap(Stage.EXPERTS, "unpermute")
        return y_TD

    def _places(self, order: Sequence[int], ids_TK: Tensor) -> Tensor:
        """Return the place of each choice's expert in an order."""
        place_E = torch.zeros(self._experts, dtype=torch.int64)
        place_E[list(order)] = torch.arange(len(order))
        return place_E.to(ids_TK.device)[ids_TK]
