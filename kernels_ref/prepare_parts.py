"""The elementwise kernels of a step as calls: norm, rotary embedding, activation, embedding.

An `Elementwise` operation states bytes and how many elements a token has of them; what reads and
writes these elements is the decoder's own kernel. Activations stay where they are; tables and
caches rotate.
Shape suffixes: T tokens, D model width, F expert width, G key/value heads, J query and key heads,
C channels of a head, R = C / 2, L positions, Q elements of queries, keys and values, V rows of the
embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hwmodels.ops import Part
from kernels_ref.attention import write_kv
from kernels_ref.dense import add_rms_norm, rope, rope_table, silu_mul
from kernels_ref.operands import Operands

Shapes = tuple[tuple[int, ...], ...]
Made = tuple[Callable[..., Any], Shapes]
"""The call, and the shapes of the operands that rotate through it."""
_HEAD = 64  # channels of a head, where the elements of a token leave it open
_POSITIONS = 256  # of the cache that new keys are written to
_VOCABULARY = 8192


def _norm(tokens: int, width: int, operands: Operands, dtype: torch.dtype) -> Made:
    """Residual add and norm: two tensors in, two out; the residual is a whole block old."""
    hidden = width // 4
    x_TD = operands.activations(tokens, hidden, dtype=dtype)
    residual_TD = operands.activations(tokens, hidden, dtype=dtype, fresh=False)
    gains_D = operands.activations(hidden, dtype=dtype, fresh=False)
    return lambda: add_rms_norm(x_TD, residual_TD, gains_D), ()


def _rope(tokens: int, width: int, operands: Operands, dtype: torch.dtype) -> Made:
    """Rotate queries and keys in place of their projection, write keys and values to the cache.

    Half of the elements are read: twice as many query heads as key heads, as many value heads.
    """
    groups = max(1, round(width / 2 / _HEAD / 4))
    heads = max(1, round(width / 2 / _HEAD) - 2 * groups)
    qkv_TQ = operands.activations(tokens, (heads + 2 * groups) * _HEAD, dtype=dtype)
    device = operands.device
    position_T = torch.randint(_POSITIONS, (tokens,), device=device)
    request_T = torch.arange(tokens, device=device)
    cos_TR, sin_TR = rope_table(position_T, _HEAD, dtype=dtype)

    def call(keys_TGCL: Tensor, values_TGLC: Tensor) -> None:
        qk_TQ, v_TQ = torch.split(qkv_TQ, [(heads + groups) * _HEAD, groups * _HEAD], dim=1)
        qk_TJC = rope(torch.unflatten(qk_TQ, 1, (heads + groups, _HEAD)), cos_TR, sin_TR)
        k_TGC = qk_TJC[:, heads:]
        v_TGC = torch.unflatten(v_TQ, 1, (groups, _HEAD))
        write_kv(keys_TGCL, values_TGLC, k_TGC, v_TGC, request_T, position_T)

    cache = (tokens, groups, _HEAD, _POSITIONS)
    return call, (cache, (*cache[:2], _POSITIONS, _HEAD))


def _activation(tokens: int, width: int, operands: Operands, dtype: torch.dtype) -> Made:
    """Gate and up in, their gated product out."""
    gate_up_TG = operands.activations(tokens, 2 * (width // 3), dtype=dtype)
    return lambda: silu_mul(gate_up_TG), ()


def _embedding(tokens: int, width: int, operands: Operands, dtype: torch.dtype) -> Made:
    """Rows of a table, looked up."""
    ids_T = torch.randint(_VOCABULARY, (tokens,), device=operands.device)
    return lambda table_VD: table_VD[ids_T], ((_VOCABULARY, width // 2),)


PARTS: dict[Part, Callable[[int, int, Operands, torch.dtype], Made]] = {
    "norm": _norm,
    "rope": _rope,
    "activation": _activation,
    "embedding": _embedding,
}
"""How each kind of elementwise work is executed, from tokens, elements of a token, and a dtype."""
