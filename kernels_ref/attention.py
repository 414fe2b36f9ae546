"""Causal grouped-query attention: prefill (prompts or chunks of them) and decode (one new token).

Each of G key/value heads serves ``R = H / G`` query heads; a query sees the keys up to its own
position, with a sliding window only the last W of these. Scores are scaled by ``1 / sqrt(C)``.
`attention_decode` is the readable form over a padded cache; `attention_decode_ragged` reads each
request's own rows and no others, from a cache that holds keys transposed (`write_kv` fills it).
Shape suffixes: B requests, S query tokens, L key positions, T new tokens, H query heads, G
key/value heads, N = B * G, R = H / G, M = S * R, C channels of a query or key, V of a value.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_TILE = 64  # queries at a time: their scores stay in the cache, and few hidden keys are multiplied


def _share(heads: int, kv_heads: int) -> int:
    """R, the query heads that one key/value head serves."""
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads over {kv_heads} key/value heads -- the first must be a multiple "
            "of the second -- change one of them"
        )
    return heads // kv_heads


def _check_window(window: int) -> None:
    if window < 0:
        raise ValueError(
            f"window is {window} tokens -- allowed is 1 or more, or 0 for none -- change it"
        )


def _hidden(queries_S: Tensor, keys_L: Tensor, window: int) -> Tensor:
    """[S, L] keys that a query does not see: those after it, and those before its window."""
    behind_SL = queries_S[:, None] - keys_L
    return (behind_SL < 0) | (behind_SL >= window) if window else behind_SL < 0


def attention_prefill(q_BSHC: Tensor, k_BLGC: Tensor, v_BLGV: Tensor, *, window: int = 0) -> Tensor:
    """Causal attention of S new tokens over a cached prefix of ``L - S`` tokens and themselves.

    ``softmax(q k^T / sqrt(C)) v`` over the keys that each query sees: query ``s`` stands at
    position ``L - S + s``. Whole prompts have ``L = S``. Tiles of queries multiply with the keys
    from the first that any of them sees to the last, so that work follows the visible pairs.

    Parameters
    ----------
    q_BSHC
        Queries, ``[B, S, H, C]`` (rotary embedding already applied).
    k_BLGC, v_BLGV
        Keys ``[B, L, G, C]`` and values ``[B, L, G, V]``, the prefix first; ``H`` a multiple of
        ``G``, ``L`` at least ``S``.
    window
        Tokens that each query sees, itself included; 0: all before it.

    Returns
    -------
    Tensor
        ``[B, S, H, V]``.

    Raises
    ------
    ValueError
        When ``H`` is not a multiple of ``G``, ``L`` is below ``S``, or the window is negative.
    """
    (batch, tokens, heads, channels), (keys, kv_heads) = q_BSHC.shape, k_BLGC.shape[1:3]
    share = _share(heads, kv_heads)
    _check_window(window)
    past = keys - tokens
    if past < 0:
        raise ValueError(
            f"{keys} keys for {tokens} queries -- allowed is one key per query or more -- give the "
            "new tokens' own keys too"
        )
    q_BSGRC = (q_BSHC / channels**0.5).reshape(batch, tokens, kv_heads, share, channels)
    q_NSRC = q_BSGRC.transpose(1, 2).flatten(0, 1)
    k_NCL = k_BLGC.permute(0, 2, 3, 1).flatten(0, 1)
    v_NLV = v_BLGV.transpose(1, 2).flatten(0, 1)
    tiles_NSRV = [
        _attend_tile(tile_NSRC, k_NCL, v_NLV, past + _TILE * tile, window)
        for tile, tile_NSRC in enumerate(q_NSRC.split(_TILE, dim=1))
    ]
    out_BGSRV = torch.cat(tiles_NSRV, dim=1).view(batch, kv_heads, tokens, share, v_BLGV.shape[-1])
    return out_BGSRV.transpose(1, 2).flatten(2, 3)


def _attend_tile(
    q_NSRC: Tensor, k_NCL: Tensor, v_NLV: Tensor, position: int, window: int
) -> Tensor:
    """[N, S, R, V] of the queries that stand at ``position`` and after."""
    rows, tokens, share, _ = q_NSRC.shape
    end = position + tokens
    start = max(0, position + 1 - window) if window else 0
    at_L = torch.arange(start, end, device=q_NSRC.device)
    queries_S = at_L[position - start :]
    scores_NML = torch.bmm(q_NSRC.flatten(1, 2), k_NCL[:, :, start:end])
    scores_NSRL = scores_NML.view(rows, tokens, share, end - start)
    # hidden keys are among the last S and, with a window, the first S: the rest need no mask
    for edge in (slice(position - start, None), slice(0, tokens if window else 0)):
        hidden_SL = _hidden(queries_S, at_L[edge], window)
        scores_NSRL[..., edge].masked_fill_(hidden_SL[:, None], float("-inf"))
    out_NMV = torch.bmm(scores_NML.softmax(dim=-1), v_NLV[:, start:end])
    return out_NMV.view(rows, tokens, share, v_NLV.shape[-1])


def append_kv(cache_BLGC: Tensor, new_BGC: Tensor, length_B: Tensor) -> Tensor:
    """Copy of a cache with one new key (or value) written at position ``length_B[b]``."""
    rows_B = torch.arange(cache_BLGC.shape[0], device=cache_BLGC.device)
    return cache_BLGC.index_put((rows_B, length_B), new_BGC)


def attention_decode(
    q_BHC: Tensor, k_BLGC: Tensor, v_BLGV: Tensor, length_B: Tensor, *, window: int = 0
) -> Tensor:
    """Attention of one new token per request over its cache, itself included.

    Parameters
    ----------
    q_BHC
        Query of the new token, ``[B, H, C]``.
    k_BLGC, v_BLGV
        Caches, ``[B, L, G, C]`` and ``[B, L, G, V]``; the new token's own key and value are
        already in.
    length_B
        Filled positions of each request, int64, within ``1..L``; what lies beyond has no weight.
    window
        Tokens that each query sees, itself included; 0: all before it.

    Returns
    -------
    Tensor
        ``[B, H, V]``.

    Raises
    ------
    ValueError
        When ``H`` is not a multiple of ``G``, or the window is negative.
    """
    (batch, heads, channels), (positions, kv_heads) = q_BHC.shape, k_BLGC.shape[1:3]
    q_BGRC = q_BHC.reshape(batch, kv_heads, _share(heads, kv_heads), channels)
    _check_window(window)
    positions_L = torch.arange(positions, device=q_BHC.device)
    hidden_BL = _hidden(length_B - 1, positions_L, window)
    scores_BGRL = torch.einsum("bgrc,blgc->bgrl", q_BGRC, k_BLGC) / channels**0.5
    scores_BGRL = scores_BGRL.masked_fill(hidden_BL[:, None, None], float("-inf"))
    out_BGRV = torch.einsum("bgrl,blgv->bgrv", scores_BGRL.softmax(dim=-1), v_BLGV)
    return out_BGRV.flatten(1, 2)


def write_kv(
    keys_BGCL: Tensor,
    values_BGLV: Tensor,
    k_TGC: Tensor,
    v_TGV: Tensor,
    request_T: Tensor,
    position_T: Tensor,
) -> None:
    """Write the keys and values of T new tokens into the caches of `attention_decode_ragged`.

    Parameters
    ----------
    keys_BGCL, values_BGLV
        Caches, ``[B, G, C, L]`` and ``[B, G, L, V]``, changed in place.
    k_TGC, v_TGV
        What is written, ``[T, G, C]`` and ``[T, G, V]``.
    request_T, position_T
        Where each token goes: its row ``0..B - 1`` of the cache and its position ``0..L - 1``,
        int64.
    """
    keys_BGCL[request_T, :, :, position_T] = k_TGC
    values_BGLV[request_T, :, position_T] = v_TGV


def attention_decode_ragged(
    q_BHC: Tensor,
    keys: Tensor | Sequence[Tensor],
    values: Tensor | Sequence[Tensor],
    lengths: Sequence[int],
    *,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """`attention_decode` without padding: each request reads exactly its own rows.

    One request after the other, its heads as batched products
    ``[G, R, C] @ [G, C, L]`` and ``[G, R, L] @ [G, L, V]`` on views of the cache. Keys lie
    transposed because the first product is then faster in float32 and, over long contexts, in
    bfloat16. Nothing waits for the device; no gradient is kept.

    Parameters
    ----------
    q_BHC
        Query of the new token, ``[B, H, C]``.
    keys, values
        Caches of the B requests: tensors ``[B, G, C, L]`` and ``[B, G, L, V]``, or sequences of
        views ``[G, C, L]`` and ``[G, L, V]``; the new token's own key and value are already in.
    lengths
        Filled positions of each request, within ``1..L``; what lies beyond is not read.
    window
        Tokens that each query sees, itself included; 0: all before it.
    scale
        What scores are multiplied with; None: ``1 / sqrt(C)``.

    Returns
    -------
    Tensor
        ``[B, H, V]``.

    Raises
    ------
    ValueError
        When ``H`` is not a multiple of ``G``, the window is negative, a length is outside
        ``1..L``, or there is not one cache and one length per request.
    """
    batch, heads, channels = q_BHC.shape
    _check_ragged(batch, keys, values, lengths)
    _check_window(window)
    if not batch:
        width = values.shape[-1] if isinstance(values, Tensor) else channels
        return q_BHC.new_empty(0, heads, width)
    kv_heads, _, width = values[0].shape
    share = _share(heads, kv_heads)
    scaled_BHC = q_BHC * (channels**-0.5 if scale is None else scale)
    q_BGRC = scaled_BHC.reshape(batch, kv_heads, share, channels)
    out_BGRV = q_BHC.new_empty(batch, kv_heads, share, width)
    parts = zip(q_BGRC, keys, values, lengths, out_BGRV, strict=True)
    for q_GRC, k_GCL, v_GLV, length, out_GRV in parts:
        start = max(0, length - window) if window else 0
        scores_GRL = torch.bmm(q_GRC, k_GCL[:, :, start:length])
        torch.bmm(scores_GRL.softmax(dim=-1), v_GLV[:, start:length], out=out_GRV)
    return out_BGRV.flatten(1, 2)


def _check_ragged(
    batch: int,
    keys: Tensor | Sequence[Tensor],
    values: Tensor | Sequence[Tensor],
    lengths: Sequence[int],
) -> None:
    """Refuse a batch whose parts do not fit together; slices of views would be cut silently."""
    if not batch == len(keys) == len(values) == len(lengths):
        raise ValueError(
            f"{batch} queries, {len(keys)} and {len(values)} caches, {len(lengths)} lengths -- "
            "allowed is one of each per request -- give as many"
        )
    if isinstance(keys, Tensor):
        room = [keys.shape[-1]] * batch
    else:
        room = [k_GCL.shape[-1] for k_GCL in keys]
    for length, most in zip(lengths, room, strict=True):
        if not 1 <= length <= most:
            raise ValueError(
                f"length {length} -- allowed is 1 to the {most} positions of its cache -- correct "
                "it, or make the cache longer"
            )
