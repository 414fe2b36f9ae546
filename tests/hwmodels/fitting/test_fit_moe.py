"""The fit of expert layers finds again what made a table."""

import numpy as np
import pandas as pd
import pytest

from hwmodels.fitting.moe import fit_moe
from hwmodels.kernels.base import Limits
from hwmodels.kernels.grouped_gemm import GroupedGemmCost
from hwmodels.ops import GroupedGemm
from hwmodels.silicon.loads import rank_loads
from hwmodels.silicon.moe import KEYS, SHAPE, SWEPT, MoeTable
from hwmodels.silicon.wheel import Source

LIMITS = Limits(flops=1e15, bandwidth=3e12, units=132, cache=50e6)
SOURCE = Source(
    device="round", engine="none", version="1", path="made/by/hand", sha256="", package="tests"
)
TOKENS = (1, 8, 64, 256, 1024, 8192)


def made_by(truth: GroupedGemmCost, noise: float) -> MoeTable:
    """A table of 60 shapes whose times a known cost gives, with lognormal scatter."""
    parts, frames = [], []
    for hidden in (2048, 4096, 6144):
        for inter in (512, 2048):
            for experts, k in ((64, 4), (128, 8)):
                for ranks in (1, 2, 4, 8, 16):
                    counts = [rank_loads(t, k, experts, ranks, "balanced")[0] for t in TOKENS]
                    parts.append(
                        GroupedGemm(
                            tokens_per_expert=np.stack(counts), hidden=hidden, width=inter,
                            gated=True, weight_dtype="fp8", activation_dtype="bf16",
                            tokens=np.array(TOKENS),
                        )
                    )  # fmt: skip
                    shape = (hidden, inter, experts, k, 1, ranks)
                    frames.append([(*shape, "balanced", t) for t in TOKENS])
    frame = pd.DataFrame([row for rows in frames for row in rows], columns=KEYS)
    table = MoeTable(
        source=SOURCE, op="grouped_gemm", dtype="fp8", kernel="made", parts=parts,
        more=[[] for _ in parts], frame=frame, shape=SHAPE, swept=SWEPT,
    )  # fmt: skip
    exact = truth.time(truth.numbers(), table.features(truth, LIMITS))
    scatter = np.exp(noise * np.random.default_rng(0).standard_normal(len(frame)))
    frame["seconds"] = exact * scatter
    return table


@pytest.mark.parametrize("heights", [(16, 64, 128), (128,)])
def test_a_known_cost_is_found_again(heights: tuple[int, ...]) -> None:
    truth = GroupedGemmCost(
        launch="25 us", slot="50 ns", step="1 ns", sort="10 us", sort_tokens=100, token_bytes=6,
        row_hidden_bytes=12, row_width_bytes=15, wave="1.5 us", compute_efficiency=0.6,
        memory_efficiency=0.85, blend=2, cache_share=0.7, tile_rows=heights,
    )  # fmt: skip
    table = made_by(truth, noise=0.02)
    found = fit_moe(table, LIMITS)
    assert found.tile_rows == heights
    assert found.held_out is not None
    assert found.held_out.rows == table.held_out.sum()
    assert found.held_out.median < 0.025  # the scatter is 0.02
    assert found.memory_efficiency == pytest.approx(0.85, rel=0.05)
    assert found.launch + found.slot == pytest.approx(25e-6, rel=0.25)
    assert 0.94 < found.low < 1 < found.high < 1.06
    assert found.evidence == "fitted"
