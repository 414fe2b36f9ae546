"""Measured tables of expert layers under wide expert parallelism, with and without balancing.

TensorRT-LLM's rows time one rank on the tokens that reach it (their number is recorded), with and
without EPLB and spare slots; one unseeded draw was timed, so draws are taken whose number of such
tokens comes nearest to the recorded one, made by the rule of that time (`evened`). SGLang's rows
time DeepEP's expert computation alone: ``context`` on padded contiguous rows, ``generation`` on
masked ones; five draws were averaged.
"""

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.cluster import load_device
from hwmodels.ops import GroupedGemm
from hwmodels.silicon.eplb import balanced_ranks
from hwmodels.silicon.loads import DRAWS, power_law, rounded
from hwmodels.silicon.moe import FORMATS, MoeTable
from hwmodels.silicon.moe_rules import unbelievable
from hwmodels.silicon.table import Dropped
from hwmodels.silicon.wheel import newest, read, source

SHAPE = (
    "hidden_size", "inter_size", "num_experts", "topk", "moe_tp_size", "moe_ep_size", "num_slots",
)  # fmt: skip
SWEPT = ("num_tokens",)
_DRAWN = 24  # draws among which those nearest to the recorded tokens are taken
_TABLES = {
    "trtllm": ("wideep_moe_perf",),
    "sglang": ("wideep_context_moe_perf", "wideep_generation_moe_perf"),
}
Counts = NDArray[np.int64]


def wideep_tables(device: str, engines: Sequence[str] = ("trtllm", "sglang")) -> list[MoeTable]:
    """Return the measured rows of wide expert parallelism.

    Parameters
    ----------
    device : str
        Catalog name of a GPU with tables.
    engines : sequence of str
        Engines that are read; those without such tables are passed over.

    Returns
    -------
    list of MoeTable
        One per engine, format and kernel. ``frame`` holds `SHAPE`, ``distribution`` (uniform or
        power_law_<exponent>), ``eplb`` (whether balanced), ``num_tokens`` of all ranks together,
        and ``seconds``. Operations carry in ``tokens`` those that the rank is shown.

    Raises
    ------
    InputError
        If the wheel is not installed or the device has no tables or no catalog entry.
    """
    tables = []
    for engine in engines:
        for name in _TABLES.get(engine, ()):
            path = newest(device, "moe", engine, name)
            if path is None:
                continue
            rows = read(path)
            rows["dtype"] = rows["moe_dtype"].map(FORMATS)
            rows["eplb"] = rows["distribution"].str.endswith("_eplb")
            rows["distribution"] = rows["distribution"].str.removesuffix("_eplb")
            if "num_slots" not in rows:
                rows["num_slots"] = rows["num_experts"]
            phase = name.removeprefix("wideep_").removesuffix("_perf").removesuffix("_moe")
            for (dtype, kernel), group in rows.groupby(["dtype", "kernel_source"]):
                label = str(kernel) if engine == "trtllm" else f"{kernel} {phase}"
                parts, more, frame, dropped = _built(group, str(dtype), device, phase)
                if parts:
                    tables.append(
                        MoeTable(
                            source=source(device, engine, path), op="grouped_gemm",
                            dtype=str(dtype), kernel=label, parts=parts, more=more, frame=frame,
                            shape=SHAPE, swept=SWEPT, dropped=dropped,
                        )
                    )  # fmt: skip
    return tables


def _built(
    rows: pd.DataFrame, dtype: str, device: str, phase: str
) -> tuple[list[GroupedGemm], list[list[GroupedGemm]], pd.DataFrame, tuple[Dropped, ...]]:
    limits = load_device(device).limits(dtype)
    keys = [*SHAPE, "distribution", "eplb", *SWEPT]
    if "rank0_num_tokens" in rows:
        keys.append("rank0_num_tokens")
    valid = rows[rows["latency"] > 0]
    once = valid.groupby(keys, as_index=False)[["latency"]].median()
    once["seconds"] = once["latency"] * 1e-3
    parts, more, frames = [], [], []
    fast = late = 0
    for _, group in once.groupby(list(SHAPE)):
        counts, shown = _group_loads(group, phase)
        draws = [_operation(group, c, shown, dtype) for c in counts]
        beats, slow = unbelievable(group["seconds"].to_numpy(), draws, limits)
        fast, late = fast + int(beats.sum()), late + int(slow.sum())
        kept = ~beats & ~slow
        if kept.any():
            first, *others = [_operation(group[kept], c[kept], shown[kept], dtype) for c in counts]
            parts.append(first)
            more.append(others)
            frames.append(group[kept])
    frame = pd.concat(frames, ignore_index=True) if frames else once.iloc[:0]
    dropped = (
        Dropped(rule="no measurement", rows=len(rows) - len(valid)),
        Dropped(rule="measured more than once", rows=len(valid) - len(once)),
        Dropped(rule="beats the peaks", rows=fast),
        Dropped(rule="over ten times its bound", rows=late),
    )
    columns = [*SHAPE, "distribution", "eplb", *SWEPT, "seconds"]
    return parts, more, frame[columns], tuple(d for d in dropped if d.rows)


