"""What a calibration measures: random shapes of every operation, each at several sizes.

Shapes are drawn, log-uniformly, from the range of small decoders; a model that is predicted later
is none of them but by chance. A quarter of the shapes is held out of every fit by their hash. Each
operation is timed in several rounds, all of them in shuffled order, so that a slow drift of the
machine falls on all alike. Seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hwmodels.ops import (
    AttentionDecode,
    AttentionPrefill,
    Elementwise,
    Gemm,
    GroupedGemm,
    Op,
    Part,
    Permute,
    Route,
)
from kernels_ref.measure import time_after
from kernels_ref.operands import Operands
from kernels_ref.prepare import Prepared, prepare

ROUNDS = 3
"""Rounds over all operations."""
REPEATS = 5
"""Samples of an operation in a round."""
DISPLACED = 1.25
"""Other data read before each sample, over the last-level cache: more than it holds."""
NEAR = 0.4
"""The same of a layer that moves less than the cache holds."""
_LARGEST = 3e-2  # s: operations that take longer are left out, by the rates below
_RATE, _FLOW = 4e10, 5e9  # FLOP/s and bytes/s that hardly any machine is below
_DEPTH = {"norm": 4, "rope": 2, "activation": 3, "embedding": 2}
_Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation to be timed."""

    kernel: str
    """Key in a processor's ``kernels``."""
    op: Op
    """One row."""
    shape: dict[str, int]
    """What makes its shape, by name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A case with its times."""

    case: Case
    seconds: float
    """Median over the rounds' medians."""
    floor: float
    """Half the interquartile range of the rounds' medians over their median."""


def draw_cases(dtype: str = "fp32", *, seed: int = 0, scale: float = 1.0) -> list[Case]:
    """Draw the operations of a calibration.

    Parameters
    ----------
    dtype : str
        Of weights and activations: ``fp32`` or ``bf16``.
    seed : int
        Of the shapes.
    scale : float
        Multiplies the number of shapes.
    """
    rng = np.random.default_rng(seed)
    found: list[Case] = []
    for number, draw in _DRAWS:
        for _ in range(max(round(number * scale), 4)):
            found += [case for case in draw(rng, dtype) if _short(case.op)]
    return found


def measure_cases(
    found: Sequence[Case],
    operands: Operands,
    *,
    dtype: str = "fp32",
    rounds: int = ROUNDS,
    repeats: int = REPEATS,
    displaced: float = DISPLACED,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Sample]:
    """Time every case as it runs in a step.

    There all other layers pass through the caches between two calls, code and tables of the
    library with them; so much is read before each sample. Weights and caches of keys then come
    from memory, and the activations, which the kernel before has just written, are touched again.

    Parameters
    ----------
    found : sequence of Case
    operands : Operands
        Device and memory.
    dtype : str
        Of operations that state bytes only.
    rounds, repeats : int
        See `ROUNDS` and `REPEATS`.
    displaced : float
        See `DISPLACED`.
    seed : int
        Of the order.
    progress : callable
        Told how many timings of how many are done.
    """
    rng = np.random.default_rng(seed)
    device = str(operands.device)
    times = np.zeros((rounds, len(found)))
    largest = sorted(range(len(found)), key=lambda n: -found[n].op.bytes_moved().sum())  # type: ignore[union-attr]
    prepare(found[largest[0]].op, 0, operands, dtype=dtype)  # the shared buffer at its full size
    displace = _displacer(operands, displaced)
    for number in range(rounds):
        for done, at in enumerate(rng.permutation(len(found)).tolist()):
            prepared = prepare(found[at].op, 0, operands, dtype=dtype)

            def before(prepared: Prepared = prepared) -> None:
                displace()
                prepared.touch()

            timing = time_after(prepared.run, before, device=device, repeats=repeats)
            times[number, at] = timing.seconds
            progress(number * len(found) + done + 1, rounds * len(found))
    middle = np.median(times, axis=0)
    low, high = np.quantile(times, [0.25, 0.75], axis=0)
    spread = (high - low) / 2 / middle
    return [
        Sample(case=case, seconds=float(t), floor=float(f))
        for case, t, f in zip(found, middle, spread, strict=True)
    ]


def _displacer(operands: Operands, displaced: float) -> Callable[[], object]:
    """Return what passes other data through the caches; on the CPU without torch's code."""
    count = int(displaced * operands.cache_bytes) // 4
    if operands.device.type == "cpu":
        return np.ones(count, dtype=np.float32).max
    return torch.ones(count, device=operands.device).sum


def _short(op: Op) -> bool:
    flops = op.flops()[0] if hasattr(op, "flops") else 0.0
    return bool(flops / _RATE + op.bytes_moved()[0] / _FLOW < _LARGEST)  # type: ignore[union-attr]


def _some(rng: _Rng, low: int, high: int, step: int = 1) -> int:
    """Draw a whole multiple of ``step``, log-uniformly."""
    return max(step, round(float(np.exp(rng.uniform(np.log(low), np.log(high)))) / step) * step)


def _tokens(rng: _Rng, count: int, most: int) -> list[int]:
    """Draw different numbers of tokens: one in each of ``count`` octave bands up to ``most``."""
    edges = np.exp(np.linspace(0, np.log(most), count + 1))
    drawn = [_some(rng, a, b) for a, b in pairwise(edges)]
    return sorted(set(drawn))


