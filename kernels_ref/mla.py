"""Multi-head latent attention of DeepSeek-V2 and V3, in the two forms that engines run.

Keys and values of all heads come from one latent per token, ``k_h = [W_UK_h c; k_R]`` and
``v_h = W_UV_h c`` with a rotary key part ``k_R`` that the heads share; only ``c`` and ``k_R`` are
cached. Prefill expands them; decode moves ``W_UK`` to the queries and ``W_UV`` behind the weighted
sum, so that every head attends to the same latents. Both compute the same function.
Left out: the projections before and after, and YaRN's factor on the scores.
Shape suffixes: B requests, S query tokens, L key positions, H heads, N channels without rotary
embedding, P rotary channels, Z channels of the latent, D = Z + P, V channels of a value.
"""

import torch
from torch import Tensor

from kernels_ref.attention import attention_decode_ragged, attention_prefill


def mla_prefill(
    q_nope_BSHN: Tensor,
    q_rope_BSHP: Tensor,
    latent_BLZ: Tensor,
    k_rope_BLP: Tensor,
    w_uk_HNZ: Tensor,
    w_uv_HVZ: Tensor,
) -> Tensor:
    """Causal latent attention of S new tokens, with keys and values expanded for every head.

    ``softmax([q_N; q_R] [W_UK c; k_R]^T / sqrt(N + P)) W_UV c``, query ``s`` at position
    ``L - S + s`` (a cached prefix before it).

    Parameters
    ----------
    q_nope_BSHN, q_rope_BSHP
        Queries, ``[B, S, H, N]`` and, rotary embedding applied, ``[B, S, H, P]``.
    latent_BLZ, k_rope_BLP
        Normalised latents ``[B, L, Z]`` and the rotary keys ``[B, L, P]`` that all heads share,
        the prefix first; ``L`` at least ``S``.
    w_uk_HNZ, w_uv_HVZ
        Up-projections, ``[H, N, Z]`` and ``[H, V, Z]``: each head's first N and last V rows of
        Hugging Face's ``kv_b_proj``.

    Returns
    -------
    Tensor
        ``[B, S, H, V]``.

    Raises
    ------
    ValueError
        When ``L`` is below ``S``.

    Notes
    -----
    Equations 9 to 19 of DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """
    k_nope_BLHN = torch.einsum("blz,hnz->blhn", latent_BLZ, w_uk_HNZ)
    v_BLHV = torch.einsum("blz,hvz->blhv", latent_BLZ, w_uv_HVZ)
    k_rope_BLHP = k_rope_BLP.unsqueeze(2).expand(-1, -1, w_uk_HNZ.shape[0], -1)
    q_BSHC = torch.cat([q_nope_BSHN, q_rope_BSHP], dim=-1)
    return attention_prefill(q_BSHC, torch.cat([k_nope_BLHN, k_rope_BLHP], dim=-1), v_BLHV)


def mla_decode(
    q_nope_BHN: Tensor,
    q_rope_BHP: Tensor,
    cache_BDL: Tensor,
    lengths: list[int],
    w_uk_HNZ: Tensor,
    w_uv_HVZ: Tensor,
) -> Tensor:
    """Latent attention of one new token per request, absorbed: no key or value is expanded.

    ``W_UV (softmax(([W_UK^T q_N; q_R] [c; k_R]^T) / sqrt(N + P)) c)``: grouped-query attention
    with one key of D channels per position, whose first Z channels are the value too.

    Parameters
    ----------
    q_nope_BHN, q_rope_BHP
        Queries of the new token, ``[B, H, N]`` and, rotary embedding applied, ``[B, H, P]``.
    cache_BDL
        Latents over rotary keys, transposed, ``[B, Z + P, L]``; the new token's own are in.
    lengths
        Filled positions of each request, within ``1..L``; what lies beyond is not read.
    w_uk_HNZ, w_uv_HVZ
        Up-projections as in `mla_prefill`, ``[H, N, Z]`` and ``[H, V, Z]``.

    Returns
    -------
    Tensor
        ``[B, H, V]``.

    Raises
    ------
    ValueError
        When a length is outside ``1..L``, or there is not one cache and one length per request.

    Notes
    -----
    DeepSeek-V2, arXiv:2405.04434, section 2.1.2 (absorption) and 2.1.3 (shared rotary keys).
    """
    scale = (q_nope_BHN.shape[-1] + q_rope_BHP.shape[-1]) ** -0.5
    q_latent_BHZ = torch.einsum("bhn,hnz->bhz", q_nope_BHN, w_uk_HNZ)
    keys_B1DL = cache_BDL.unsqueeze(1)
    out_BHZ = attention_decode_ragged(
        torch.cat([q_latent_BHZ, q_rope_BHP], dim=-1),
        keys_B1DL,
        keys_B1DL[:, :, : w_uk_HNZ.shape[2]].transpose(2, 3),
        lengths,
        scale=scale,
    )
    return torch.einsum("bhz,hvz->bhv", out_BHZ, w_uv_HVZ)
