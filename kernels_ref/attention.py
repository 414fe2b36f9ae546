"""Causal grouped-query attention, for prefill (all tokens of a prompt) and decode (one new token).

Each of G key/value heads serves ``R = H / G`` query heads; decode reads a cache of keys and values
whose first ``length`` positions are filled. Scores are scaled by ``1 / sqrt(C)``.
Shape suffixes: B requests, S prompt tokens (query), L key positions, H query heads, G key/value
heads, R = H / G, C channels of a head.
"""

import torch
from torch import Tensor


def _attend(q_BSHC: Tensor, k_BLGC: Tensor, v_BLGC: Tensor, visible_BSL: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(C)) v`` over the visible positions; ``[B, S, H, C]``."""
    heads, kv_heads, channels = q_BSHC.shape[2], k_BLGC.shape[2], q_BSHC.shape[3]
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads over {kv_heads} key/value heads -- the first must be a multiple "
            "of the second -- change one of them"
        )
    q_BSGRC = q_BSHC.reshape(*q_BSHC.shape[:2], kv_heads, heads // kv_heads, channels)
    scores_BGRSL = torch.einsum("bsgrc,blgc->bgrsl", q_BSGRC, k_BLGC) / channels**0.5
    scores_BGRSL = scores_BGRSL.masked_fill(~visible_BSL[:, None, None], float("-inf"))
    out_BSGRC = torch.einsum("bgrsl,blgc->bsgrc", scores_BGRSL.softmax(dim=-1), v_BLGC)
    return out_BSGRC.flatten(2, 3)


def attention_prefill(q_BSHC: Tensor, k_BSGC: Tensor, v_BSGC: Tensor) -> Tensor:
    """Causal attention of whole prompts: position ``s`` sees the positions ``0..s``.

    Parameters
    ----------
    q_BSHC
        Queries, ``[B, S, H, C]`` (rotary embedding already applied).
    k_BSGC, v_BSGC
        Keys and values, ``[B, S, G, C]`` with ``H`` a multiple of ``G``.

    Returns
    -------
    Tensor
        ``[B, S, H, C]``.

    Raises
    ------
    ValueError
        When ``H`` is not a multiple of ``G``.
    """
    tokens = q_BSHC.shape[1]
    causal_SL = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BSHC.device).tril()
    return _attend(q_BSHC, k_BSGC, v_BSGC, causal_SL.expand(q_BSHC.shape[0], -1, -1))


def append_kv(cache_BLGC: Tensor, new_BGC: Tensor, length_B: Tensor) -> Tensor:
    """Copy of a cache with one new key (or value) written at position ``length_B[b]``."""
    rows_B = torch.arange(cache_BLGC.shape[0], device=cache_BLGC.device)
    return cache_BLGC.index_put((rows_B, length_B), new_BGC)


def attention_decode(q_BHC: Tensor, k_BLGC: Tensor, v_BLGC: Tensor, length_B: Tensor) -> Tensor:
    """Attention of one new token per request over its cache, itself included.

    Parameters
    ----------
    q_BHC
        Query of the new token, ``[B, H, C]``.
    k_BLGC, v_BLGC
        Caches, ``[B, L, G, C]``; the new token's own key and value are already in.
    length_B
        Filled positions of each request, int64, within ``1..L``; what lies beyond is not read.

    Returns
    -------
    Tensor
        ``[B, H, C]``.

    Raises
    ------
    ValueError
        When ``H`` is not a multiple of ``G``.
    """
    positions_L = torch.arange(k_BLGC.shape[1], device=q_BHC.device)
    visible_BSL = (positions_L < length_B.unsqueeze(1)).unsqueeze(1)
    return _attend(q_BHC.unsqueeze(1), k_BLGC, v_BLGC, visible_BSL).squeeze(1)
