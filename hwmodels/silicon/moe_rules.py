"""Which measured rows of expert layers count: rules on the rows themselves, none on residuals.

A row is left out where the table does not determine its loads, where it beats the peaks or takes
over ten times its bound, and where less work took over twice as long as more: such runs had a
fallback kernel, because the engine's tuner failed or had cached another shape's choice.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.kernels.base import Limits
from hwmodels.ops import GroupedGemm
from hwmodels.silicon.table import Dropped, too_slow

Mask = NDArray[np.bool_]

GROUP_LIMITED = (7168, 2048, 256, 8)
"""DeepSeek-V3: SGLang and vLLM gate it by groups."""
GROUPED_KERNEL = "min_latency"
"""In the name of TensorRT-LLM's kernel that was timed behind a group-limited gate; without the
weighted sum of its results."""
_SLOWER = 2.0  # a call may take so many times as long as a larger one
_UNTUNED = 0.1  # a run with a larger share of such rows had a fallback kernel


def geometry(rows: pd.DataFrame) -> list[tuple[int, ...]]:
    """Return hidden and inner width, experts and k of each row."""
    columns = (rows[c].astype(int) for c in ("hidden_size", "inter_size", "num_experts", "topk"))
    return list(zip(*columns, strict=True))


def known_loads(
    rows: pd.DataFrame, engine: str, version: str
) -> tuple[pd.DataFrame, list[Dropped]]:
    """Leave out rows whose loads the table does not determine.

    A gate limited to groups of experts breaks ties among the tables' nearly equal logits: how, is
    known of TensorRT-LLM's (see `hwmodels.silicon.gates`), not of the gates that SGLang and vLLM
    use for DeepSeek-V3. SGLang's plain Triton path (before 0.5.14 all its paths but mxfp4) gives
    a rank only the tokens that reach it, and charges their pairs on other ranks to its first
    expert.
    """
    grouped = np.zeros(len(rows), dtype=bool)
    if engine != "trtllm":
        grouped = np.array([shape == GROUP_LIMITED for shape in geometry(rows)], dtype=bool)
    misplaced = np.zeros(len(rows), dtype=bool)
    if engine == "sglang":
        plain = rows["kernel_source"].str.contains("triton")
        if [int(part) for part in version.split(".")[:3]] < [0, 5, 14]:
            plain |= ~rows["moe_dtype"].str.contains("mxfp4")
        misplaced = ((rows["moe_ep_size"] > 1) & plain).to_numpy(dtype=bool)
    return rows[~grouped & ~misplaced], [
        Dropped(rule="group-limited gate, ties decide the loads", rows=int(grouped.sum())),
        Dropped(rule="remote pairs charged to one expert", rows=int((misplaced & ~grouped).sum())),
    ]


def untuned(rows: pd.DataFrame) -> tuple[Mask, Mask]:
    """Mark rows that took over twice a larger call's time, and the other rows of such runs.

    The larger call has the same experts, and at least as many tokens, columns (fewer ranks share
    an expert) and local experts (fewer ranks share the layer), under the same or a steeper law: it
    loads the busiest rank more. On one rank all laws have as many rows, and none reads more than
    1.4 times another's experts. A run is one shape under one law, tuned once; one of which over a
    tenth of the rows are such goes as a whole.

    Parameters
    ----------
    rows : DataFrame
        Columns of a shape, ``distribution``, ``num_tokens`` and ``seconds``.

    Returns
    -------
    tuple of ndarray [n]
        The two marks, disjoint.
    """
    slower = np.zeros(len(rows), dtype=bool)
    experts = ["hidden_size", "inter_size", "num_experts", "topk"]
    sharded = ["moe_tp_size", "moe_ep_size"]
    for place in rows.groupby(experts).indices.values():
        group = rows.take(np.asarray(place))
        axes = tuple(
            np.unique(group[c].to_numpy(), return_inverse=True)[1]  # "balanced" sorts first
            for c in ("distribution", *sharded, "num_tokens")
        )
        seconds = np.full([axis.max() + 1 for axis in axes], np.inf)
        seconds[axes] = group["seconds"]
        least = np.minimum.accumulate(np.minimum.accumulate(seconds, axis=1), axis=2)
        least = np.minimum.accumulate(least[..., ::-1], axis=3)[..., ::-1]
        least = np.minimum.accumulate(least[::-1], axis=0)[::-1]
        larger = least[axes]
        alone = (group["moe_ep_size"] == 1).to_numpy()
        larger[alone] = least.min(axis=0)[axes[1:]][alone]
        slower[place] = group["seconds"].to_numpy() > _SLOWER * larger
    run = [*experts, *sharded, "distribution"]
    share = rows[run].assign(slower=slower).groupby(run)["slower"].transform("mean")
    return slower, ~slower & (share > _UNTUNED).to_numpy(dtype=bool)


def unbelievable(
    seconds: NDArray[np.float64], draws: Sequence[GroupedGemm], limits: Limits
) -> tuple[Mask, Mask]:
    """Mark rows that beat the peaks (a cache may hold weights), and those far above the bound."""
    compute = np.mean([op.flops() for op in draws], axis=0) / limits.flops
    weights = np.mean([op.weight_bytes() for op in draws], axis=0)
    moved = np.mean([op.bytes_moved() for op in draws], axis=0)
    passing = 2 * 2 * draws[0].hidden * draws[0].shown()  # bf16 rows in and out of the layer
    least = np.maximum(compute, (weights - limits.cache) / limits.bandwidth)
    bound = np.maximum(compute, (moved + passing) / limits.bandwidth)
    return seconds < least, too_slow(seconds, bound)
