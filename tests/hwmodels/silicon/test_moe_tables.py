"""The reader of measured expert layers on a real table of the wheel."""

import numpy as np
import pandas as pd
import pytest

from hwmodels.kernels.grouped_gemm import GroupedGemmCost
from hwmodels.ops import GroupedGemm
from hwmodels.silicon.moe import FORMATS, KEYS, MoeTable, moe_tables
from hwmodels.silicon.table import limits_of
from hwmodels.silicon.wheel import read, root

pytest.importorskip("aiconfigurator_core")


@pytest.fixture(scope="module")
def tables() -> list[MoeTable]:
    found = moe_tables("b60", ("vllm",))
    return [table for table in found if isinstance(table, MoeTable)]


def test_every_row_of_the_file_is_kept_or_counted(tables: list[MoeTable]) -> None:
    assert {table.dtype for table in tables} == {"bf16", "fp8", "mxfp4"}
    for table in tables:
        rows = read(root() / table.source.path)
        named = rows["moe_dtype"].map(FORMATS) == table.dtype
        rows = rows[named & (rows["kernel_source"] == table.kernel)]
        assert len(table.frame) + sum(d.rows for d in table.dropped) == len(rows)


def test_milliseconds_become_seconds(tables: list[MoeTable]) -> None:
    table = tables[0]
    rows = read(root() / table.source.path)
    rows = rows[rows["moe_dtype"] == "bfloat16"]
    row = table.frame.iloc[123]
    mask = np.logical_and.reduce([rows[c] == row[c] for c in KEYS])
    assert row["seconds"] == pytest.approx(rows[mask]["latency"].median() / 1000)


def test_parts_are_the_rows_of_the_frame(tables: list[MoeTable]) -> None:
    table = tables[0]
    tokens = np.concatenate([op.shown() for op in table.parts if isinstance(op, GroupedGemm)])
    assert tokens.tolist() == table.frame["num_tokens"].tolist()
    rows = np.concatenate([op.rows() for op in table.parts if isinstance(op, GroupedGemm)])
    alone = (table.frame["moe_ep_size"] == 1).to_numpy()
    pairs = (table.frame["num_tokens"] * table.frame["topk"]).to_numpy()
    assert (rows[alone] == pairs[alone]).all()
    balanced = (table.frame["distribution"] == "balanced").to_numpy()
    assert (rows <= pairs).all()
    share = pairs / table.frame["moe_ep_size"].to_numpy()
    assert (rows[~balanced] >= np.floor(share[~balanced])).all()  # the busiest rank


def test_features_average_the_draws(tables: list[MoeTable]) -> None:
    table = tables[0]
    cost = GroupedGemmCost(
        launch="20 us", slot="1 ns", step="1 ns", sort="5 us", sort_tokens=60, token_bytes=4,
        row_hidden_bytes=10, row_width_bytes=10, wave="1 us", compute_efficiency=0.6,
        memory_efficiency=0.8, blend=2, tile_rows=(16,),
    )  # fmt: skip
    limits = limits_of(table)
    features = table.features(cost, limits)
    place = 0
    for first, others in zip(table.parts, table.more, strict=True):
        assert isinstance(first, GroupedGemm)
        n = len(first)
        if others:
            draws = [cost.features(op, limits)["waves_up"] for op in (first, *others)]
            expected = np.mean(draws, axis=0)
            assert features["waves_up"][:, place : place + n] == pytest.approx(expected)
            assert len(draws) == 5
            break
        place += n
    else:
        pytest.fail("no power law among the parts")


def test_shapes_are_held_out_as_a_whole(tables: list[MoeTable]) -> None:
    table = tables[0]
    held = pd.Series(table.held_out)
    assert (held.groupby([table.frame[c] for c in table.shape]).nunique() == 1).all()
    assert 0 < held.mean() < 1