def _gemm(rng: _Rng, dtype: str) -> Iterator[Case]:
    n, k = _some(rng, 128, 8192, 64), _some(rng, 128, 2048, 64)
    for m in _tokens(rng, 8, 1024):
        op = Gemm(m=m, n=n, k=k, weight_dtype=dtype, activation_dtype=dtype)
        yield Case(kernel="gemm", op=op, shape={"n": n, "k": k})


def _grouped(rng: _Rng, dtype: str) -> Iterator[Case]:
    """Experts' loads from even to steep: popularity log-normal, each token's experts distinct."""
    hidden, width = _some(rng, 128, 1024, 64), _some(rng, 128, 1024, 64)
    slots = int(rng.choice([8, 16, 32, 64]))
    top_k = int(rng.choice([1, 2, 4, 8]))
    for tokens in _tokens(rng, 7, 512):
        skew = rng.choice([0.0, 0.5, 1.0, 2.0])
        op = GroupedGemm(
            tokens_per_expert=_loads(rng, tokens, slots, top_k, skew)[None],
            hidden=hidden,
            width=width,
            gated=True,
            weight_dtype=dtype,
            activation_dtype=dtype,
        )
        yield Case(kernel="grouped_gemm", op=op, shape={"hidden": hidden, "width": width})


def _loads(rng: _Rng, tokens: int, slots: int, top_k: int, skew: float) -> NDArray[np.int64]:
    scores = skew * rng.standard_normal(slots) + rng.gumbel(size=(tokens, slots))
    chosen = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=slots)


def _heads(rng: _Rng, dtype: str) -> dict[str, Any]:
    groups, share = int(rng.choice([1, 2, 4, 8])), int(rng.choice([1, 2, 4, 8]))
    width = int(rng.choice([64, 128]))
    return {
        "num_heads": groups * share,
        "num_kv_heads": groups,
        "head_dim": width,
        "v_head_dim": width,
        "kv_elements": 2 * groups * width,
        "kv_dtype": dtype,
        "activation_dtype": dtype,
    }


def _shape(heads: dict[str, Any]) -> dict[str, int]:
    return {name: heads[name] for name in ("num_heads", "num_kv_heads", "head_dim")}


def _decode(rng: _Rng, dtype: str) -> Iterator[Case]:
    heads = _heads(rng, dtype)
    for tokens in _tokens(rng, 5, 256):
        length = _some(rng, 16, 2048)
        op = AttentionDecode(tokens=tokens, context=tokens * length, **heads)
        yield Case(kernel="attention_decode", op=op, shape=_shape(heads))


def _prefill(rng: _Rng, dtype: str) -> Iterator[Case]:
    heads = _heads(rng, dtype)
    for length in _tokens(rng, 4, 1024):
        requests = int(rng.choice([1, 2, 4]))
        pairs = requests * length * (length + 1) // 2
        op = AttentionPrefill(tokens=requests * length, pairs=pairs, **heads)
        yield Case(kernel="attention_prefill", op=op, shape=_shape(heads))


def _route(rng: _Rng, dtype: str) -> Iterator[Case]:
    experts = int(rng.choice([8, 16, 32, 64, 128, 256]))
    hidden, top_k = _some(rng, 128, 2048, 64), int(rng.choice([1, 2, 4, 8]))
    for tokens in _tokens(rng, 6, 1024):
        op = Route(
            tokens=tokens, hidden=hidden, experts=experts, top_k=top_k, activation_dtype=dtype
        )
        shape = {"hidden": hidden, "experts": experts, "top_k": top_k}
        yield Case(kernel="route", op=op, shape=shape)


def _moved(back: bool) -> Callable[[_Rng, str], Iterator[Case]]:
    def draw(rng: _Rng, dtype: str) -> Iterator[Case]:
        width = _some(rng, 128, 2048, 64)
        for tokens in _tokens(rng, 6, 1024):
            size = width * _size(dtype)
            op = Permute(rows=4 * tokens, row_bytes=size, back=back)
            kernel = "unpermute" if back else "permute"
            yield Case(kernel=kernel, op=op, shape={"row_bytes": size})

    return draw


def _part(part: Part) -> Callable[[_Rng, str], Iterator[Case]]:
    def draw(rng: _Rng, dtype: str) -> Iterator[Case]:
        hidden = _some(rng, 128, 2048, 64 * 8 if part == "rope" else 64)
        width = _DEPTH[part] * hidden
        for tokens in _tokens(rng, 6, 1024):
            size = width * _size(dtype)
            op = Elementwise(bytes=tokens * size, part=part, tokens=tokens)
            yield Case(kernel=part, op=op, shape={"token_bytes": size})

    return draw


def _stream(rng: _Rng, dtype: str) -> Iterator[Case]:
    for size in (_some(rng, 2**10, 2**26, 64) for _ in range(4)):
        yield Case(kernel="stream", op=Elementwise(bytes=size), shape={"bytes": size})


def _size(dtype: str) -> int:
    return {"fp32": 4, "bf16": 2}[dtype]


_DRAWS: tuple[tuple[int, Callable[[_Rng, str], Iterator[Case]]], ...] = (
    (36, _gemm),
    (32, _grouped),
    (28, _decode),
    (20, _prefill),
    (20, _route),
    (14, _moved(False)),
    (14, _moved(True)),
    (14, _part("norm")),
    (12, _part("rope")),
    (10, _part("activation")),
    (10, _part("embedding")),
    (10, _stream),
)
"""How many shapes of each."""
