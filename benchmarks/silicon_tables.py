"""Read the measured kernel tables of the wheel aiconfigurator-core as features of a roofline.

Each row becomes: seconds measured, bytes moved, FLOP on padded rows for each candidate tile,
number of separate weight blocks, and a hash of its shape (which decides fit or held-out). Units
in the tables differ: milliseconds in gemm, moe, attention and NCCL, microseconds in DeepEP;
message sizes of NCCL and of the all-reduces are in elements, not bytes (int8 takes half of half).
"""

from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels import AttentionDecode, AttentionPrefill, Device, Gemm, GroupedGemm

TILES = (1, 16, 32, 64, 128)
ENGINES = ("trtllm", "sglang")  # vLLM's tables hold host time in part (excluded as a whole)
GPUS = {
    "a100": "a100_sxm",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "gb200": "gb200",
    "l40s": "l40s",
}
DTYPES = {
    "bfloat16": "bf16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "nvfp4",
    "w4a16_mxfp4": "mxfp4",
}
ROWS = 6000  # rows of a table that are used, drawn by hash
DRAWS = 5  # draws of power-law loads, as many as were averaged when measuring


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Measured rows of one kernel; every array is [n], ``padded`` [tiles, n]."""

    seconds: NDArray[np.float64]
    moved: NDArray[np.float64]
    blocks: NDArray[np.float64]
    permuted: NDArray[np.float64]
    padded: NDArray[np.float64]
    held_out: NDArray[np.bool_]
    engine: NDArray[np.object_]

    def take(self, mask: NDArray[np.bool_]) -> "Rows":
        """Return the rows that the mask keeps."""
        return Rows(**{f.name: getattr(self, f.name)[..., mask] for f in fields(self)})


def join(parts: list[Rows]) -> Rows | None:
    """Put the rows of several engines behind each other."""
    if not parts:
        return None
    return Rows(
        **{
            f.name: np.concatenate([getattr(p, f.name) for p in parts], axis=-1)
            for f in fields(Rows)
        }
    )


def tables(gpu: str, folder: str, engine: str, name: str) -> Path | None:
    """Return the newest version's table, or None."""
    found = versions(gpu, folder, engine, name)
    return found[-1] if found else None


def versions(gpu: str, folder: str, engine: str, name: str) -> list[Path]:
    """Return the tables of all versions, oldest first."""
    spec = find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        raise SystemExit("install aiconfigurator-core==0.12.0 to fit the catalog")
    root = Path(spec.origin).parent / "systems" / "data" / GPUS[gpu] / folder / engine
    return sorted(root.glob(f"*/{name}.parquet"), key=lambda p: _version(p.parent.name))


def _version(text: str) -> list[int]:
    digits = "".join(c if c.isdigit() else " " for c in text)
    return [int(d) for d in digits.split()]


def _hash(frame: pd.DataFrame, columns: list[str]) -> pd.Series:
    return pd.util.hash_pandas_object(frame[columns].astype(str).agg("|".join, axis=1), index=False)


def sample(
    frame: pd.DataFrame, column: str, dtype: str, shape: list[str], keys: list[str]
) -> pd.DataFrame:
    """Rows of one dtype; the fastest kernel of each case; a hash sample; the held-out shapes."""
    frame = frame[frame[column].map(DTYPES.get) == dtype]
    frame = frame.groupby(keys, as_index=False)[["latency"]].min()
    if len(frame) > ROWS:
        order = np.argsort(_hash(frame, keys))[:ROWS]
        frame = frame.iloc[np.sort(order)].reset_index(drop=True)
    frame["held_out"] = _hash(frame, shape) % 4 == 0 if len(frame) else False
    return frame


def gemm(gpu: str, engine: str, dtype: str) -> Rows | None:
    path = tables(gpu, "gemm", engine, "gemm_perf")
    if path is None:
        return None
    table = pd.read_parquet(path)
    frame = sample(table, "gemm_dtype", dtype, ["n", "k"], ["m", "n", "k"])
    if frame.empty:
        return None
    m, n, k = (frame[c].to_numpy() for c in ("m", "n", "k"))
    op = Gemm(m=m, n=n, k=k, weight_dtype=dtype, activation_dtype="bf16")
    padded = np.stack([2.0 * (np.ceil(m / t) * t) * n * k for t in TILES])
    return _rows(frame, op.bytes_moved(), 1.0, 0.0, padded, engine)


def moe(gpu: str, engine: str, dtype: str) -> Rows | None:
    """Whole fused expert layers (permutation, products, weighted sum), newest version with any."""
    shape = ["hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"]
    keys = [*shape, "num_tokens", "distribution"]
    for path in reversed(versions(gpu, "moe", engine, "moe_perf")):
        frame = pd.read_parquet(path)
        frame = frame[~frame.kernel_source.str.contains("nongated|situ")]
        if engine == "sglang":  # beyond EP 1 it presents every token to every rank
            frame = frame[frame.moe_ep_size == 1]
        frame = sample(frame, "moe_dtype", dtype, shape, keys)
        if not frame.empty:
            groups = frame.groupby(["hidden_size", "inter_size", "num_experts", "moe_tp_size"])
            return join([_moe_group(g, key, dtype, engine) for key, g in groups])
    return None


