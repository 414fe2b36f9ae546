"""Any operation of `hwmodels.ops` as a call that runs it once, ready to be timed.

One row of a column class becomes one kernel of this package on random data of the same shapes.
What a model keeps (weights, cached keys and values) is cold, see `kernels_ref.operands`; what the
kernel before has just written (activations) stays where it is, and results go to new tensors.
Collectives need a group of processes and are not prepared here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwmodels.kernels.attention_prefill import prompt
from hwmodels.ops import (
    AttentionDecode,
    AttentionPrefill,
    Copy,
    Elementwise,
    Gemm,
    GroupedGemm,
    Op,
    Permute,
    Route,
)
from kernels_ref.attention import attention_decode_ragged, attention_prefill
from kernels_ref.dense import linear, silu_mul
from kernels_ref.experts import grouped_ffn
from kernels_ref.operands import Operands, Rotation
from kernels_ref.permute import combine, permute, sort_by_expert
from kernels_ref.prepare_parts import PARTS
from kernels_ref.router import route_recorded

_Typed = Gemm | GroupedGemm | Route | AttentionDecode | AttentionPrefill
_RESERVED = 1.5  # of the mean context, the room that a request has in the cache
_CHOICES, _EXPERTS = (4, 2, 1), 32  # of the routing that sorts rows: nothing depends much on them
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Prepared:
    """One operation with its data; the memory goes when this and the `Operands` are dropped."""

    def __init__(
        self, call: Callable[..., Any], operands: Rotation, activations: tuple[Tensor, ...]
    ) -> None:
        self._call, self._operands, self._activations = call, operands, activations

    def touch(self) -> None:
        """Bring the activations back into the cache, as the kernel before has in a step.

        On the CPU without torch, whose code is then as cold as it is there.
        """
        for each in self._activations:
            if each.device.type == "cpu":
                each.view(torch.int16).numpy().max()
            else:
                each.mul_(1)

    def run(self) -> Any:
        """Execute the operation once, on the next set of operands; its result."""
        return self._call(*self._operands.next())

    @property
    def sets(self) -> tuple[tuple[Tensor, ...], ...]:
        """Operands of the calls, one set after the other; activations are not among them."""
        return self._operands.sets

    @property
    def bytes(self) -> int:
        """Memory that all sets cover together, bytes."""
        return self._operands.bytes


@dataclass(frozen=True)
class _Work:
    """How a row is executed."""

    call: Callable[..., Any]
    """Takes the operands that rotate."""
    shapes: tuple[tuple[int, ...], ...]
    """Of these."""
    dtype: torch.dtype
    on_host: bool = False


def prepare(
    op: Op, row: int, operands: Operands, *, cold: bool = True, dtype: str = "fp32"
) -> Prepared:
    """Make one row of an operation executable.

    Weights and caches rotate when cold: those of Gemm (`linear`), of GroupedGemm (`grouped_ffn`;
    slots without rows are left out), of Route (`route_recorded`, renormalised), of AttentionDecode
    (`attention_decode_ragged`; contexts from half to one and a half of the mean) and the prefix of
    AttentionPrefill (`attention_prefill` of equal prompts, or of one chunk). Permute sorts random
    choices and gathers the rows (`permute`), or adds them up again (`combine`); Elementwise is the
    kernel of its part, without one an addition that reads half of the bytes and writes half. Copy
    goes from one rotating place to another; to a CUDA device from page-locked host memory.

    Parameters
    ----------
    op
        The operation, in columns. The names of a copy's memories are not looked at.
    row
        Which of its rows.
    operands
        Device, cache and memory.
    cold
        Whether weights and caches have left the last-level cache when they are used.
    dtype
        Of the numbers of an operation that states bytes only: ``fp32`` or ``bf16``.

    Returns
    -------
    Prepared

    Raises
    ------
    ValueError
        When the operation is a collective, the row does not exist, is empty or not whole, its
        attention is not of equal sequences, a dtype is not executed, or the operands are too large.
    """
    if type(op) not in _MAKERS:
        names = ", ".join(kind.__name__ for kind in _MAKERS)
        raise ValueError(
            f"{type(op).__name__} is not executed by one process -- prepared are {names} -- time "
            "a collective in its group of processes"
        )
    if not 0 <= row < len(op):
        raise ValueError(
            f"row {row} -- {type(op).__name__} has rows 0 to {len(op) - 1} -- pick one"
        )
    operands.take_given()
    work = _MAKERS[type(op)](op, row, operands, dtype)
    rotation = operands.rotate(work.shapes, work.dtype, cold=cold, on_host=work.on_host)
    return Prepared(work.call, rotation, operands.take_given())


def _gemm(op: Gemm, row: int, operands: Operands, _: str) -> _Work:
    (m, n, k), kind = _whole(op, row, "m", "n", "k"), _one_dtype(op, "weight_dtype")
    x_MK = operands.activations(m, k, dtype=kind)
    return _Work(lambda w_NK: linear(x_MK, w_NK), ((n, k),), kind)


def _grouped(op: GroupedGemm, row: int, operands: Operands, _: str) -> _Work:
    kind = _one_dtype(op, "weight_dtype")
    counts = [_integer(op, row, "tokens_per_expert", count) for count in op.tokens_per_expert[row]]
    counts = [count for count in counts if count]  # the weights of the others are not touched
    _refuse_empty(op, row, "tokens_per_expert", sum(counts))
    x_SD = operands.activations(sum(counts), op.hidden, dtype=kind)
    activation = silu_mul if op.gated else torch.relu

    def call(w13_EGD: Tensor, w2_EDF: Tensor) -> Tensor:
        return grouped_ffn(x_SD, counts, w13_EGD, w2_EDF, activation=activation)

    active, up = len(counts), (op.matrices - 1) * op.width
    return _Work(call, ((active, up, op.hidden), (active, op.hidden, op.width)), kind)


def _route(op: Route, row: int, operands: Operands, _: str) -> _Work:
    (tokens,), kind = _whole(op, row, "tokens"), _one_dtype(op)
    x_TD = operands.activations(tokens, op.hidden, dtype=kind)
    recorded_TK = torch.argsort(torch.rand(tokens, op.experts), dim=1)[:, : op.top_k]
    recorded_TK = recorded_TK.to(operands.device)

    def call(w_ED: Tensor) -> object:
        return route_recorded(x_TD, w_ED, recorded_TK, renormalise=True)

    return _Work(call, ((op.experts, op.hidden),), kind)


def _decode(op: AttentionDecode, row: int, operands: Operands, _: str) -> _Work:
    """Contexts from half to one and a half of the mean; windows are applied in them already.

    A latent is key and, in its first channels, value.
    """
    (batch, context), kind = _whole(op, row, "tokens", "context"), _one_dtype(op, "kv_dtype")
    _check_cache(op, row)
    if context < batch:
        raise ValueError(
            f"row {row} of AttentionDecode: context {context} of {batch} tokens -- at least one "
            "key each, the token's own -- raise it"
        )
    lengths = _lengths(batch, context)
    q_BHC = operands.activations(batch, op.num_heads, op.head_dim, dtype=kind)
    room = _room(context // batch)
    keys = (batch, op.num_kv_heads, op.head_dim, room)
    values = (batch, op.num_kv_heads, room, op.v_head_dim)

    def grouped(keys_BGCL: Tensor, values_BGLV: Tensor) -> Tensor:
        return attention_decode_ragged(q_BHC, keys_BGCL, values_BGLV, lengths)

    def latent(keys_BGCL: Tensor) -> Tensor:
        return grouped(keys_BGCL, keys_BGCL[:, :, : op.v_head_dim].transpose(2, 3))

    return _Work(latent, (keys,), kind) if op.latent else _Work(grouped, (keys, values), kind)


def _prefill(op: AttentionPrefill, row: int, operands: Operands, _: str) -> _Work:
    (tokens, pairs), kind = _whole(op, row, "tokens", "pairs"), _one_dtype(op, "kv_dtype")
    _check_cache(op, row)
    batch, queries, before = _prompts(tokens, pairs, op.window, row)
    q_BSHC = operands.activations(batch, queries, op.num_heads, op.head_dim, dtype=kind)
    keys = (batch, op.num_kv_heads, op.head_dim, before + queries)
    values = (batch, op.num_kv_heads, before + queries, op.v_head_dim)

    def call(keys_BGCL: Tensor, values_BGLV: Tensor) -> Tensor:
        """One request after the other, on the cache as decode has it."""
        tensors = (q_BSHC, keys_BGCL.permute(0, 3, 1, 2), values_BGLV.transpose(1, 2))
        requests = zip(*(torch.split(tensor, 1) for tensor in tensors), strict=True)
        return torch.cat([attention_prefill(q, k, v, window=op.window) for q, k, v in requests])

    if before:
        return _Work(call, (keys, values), kind)
    keys_BGCL, values_BGLV = (operands.activations(*s, dtype=kind) for s in (keys, values))
    return _Work(lambda: call(keys_BGCL, values_BGLV), (), kind)  # projected just before


def _permute(op: Permute, row: int, operands: Operands, dtype: str) -> _Work:
    (rows, row_bytes), kind = _whole(op, row, "rows", "row_bytes"), _torch_dtype(dtype)
    if row_bytes % kind.itemsize:
        raise ValueError(
            f"row {row} of Permute: row_bytes {row_bytes} -- whole numbers of {dtype} "
            f"({kind.itemsize} bytes each) -- change it, or the dtype"
        )
    choices = next(k for k in _CHOICES if rows % k == 0)
    tokens, width = rows // choices, row_bytes // kind.itemsize
    ids_TK = torch.randint(_EXPERTS, (tokens, choices), device=operands.device)
    if op.back:
        order = sort_by_expert(ids_TK, _EXPERTS)
        y_SD, weights_TK = (
            operands.activations(*shape, dtype=kind) for shape in ((rows, width), (tokens, choices))
        )
        return _Work(lambda: combine(y_SD, weights_TK, order), (), kind)
    x_TD = operands.activations(tokens, width, dtype=kind)

    def call() -> Tensor:
        """Sort, gather, and tell the host how many rows each expert has."""
        order = sort_by_expert(ids_TK, _EXPERTS)
        order.counts_E.tolist()
        return permute(x_TD, order)

    return _Work(call, (), kind)


def _elementwise(op: Elementwise, row: int, operands: Operands, dtype: str) -> _Work:
    (moved,), kind = _whole(op, row, "bytes"), _torch_dtype(dtype)
    tokens = _integer(op, row, "tokens", np.asarray(op.tokens)[row])
    if op.part and tokens:
        width = round(moved / (tokens * kind.itemsize))
        call, shapes = PARTS[op.part](tokens, width, operands, kind)
        return _Work(call, shapes, kind)
    x_N = operands.activations(_numbers(moved / 2, kind), dtype=kind)
    y_N = torch.empty_like(x_N)
    return _Work(lambda: torch.add(x_N, 1, out=y_N), (), kind)


def _copy(op: Copy, row: int, operands: Operands, dtype: str) -> _Work:
    """Copy within the host, between two places of the rotating memory; to CUDA from the host."""
    (moved,), kind = _whole(op, row, "bytes"), _torch_dtype(dtype)
    numbers = _numbers(moved, kind)
    if operands.device.type == "cpu":
        both = ((numbers,), (numbers,))
        return _Work(lambda source_N, target_N: target_N.copy_(source_N), both, kind)
    target_N = torch.empty(numbers, dtype=kind, device=operands.device)

    def call(source_N: Tensor) -> Tensor:
        return target_N.copy_(source_N, non_blocking=True)

    return _Work(call, ((numbers,),), kind, on_host=True)


_MAKERS: dict[type, Callable[[Any, int, Operands, str], _Work]] = {
    Gemm: _gemm,
    GroupedGemm: _grouped,
    Route: _route,
    AttentionDecode: _decode,
    AttentionPrefill: _prefill,
    Permute: _permute,
    Elementwise: _elementwise,
    Copy: _copy,
}


def _torch_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(
            f"dtype {name!r} -- executed are {', '.join(_DTYPES)} -- choose one of them"
        )
    return _DTYPES[name]


def _one_dtype(op: _Typed, stored: str = "activation_dtype") -> torch.dtype:
    """Return the dtype of activations and stored operands; the place for quantised weights."""
    activations, kept = op.activation_dtype, getattr(op, stored)
    if activations != kept:
        raise ValueError(
            f"{type(op).__name__}: {stored} {kept} with activations in {activations} -- executed "
            "are products of one dtype -- make them equal"
        )
    return _torch_dtype(kept)


def _whole(op: Op, row: int, *names: str) -> list[int]:
    """Return the named columns of one row as integers above 0."""
    numbers = [_integer(op, row, name, getattr(op, name)[row]) for name in names]
    for name, number in zip(names, numbers, strict=True):
        _refuse_empty(op, row, name, number)
    return numbers


def _integer(op: Op, row: int, name: str, number: float) -> int:
    if number != int(number):
        raise ValueError(
            f"row {row} of {type(op).__name__}: {name} {number} -- whole numbers can be executed "
            "-- round it"
        )
    return int(number)


def _refuse_empty(op: Op, row: int, name: str, number: int) -> None:
    if not number:
        raise ValueError(
            f"row {row} of {type(op).__name__}: {name} 0, nothing to execute -- at least 1 -- "
            "leave the row out"
        )


def _lengths(batch: int, context: int) -> list[int]:
    """Return lengths of requests that came at different times, in random order, with this sum."""
    mean = context / batch
    drawn = np.random.default_rng(batch).permutation(np.linspace(0.5, 1.5, batch + 2)[1:-1])
    ends = np.round(np.cumsum(drawn * mean)).astype(np.int64)
    ends[-1] = context
    lengths = np.maximum(np.diff(ends, prepend=0), 1)
    while (over := int(lengths.sum()) - context) > 0:  # of contexts of a token or two
        longest = np.argsort(-lengths)[:over]
        lengths[longest] -= lengths[longest] > 1
    return lengths.tolist()


def _room(length: int) -> int:
    """Return the tokens that a cache has room for, at a mean length."""
    return -(-int(_RESERVED * length + 1) // 64) * 64


def _numbers(size: float, dtype: torch.dtype) -> int:
    """Return how many numbers are about so many bytes."""
    return max(1, round(size / dtype.itemsize))


def _check_cache(op: AttentionDecode | AttentionPrefill, row: int) -> None:
    """Refuse a cache that is neither keys and values of each head nor one latent."""
    latent = isinstance(op, AttentionDecode) and op.latent
    expected = op.head_dim if latent else op.num_kv_heads * (op.head_dim + op.v_head_dim)
    if op.kv_elements != expected:
        raise ValueError(
            f"{type(op).__name__}: kv_elements {op.kv_elements} -- executed are keys and values "
            f"of every head, or one latent: {expected} here -- change it"
        )


def _prompts(tokens: int, pairs: int, window: int, row: int) -> tuple[int, int, int]:
    """Return sequences, queries of each, and cached tokens before them (see `prompt`)."""
    found = prompt(np.array([float(tokens)]), np.array([float(pairs)]), window)
    queries, before = (round(float(number[0])) for number in found)
    batch = max(1, tokens // queries)
    seen = np.arange(before + 1, before + queries + 1)
    seen = np.minimum(seen, window) if window else seen
    if (batch * queries, batch * int(seen.sum())) != (tokens, pairs):
        raise ValueError(
            f"row {row} of AttentionPrefill: {tokens} tokens with {pairs} pairs -- executed are "
            "equal prompts of s tokens, s (s + 1) / 2 pairs each less what a window hides, or one "
            "chunk behind a cached prefix -- ask for such"
        )
    return batch, queries, before
