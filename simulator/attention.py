"""The attention block of a layer as work: grouped-query, or multi-head latent (MLA).

A rank's decode tokens read the cached keys and values of their own requests; prefill tokens
multiply with the (query, key) pairs that causality and windows leave. Heads are divided over the
ranks of a tp group, key/value heads with them as far as there are any; a latent is on every rank.
"""

from typing import TypedDict

import numpy as np

from hwmodels.ops import (
    AllReduce,
    AttentionDecode,
    AttentionPrefill,
    Op,
    ReduceScatter,
    Stage,
)
from simulator.work import Rows, Work


class _Heads(TypedDict):
    """What both attention kernels need to know of the heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    kv_elements: int
    kv_dtype: str
    activation_dtype: str


def attention(r: Rows) -> list[Work]:
    """Attention of every layer: norm, projections, scores, output, and the sum over the tp group.

    Where the experts take each rank's slice of the tokens, the sum is a reduce-scatter.
    """
    a = r.attention
    kernels = _mla(r) if a.kind == "mla" else _gqa(r)
    out = _project(r, "o", r.model.hidden_size, a.num_heads * a.v_head_dim)
    whole = r.all_layers if r.layout.fused else r.dense_layers
    scattered = () if r.layout.fused else r.moe_layers
    return [
        r.norm("attention norm", r.all_layers),
        *kernels,
        out,
        *r.over_tp(AllReduce, "attention all-reduce", whole),
        *r.over_tp(ReduceScatter, "attention reduce-scatter", scattered),
    ]


def _gqa(r: Rows) -> list[Work]:
    a = r.attention
    q, k, v = (
        a.num_heads * a.head_dim,
        a.num_kv_heads * a.head_dim,
        a.num_kv_heads * a.v_head_dim,
    )
    return [
        _project(r, "qkv", q + k + v, r.model.hidden_size),
        r.stream("rope and kv write", Stage.ATTENTION, 2 * (q + k + v), r.all_layers, part="rope"),
        *_scores(
            r,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            v_head_dim=a.v_head_dim,
            kv_elements=a.kv_elements_per_token,
            kv_dtype=r.model.kv_dtype,
        ),
    ]


def _mla(r: Rows) -> list[Work]:
    """Latent attention: absorbed in decode (scores against the latent), expanded in prefill."""
    a, every = r.attention, r.all_layers
    rank, rope, nope = a.kv_lora_rank or 0, a.qk_rope_head_dim or 0, a.qk_nope_head_dim or 0
    hidden, heads = r.model.hidden_size, a.num_heads
    queries = heads * (nope + rope)
    down = (a.q_lora_rank or queries) + rank + rope
    works = [_project(r, "q and kv down", down, hidden)]
    if a.q_lora_rank:
        works.append(_project(r, "q up", queries, a.q_lora_rank))
    written = 2 * (queries + rank + rope)
    works.append(r.stream("rope and kv write", Stage.ATTENTION, written, every, part="rope"))
    if r.loads.decode:
        # per-head products as one GEMM of the same FLOPs and weight bytes
        return [
            *works,
            _project(r, "q absorb", heads * rank, nope),
            *_scores(
                r,
                num_kv_heads=1,
                head_dim=rank + rope,
                v_head_dim=rank,
                kv_elements=rank + rope,
                kv_dtype=r.model.kv_dtype,
            ),
            _project(r, "v absorb", a.v_head_dim, heads * rank),
        ]
    return [
        *works,
        _project(r, "kv up", heads * (nope + a.v_head_dim), rank),
        *_scores(
            r,
            num_kv_heads=heads,
            head_dim=nope + rope,
            v_head_dim=a.v_head_dim,
            kv_elements=heads * (nope + rope + a.v_head_dim),
            kv_dtype=r.dtype,  # keys and values were just expanded
        ),
    ]


def _scores(
    r: Rows, *, num_kv_heads: int, head_dim: int, v_head_dim: int, kv_elements: int, kv_dtype: str
) -> list[Work]:
    """Scores, softmax and values, the only kernel that sees the context: a work for each window."""
    heads: _Heads = {
        "num_heads": r.attention.num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "v_head_dim": v_head_dim,
        "kv_elements": kv_elements,
        "kv_dtype": kv_dtype,
        "activation_dtype": r.dtype,
    }
    windows = r.model.attention.windows
    return [_score(r, heads, window) for window in dict.fromkeys(windows)]


def _score(r: Rows, heads: _Heads, window: int | None) -> Work:
    """Scores of the layers with this window."""
    layers = tuple(at for at, w in enumerate(r.model.attention.windows) if w == window)
    keys = r.loads.context[:, layers]
    tokens = np.broadcast_to(r.loads.tokens[:, None, :], keys.shape).ravel()
    op: Op
    if r.loads.decode:
        op = AttentionDecode(tokens=tokens, context=keys.ravel(), window=window or 0, **heads)
    else:
        op = AttentionPrefill(tokens=tokens, pairs=keys.ravel(), window=window or 0, **heads)
    return Work(name="attention", stage=Stage.ATTENTION, op=op, shape=keys.shape, layers=layers)


def _project(r: Rows, name: str, n: int, k: int) -> Work:
    return r.gemm(name, Stage.ATTENTION, n, k, r.all_layers)