def _moe_group(frame: pd.DataFrame, key: tuple[Any, ...], dtype: str, engine: str) -> Rows:
    """One expert geometry; features are averaged over the draws of a power law."""
    hidden, inter, experts, tp = (int(x) for x in key)
    moved, blocks, permuted = np.zeros((3, len(frame)))
    padded = np.zeros((len(TILES), len(frame)))
    for draw in range(DRAWS):
        counts = _busiest_rank_loads(frame, experts, np.random.default_rng(draw))
        op = GroupedGemm(
            tokens_per_expert=counts,
            hidden=hidden,
            width=max(inter // tp, 1),
            gated=True,
            weight_dtype=dtype,
            activation_dtype="bf16",
        )
        moved += op.bytes_moved() / DRAWS
        blocks += op.active() / DRAWS
        permuted += 2 * 2 * hidden * op.rows() / DRAWS  # read and write of bf16 rows
        rows = np.stack([(-(-counts // t) * t).sum(axis=1) for t in TILES])
        padded += rows * op.flops_per_row() / DRAWS
    return _rows(frame, moved, blocks, permuted, padded, engine)


def _busiest_rank_loads(
    frame: pd.DataFrame, experts: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Tokens of each local expert on the rank that was timed, zero beyond its experts."""
    counts = np.zeros((len(frame), experts), dtype=np.int64)
    for row, (tokens, k, ep, kind) in enumerate(
        zip(frame.num_tokens, frame.topk, frame.moe_ep_size, frame.distribution, strict=True)
    ):
        local = max(experts // ep, 1)
        if kind == "balanced":
            pairs = -(-tokens * k // ep)
            counts[row, :local] = pairs // local + (np.arange(local) < pairs % local)
        else:
            drawn = _power_law(int(tokens), int(k), experts, float(kind.split("_")[-1]), rng)
            ranks = drawn[: local * ep].reshape(ep, local)
            counts[row, :local] = ranks[ranks.sum(axis=1).argmax()]
    return counts


def _power_law(
    tokens: int, k: int, experts: int, alpha: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw loads as the tables' authors did: x ~ x^-alpha, scaled to tokens x k, clamped."""
    low, high = (0.01, 2.0) if tokens * k <= experts else (1.0, max(0.8 * tokens, 1.01))
    e = 1 - alpha
    u = rng.random(experts)
    x = (low**e + u * (high**e - low**e)) ** (1 / e)
    counts = np.minimum(np.round(x / x.sum() * tokens * k).astype(np.int64), tokens)
    missing = tokens * k - int(counts.sum())
    order = rng.permutation(experts)
    while missing:
        room = counts < tokens if missing > 0 else counts > 0
        chosen = order[room[order]][: abs(missing)]
        counts[chosen] += np.sign(missing)
        missing = tokens * k - int(counts.sum())
    return counts


def attention(gpu: str, engine: str, phase: str, kv: str) -> Rows | None:
    path = tables(gpu, "attention", engine, f"{phase}_attention_perf")
    if path is None:
        return None
    frame = pd.read_parquet(path)
    if "window_size" in frame:  # absent in older tables, all of full attention
        frame = frame[frame.window_size <= 0]
    frame = frame[(frame.attn_dtype == "bfloat16") & (frame.kv_cache_dtype.map(DTYPES.get) == kv)]
    if phase == "context":
        frame = frame[frame.step == 0]
    shape = ["num_heads", "num_key_value_heads", "head_dim"]
    frame = frame.groupby([*shape, "batch_size", "isl", "step"], as_index=False)[["latency"]].min()
    frame = frame[frame.num_key_value_heads > 0].reset_index(drop=True)
    if frame.empty:
        return None
    frame["held_out"] = _hash(frame, shape) % 4 == 0
    parts = [_attention_group(g, key, phase, kv, engine) for key, g in frame.groupby(shape)]
    return join(parts)


def _attention_group(
    frame: pd.DataFrame, key: tuple[Any, ...], phase: str, kv: str, engine: str
) -> Rows:
    heads, kv_heads, dim = (int(x) for x in key)
    batch, isl, step = (frame[c].to_numpy() for c in ("batch_size", "isl", "step"))
    geometry: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": dim,
        "v_head_dim": dim,
        "kv_elements": 2 * kv_heads * dim,
        "kv_dtype": kv,
        "activation_dtype": "bf16",
    }
    op: AttentionDecode | AttentionPrefill
    if phase == "generation":
        op = AttentionDecode(tokens=batch, context=batch * (isl + step), **geometry)
    else:
        op = AttentionPrefill(tokens=batch * isl, pairs=batch * isl * (isl + 1) // 2, **geometry)
    padded = np.tile(op.flops(), (len(TILES), 1))
    return _rows(frame, op.bytes_moved(), 0.0, 0.0, padded, engine)


def _rows(
    frame: pd.DataFrame,
    moved: NDArray[np.float64],
    blocks: NDArray[np.float64] | float,
    permuted: NDArray[np.float64] | float,
    padded: NDArray[np.float64],
    engine: str,
) -> Rows:
    n = len(frame)
    return Rows(
        seconds=frame.latency.to_numpy() * 1e-3,
        moved=moved,
        blocks=np.broadcast_to(blocks, n),
        permuted=np.broadcast_to(permuted, n),
        padded=padded,
        held_out=frame.held_out.to_numpy(dtype=bool),
        engine=np.full(len(frame), engine, dtype=object),
    )


def believable(rows: Rows, device: Device, dtype: str) -> NDArray[np.bool_]:
    """Rows neither faster than the data sheet allows nor ten times slower than it explains."""
    bound = np.maximum(
        rows.padded[0] / device.flops(dtype).value, rows.moved / device.memory.bandwidth.value
    )
    return (rows.seconds >= bound) & (rows.seconds <= 10 * (bound + 10e-6))


_CUSTOM = ("trtllm", "custom_allreduce_perf")


def collective(gpu: str, name: str) -> pd.DataFrame:
    """NCCL, or the custom all-reduce: columns bytes sent per port, seconds, group.

    An all-reduce moves 2 (r-1)/r of the tensor per port, its halves and an all-to-all (r-1)/r.
    """
    custom = name == "all_reduce"
    path = tables(gpu, "comm", *(_CUSTOM if custom else ("nccl", "nccl_perf")))
    if path is None:
        return pd.DataFrame()
    frame = pd.read_parquet(path)
    if not custom:
        called = name.replace("all_to_all", "alltoall")
        frame = frame[(frame.op_name == called) & (frame.nccl_dtype == "half")]
    ranks = frame.num_gpus
    share = (ranks - 1) / ranks * (2 if name == "all_reduce" else 1)
    out = pd.DataFrame(
        {"bytes": 2.0 * frame.message_size * share, "seconds": frame.latency * 1e-3, "group": ranks}
    )
    out["held_out"] = _hash(frame, ["message_size"]).to_numpy() % 4 == 0
    return out.groupby(["bytes", "group", "held_out"], as_index=False)[["seconds"]].median()


def deepep(gpu: str, nodes: int) -> pd.DataFrame:
    """DeepEP low latency: bytes through a GPU's port (into its node, or the network), seconds."""
    path = tables(gpu, "comm", "sglang", "wideep_deepep_ll_perf")
    if nodes > 1:  # only the older version was measured across nodes
        path = path.parent.parent / "0.5.6.post2" / path.name if path is not None else None
    if path is None or not path.is_file():
        return pd.DataFrame()
    frame = pd.read_parquet(path)
    frame = frame[frame.node_num == nodes]
    held = _hash(frame, ["hidden_size", "num_topk", "num_experts", "num_token"]) % 4 == 0
    ranks = 8 * nodes
    share = (ranks - 8) / ranks if nodes > 1 else 7 / 8
    parts = [
        pd.DataFrame(
            {
                "bytes": share * 1e9 * frame[f"{p}_bandwidth_gbps"] * frame[f"{p}_avg_t_us"] * 1e-6,
                "seconds": frame[f"{p}_avg_t_us"] * 1e-6,
                "group": ranks,
                "held_out": held,
            }
        )
        for p in ("dispatch", "combine")
    ]
    return pd.concat(parts, ignore_index=True)


def nvlink_alltoall(gpu: str) -> pd.DataFrame:
    """TensorRT-LLM's combine inside an NVL72, 2 to 64 ranks: bytes sent per rank, seconds.

    The tokens' experts are spread evenly, so a token reaches min(k, ranks) ranks, each with one
    bf16 row; the share (ranks - 1) / ranks of them leaves the rank. The faster kernel counts.
    """
    path = tables(gpu, "comm", "trtllm", "trtllm_alltoall_perf")
    if path is None:
        return pd.DataFrame()
    frame = pd.read_parquet(path)
    frame = frame[frame.op_name == "alltoall_combine"]
    keys = ["num_tokens", "hidden_size", "topk", "moe_ep_size"]
    frame = frame.groupby(keys, as_index=False)[["latency"]].min()
    ranks = frame.moe_ep_size
    copies = np.minimum(frame.topk, ranks) * (ranks - 1) / ranks
    return pd.DataFrame(
        {
            "bytes": 2.0 * frame.num_tokens * frame.hidden_size * copies,
            "seconds": frame.latency * 1e-3,
            "group": ranks,
            "held_out": (_hash(frame, keys) % 4 == 0).to_numpy(),
        }
    )
