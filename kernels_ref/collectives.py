"""Collectives over torch.distributed: ring sums and gathers, and the exchange of tokens by expert.

Ranks hold equal shares of a tensor (rings), or rows of any number for each other (all-to-all).
In the exchange a token goes once to each rank that holds one of its experts, with the list of its
choices there; what comes back is one partial sum for each row that went, as the simulator counts
it. The group is an argument (default: all ranks): gloo for tensors on the CPU, NCCL on CUDA.
Shape suffixes: T tokens of this rank, K choices per token, S rows sent (token, rank), M rows
received, P (row, slot) pairs on this rank, N rows of a share, R ranks, D width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels_ref.permute import Permutation

Group = dist.ProcessGroup | None
"""Ranks that take part; None: all."""

# torch 2.13 renamed these two and warns of the old names
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: Group = None) -> Tensor:
    """Sum over ranks, in place: ``x <- sum_r x_r`` on every rank; returns ``x``.

    Parameters
    ----------
    x
        Contiguous tensor, of the same shape and dtype on every rank.
    group
        Ranks that take part; None: all.

    Returns
    -------
    Tensor
        ``x`` itself: a copy would be timed with the sum.
    """
    dist.all_reduce(x, group=group)
    return x


def all_gather(x_ND: Tensor, group: Group = None) -> Tensor:
    """Put the shares of all ranks one after another: ``[R * N, D]``, in rank order.

    Parameters
    ----------
    x_ND
        This rank's share, ``[N, D]`` (any width or more dimensions), equal shapes on all ranks.
    group
        Ranks that take part; None: all.

    Returns
    -------
    Tensor
        ``[R * N, D]``, the same on every rank.
    """
    ranks = dist.get_world_size(group)
    whole = x_ND.new_empty(ranks * x_ND.shape[0], *x_ND.shape[1:])
    _gather(whole, x_ND.contiguous(), group=group)
    return whole


def reduce_scatter(x: Tensor, group: Group = None) -> Tensor:
    """Sum over ranks, each keeping its share: rank ``r`` gets rows ``r N .. (r + 1) N`` of the sum.

    On gloo it is an all-to-all of the shares and a sum of what came: ``(R - 1) / R`` of the
    tensor leaves each rank, as in a ring. Torch's own for gloo is an all-reduce and sends twice
    that (https://github.com/pytorch/pytorch/pull/118911). NCCL has one of its own.

    Parameters
    ----------
    x
        Addend of this rank, ``[R * N, D]`` (any width or more dimensions), equal on all ranks.
    group
        Ranks that take part; None: all.

    Returns
    -------
    Tensor
        ``[N, D]``, in the dtype of ``x``.

    Raises
    ------
    ValueError
        When the ranks do not divide the rows.
    """
    ranks = dist.get_world_size(group)
    if x.shape[0] % ranks:
        raise ValueError(
            f"{x.shape[0]} rows over {ranks} ranks -- every rank keeps an equal share -- "
            f"pad the rows to a multiple of {ranks}"
        )
    share = x.shape[0] // ranks
    if dist.get_backend(group) == "gloo":
        shares = all_to_all_rows(x, [share] * ranks, [share] * ranks, group)
        return shares.view(ranks, share, *x.shape[1:]).sum(dim=0, dtype=x.dtype)
    out = x.new_empty(share, *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


def all_to_all_rows(
    x_SD: Tensor, send_counts: list[int], receive_counts: list[int], group: Group = None
) -> Tensor:
    """Send consecutive rows to each rank in turn and receive theirs, in rank order.

    Parameters
    ----------
    x_SD
        Rows, ``[S, D]`` (any width or more dimensions), those for rank 0 first.
    send_counts
        Rows for each rank, length R, sum S; the own rank's are copied. Zeros are allowed.
    receive_counts
        Rows from each rank, length R. It must be what the others send, and is not checked: the
        backend fails, or waits until its time limit.
    group
        Ranks that take part; None: all.

    Returns
    -------
    Tensor
        ``[M, D]`` with M the sum of ``receive_counts``.

    Raises
    ------
    ValueError
        When the counts are not one per rank or do not sum to the rows.
    """
    ranks = dist.get_world_size(group)
    if not len(send_counts) == len(receive_counts) == ranks or sum(send_counts) != x_SD.shape[0]:
        raise ValueError(
            f"{x_SD.shape[0]} rows with {len(send_counts)} send counts (sum {sum(send_counts)}) "
            f"and {len(receive_counts)} receive counts -- one count for each of {ranks} ranks, "
            "the send counts summing to the rows -- correct the counts"
        )
    out_MD = x_SD.new_empty(sum(receive_counts), *x_SD.shape[1:])
    dist.all_to_all_single(out_MD, x_SD.contiguous(), receive_counts, send_counts, group=group)
    return out_MD


class Exchange(NamedTuple):
    """Which rows go where between the tokens' ranks and the experts' ranks, both ways."""

    tokens: int
    """Tokens T of this rank."""
    token_S: Tensor
    """Token of each row sent, int64, by destination rank, then by token."""
    send_counts: list[int]
    """Rows for each rank; they sum to S."""
    receive_counts: list[int]
    """Rows from each rank; they sum to M."""
    permutation: Permutation
    """The (row, choice) pairs of the M received rows that meet a slot of this rank, sorted by
    local slot: `permute`, `grouped_ffn` and `combine` take it. Its counts are rows per slot."""


def plan_exchange(slot_ids_TK: Tensor, slots_per_rank: int, group: Group = None) -> Exchange:
    """Agree with the other ranks on an exchange: the counts move first, then the slot lists.

    Slot ``s`` is the ``s % slots_per_rank``-th of rank ``s // slots_per_rank``. A row per (token,
    rank) is sent; to send one per (token, choice), as some kernels do, hand over every choice as
    a token of its own: ``slot_ids.reshape(-1, 1)`` with ``x.repeat_interleave(K, 0)``.

    Parameters
    ----------
    slot_ids_TK
        Physical slot of each choice of this rank's tokens, int64, ``[T, K]``; -1: choice dropped,
        it goes nowhere. K is the same on every rank; T may differ, and be 0.
    slots_per_rank
        Slots of every rank.
    group
        Ranks that take part; None: all.

    Returns
    -------
    Exchange

    Raises
    ------
    ValueError
        When a slot does not exist.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    token_S, counts_R = _sends(slot_ids_TK, slots_per_rank, ranks)
    theirs_R = torch.empty_like(counts_R)
    dist.all_to_all_single(theirs_R, counts_R, group=group)
    send_counts, receive_counts = torch.stack([counts_R, theirs_R]).tolist()
    ids_MK = all_to_all_rows(slot_ids_TK[token_S], send_counts, receive_counts, group)
    permutation = _by_local_slot(ids_MK, rank, slots_per_rank)
    return Exchange(len(slot_ids_TK), token_S, send_counts, receive_counts, permutation)