def _operation(
    group: pd.DataFrame, counts: Counts, shown: NDArray[np.int64], dtype: str
) -> GroupedGemm:
    first = group.iloc[0]
    return GroupedGemm(
        tokens_per_expert=counts,
        hidden=int(first["hidden_size"]),
        width=max(int(first["inter_size"]) // int(first["moe_tp_size"]), 1),
        gated=True,
        weight_dtype=dtype,
        activation_dtype="bf16",
        tokens=shown,
    )


def _group_loads(group: pd.DataFrame, phase: str) -> tuple[Counts, NDArray[np.int64]]:
    """Return loads [draws, n, slots of a rank] and the tokens shown to it [n]; one shape."""
    first = group.iloc[0]
    experts, top_k, ranks, slots = (
        int(first[c]) for c in ("num_experts", "topk", "moe_ep_size", "num_slots")
    )
    tokens = group["num_tokens"].to_numpy()
    recorded = group["rank0_num_tokens"].to_numpy() if "rank0_num_tokens" in group else None
    out = np.empty((DRAWS, len(group), slots // ranks), dtype=np.int64)
    eplb = group["eplb"].to_numpy()
    number = DRAWS if recorded is None else _DRAWN
    drawn = [
        _drawn(int(t), top_k, experts, 1 if even else ranks, str(d), number, recorded is None)
        for t, d, even in zip(tokens, group["distribution"], eplb, strict=True)
    ]
    if eplb.any():
        together = np.concatenate(
            [c[:, 0] for c, balanced in zip(drawn, eplb, strict=True) if balanced]
        )
        after = iter(
            balanced_ranks(together, slots, ranks).reshape(-1, number, ranks, slots // ranks)
        )
        drawn = [next(after) if balanced else c for c, balanced in zip(drawn, eplb, strict=True)]
    for row, counts in enumerate(drawn):
        if not len(counts):
            out[:, row] = uniform(
                int(tokens[row]), top_k, experts, ranks, masked=phase == "generation"
            )
        elif recorded is None:
            out[:, row] = counts[:, 0]
        else:
            reached = np.array([tokens_reaching(c, int(tokens[row])) for c in counts])
            gap = np.abs(np.log(np.maximum(reached, 1) / max(recorded[row], 1)))
            out[:, row] = counts[np.argsort(gap, kind="stable")[:DRAWS], 0]
    if recorded is not None:
        return out, recorded
    if phase == "generation":  # rows lie in one buffer for each expert, nothing is permuted
        return out, np.rint(out.sum(axis=2).mean(axis=0)).astype(np.int64)
    return out, tokens


def _drawn(
    tokens: int,
    top_k: int,
    experts: int,
    ranks: int,
    distribution: str,
    number: int,
    by_rank: bool,
) -> Counts:
    """Return loads [draws, ranks, experts of a rank], the busiest rank first; none if uniform."""
    if distribution == "uniform":
        return np.empty((0, ranks, experts // ranks), dtype=np.int64)
    seed = crc32(f"{tokens} {top_k} {experts} {ranks} {distribution} wide".encode())
    exponent = float(distribution.removeprefix("power_law_"))
    rng = np.random.default_rng(seed)
    if by_rank:
        counts = power_law(tokens, top_k, experts, ranks, exponent, rng, number)
    else:
        drawn = rounded(tokens, top_k, experts, exponent, rng, number)
        counts = evened(drawn, tokens, top_k).reshape(number, ranks, -1)
    busiest = counts.sum(axis=2).argmax(axis=1)
    rows = np.arange(number)
    counts[rows, busiest], counts[:, 0] = counts[:, 0].copy(), counts[rows, busiest].copy()
    return counts


def evened(counts: Counts, tokens: int, top_k: int) -> Counts:
    """Return counts [draws, experts] that sum to tokens x k, each at most the tokens.

    What is missing goes one by one to the least used experts, of equals to the last, whatever
    their rank: with few tokens they sit on one rank. What is too much is taken from the least
    used that have any, and for each that has none from the most used.
    """
    counts = counts.copy()
    order = np.argsort(-counts, axis=1, kind="stable")[:, ::-1]
    rows = np.arange(len(counts))
    missing = tokens * top_k - counts.sum(axis=1)
    step = 0
    while (missing > 0).any():
        expert = order[:, step % counts.shape[1]]
        given = (missing > 0) & (counts[rows, expert] < tokens)
        counts[rows, expert] += given
        missing -= given
        step += 1
    step = 0
    while (missing < 0).any():
        expert = order[:, step % counts.shape[1]]
        expert = np.where(counts[rows, expert] > 0, expert, counts.argmax(axis=1))
        counts[rows, expert] -= missing < 0
        missing += missing < 0
        step += 1
    return counts


def tokens_reaching(counts: Counts, tokens: int) -> int:
    """Return how many tokens have an expert on the first rank.

    Parameters
    ----------
    counts : ndarray [ranks, slots of a rank]
        Tokens of each slot. Slots are dealt out from the most used down, each to as many
        consecutive tokens (going round) as it has.
    tokens : int
        Tokens of all ranks together.
    """
    flat = counts.ravel()
    order = np.argsort(-flat, kind="stable")
    start = np.empty_like(flat)
    start[order] = np.cumsum(flat[order]) - flat[order]
    local = np.flatnonzero(flat[: counts.shape[1]])
    change = np.zeros(2 * tokens + 1, dtype=np.int64)
    np.add.at(change, start[local] % tokens, 1)
    np.add.at(change, start[local] % tokens + flat[local], -1)
    depth = np.cumsum(change[:-1])
    return int(np.count_nonzero(depth[:tokens] + depth[tokens:]))


def uniform(tokens: int, top_k: int, experts: int, ranks: int, *, masked: bool) -> Counts:
    """Return the tokens of each local expert in SGLang's uniform rows.

    An equal share, rounded down; in ``masked`` (generation) rows with less than one token for an
    expert, the first experts get one each, as many as a rank has (token, expert) pairs.
    """
    local = experts // ranks
    share = tokens * top_k // experts
    if share or not masked:
        return np.full(local, share, dtype=np.int64)
    return (np.arange(local) < tokens // ranks * top_k).astype(np.int64)