def plan_known_exchange(slot_ids_RTK: Sequence[Tensor], rank: int, slots_per_rank: int) -> Exchange:
    """Work out `plan_exchange` without any message, where the routing of all ranks is known.

    Parameters
    ----------
    slot_ids_RTK
        For each rank the slots of its tokens' choices, as in `plan_exchange`.
    rank
        This rank, within the group that will exchange.
    slots_per_rank
        Slots of every rank.

    Returns
    -------
    Exchange
        Equal to what `plan_exchange` gives on that rank.

    Raises
    ------
    ValueError
        When a slot does not exist.
    """
    sends = [_sends(ids_TK, slots_per_rank, len(slot_ids_RTK)) for ids_TK in slot_ids_RTK]
    token_S, counts_R = sends[rank]
    arriving = [
        ids_TK[tokens[counts[:rank].sum() : counts[: rank + 1].sum()]]
        for ids_TK, (tokens, counts) in zip(slot_ids_RTK, sends, strict=True)
    ]
    permutation = _by_local_slot(torch.cat(arriving), rank, slots_per_rank)
    receive_counts = [len(ids) for ids in arriving]
    return Exchange(
        len(slot_ids_RTK[rank]), token_S, counts_R.tolist(), receive_counts, permutation
    )


def dispatch(x_TD: Tensor, exchange: Exchange, group: Group = None) -> Tensor:
    """Send each token's row to the ranks of its experts; the weights go the same way.

    Parameters
    ----------
    x_TD
        One row per token of this rank, ``[T, D]``: hidden states, or combine weights ``[T, K]``.
    exchange
        What goes where.
    group
        The ranks that planned it.

    Returns
    -------
    Tensor
        ``[M, D]``, the rows received: by rank, then by token. For hidden states x and weights w
        received, the experts' share is ``combine(grouped_ffn(permute(x, exchange.permutation),
        ...), w, exchange.permutation)``, ``[M, D]``.
    """
    x_SD = x_TD.index_select(0, exchange.token_S)
    return all_to_all_rows(x_SD, exchange.send_counts, exchange.receive_counts, group)


def combine_ranks(y_MD: Tensor, exchange: Exchange, group: Group = None) -> Tensor:
    """Send the partial results back and add them up: ``y_TD[t] = sum_r y(t, r)``.

    Parameters
    ----------
    y_MD
        One row for each row received, ``[M, D]``: the weighted sum over the experts of this rank.
    exchange
        What went where.
    group
        The ranks that planned it.

    Returns
    -------
    Tensor
        ``[T, D]``, in the dtype of ``y_MD``; zero for a token without experts.
    """
    y_SD = all_to_all_rows(y_MD, exchange.receive_counts, exchange.send_counts, group)
    y_TD = y_SD.new_zeros(exchange.tokens, *y_SD.shape[1:])
    return y_TD.index_add(0, exchange.token_S, y_SD)


def _sends(slot_ids_TK: Tensor, slots_per_rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Return the token of each row sent (by rank, then token), [S], and the rows per rank, [R]."""
    _check_slots(slot_ids_TK, ranks * slots_per_rank)
    rank_TK = slot_ids_TK // slots_per_rank  # floor: -1 stays -1, which is no rank
    every_R11 = torch.arange(ranks, device=slot_ids_TK.device).view(-1, 1, 1)
    visits_RT = (rank_TK == every_R11).any(dim=2)
    return visits_RT.nonzero()[:, 1], visits_RT.sum(dim=1)


def _by_local_slot(ids_MK: Tensor, rank: int, slots_per_rank: int) -> Permutation:
    """Sort the choices of received rows that meet this rank by its slots, stable in the rows."""
    local_P = ids_MK.reshape(-1) - rank * slots_per_rank
    here_P = ((local_P >= 0) & (local_P < slots_per_rank)).nonzero().squeeze(1)
    local_P = local_P[here_P]
    choice_P = here_P[torch.argsort(local_P, stable=True)]
    counts = torch.bincount(local_P, minlength=slots_per_rank)
    return Permutation(choice_P, choice_P // ids_MK.shape[1], counts)


def _check_slots(slot_ids_TK: Tensor, slots: int) -> None:
    if slot_ids_TK.numel() == 0:
        return
    low, high = torch.stack(slot_ids_TK.aminmax()).tolist()
    if low < -1 or high >= slots:
        raise ValueError(
            f"slot ids from {low} to {high} -- allowed are 0 to {slots - 1}, and -1 for a dropped "
            "choice -- map the experts to slots of this placement"
        )
