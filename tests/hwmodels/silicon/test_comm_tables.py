"""Readers of measured collectives: units, bytes through a port, rows left out by rule."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from basis import InputError
from hwmodels.kernels.collective import ExchangeLoad, RingLoad
from hwmodels.silicon.comm import (
    PORTS,
    CommTable,
    believable,
    engine_tables,
    exchange,
    library_tables,
)
from hwmodels.silicon.comm_moe import deepep_tables, exchange_tables, visited_ranks

wheel = pytest.mark.usefixtures("_wheel")


@pytest.fixture
def _wheel() -> None:
    pytest.importorskip("aiconfigurator_core")


def one(tables: list[CommTable], **said: str) -> CommTable:
    (table,) = [t for t in tables if all(getattr(t, k) == v for k, v in said.items())]
    return table


@pytest.mark.parametrize(("experts", "topk", "ranks"), [(8, 2, 4), (8, 3, 2), (6, 5, 3), (4, 1, 4)])
def test_visited_ranks_by_trying_all_choices(experts: int, topk: int, ranks: int) -> None:
    local = experts // ranks
    visits = [len({e // local for e in chosen}) for chosen in combinations(range(experts), topk)]
    found = visited_ranks(pd.Series([experts]), pd.Series([topk]), ranks)[0]
    assert found == pytest.approx(np.mean(visits))


def test_rows_beyond_physics_are_left_out_and_counted() -> None:
    port = np.array([1e6, 1e6, 1e6, 1e3])
    seconds = [9e-6, 11e-6, 250e-6, 110e-6]  # of 10 us, and of 10 us and 100 ns grace
    load = exchange(np.full(4, 8.0), port)
    kept, dropped = believable(pd.DataFrame({"seconds": seconds}), load, 100e9)
    assert kept["seconds"].tolist() == [11e-6]
    assert [(d.rule, d.rows) for d in dropped] == [
        ("faster than the link", 1),
        ("ten times its bound", 2),
    ]
    kept, dropped = believable(pd.DataFrame({"seconds": seconds}), load, 100e9, 2.0)
    assert kept["seconds"].tolist() == [11e-6, 250e-6]


def test_sums_in_the_switch_do_not_beat_physics() -> None:
    tensor = np.array([8e6])
    load = RingLoad(ranks=np.array([8.0]), tensor=tensor, passes=2)
    frame = pd.DataFrame({"seconds": [90e-6]})  # less than the 140 us of a ring at 100 GB/s
    assert len(believable(frame, load, 100e9)[0]) == 1


@wheel
def test_all_reduce_of_a_gigabyte_runs_at_the_links_order() -> None:
    table = one(library_tables("h100"), op="all_reduce", dtype="bf16")
    rows = (table.frame["ranks"] == 8) & (table.frame["bytes"] == 2**29)
    share = table.load.port[rows] / table.seconds[rows] / 450e9
    assert 0.7 < share[0] < 1.75  # of the bytes of a ring; the switch adds up


@wheel
def test_sizes_are_elements_so_that_formats_agree_at_equal_bytes() -> None:
    tables = library_tables("h100")
    bf16, int8 = (one(tables, op="all_to_all", dtype=d).frame for d in ("bf16", "int8"))
    both = bf16.merge(int8, on=["ranks", "bytes"])
    both = both[both["bytes"] >= 2**24]
    assert len(both) > 10
    np.testing.assert_allclose(both["seconds_x"], both["seconds_y"], rtol=0.05)


@wheel
def test_a_rank_holds_its_own_part_of_an_all_to_all() -> None:
    table = one(library_tables("h100"), op="all_to_all", dtype="bf16")
    assert isinstance(table.load, ExchangeLoad)
    expected = table.frame["bytes"] * (table.frame["ranks"] - 1) / table.frame["ranks"]
    np.testing.assert_allclose(table.load.port, expected)
    assert (table.load.port / table.rate <= table.seconds).all()


@wheel
def test_graph_and_eager_are_kernels_apart() -> None:
    tables = engine_tables("h100")
    small = {t.kernel: np.median(t.seconds[t.frame["bytes"] <= 1024]) for t in tables}
    assert small["SGLang_CustomAllReduce_eager"] > 5 * small["SGLang_CustomAllReduce_graph"]
    assert {t.source.engine for t in tables} == {"trtllm", "sglang", "vllm"}


@wheel
def test_the_low_latency_mode_sends_every_choice() -> None:
    tables = deepep_tables("h100")
    table = one(tables, op="dispatch", kernel="deepep_ll")
    frame = table.frame
    row = frame["hidden"] * (1 + 4 / 128) + 16  # fp8, scales, and the token's index
    np.testing.assert_allclose(table.load.port, frame["tokens"] * frame["topk"] * row * 7 / 8)
    assert table.seconds.min() > 5e-6  # microseconds in the table
    assert table.seconds.max() < 1e-3


@wheel
def test_the_normal_mode_sends_once_to_a_rank_on_few_units() -> None:
    table = one(deepep_tables("h100"), op="combine", kernel="deepep_normal")
    assert isinstance(table.load, ExchangeLoad)
    assert set(table.load.units) == {4, 8, 12, 16, 20, 24}
    rows = (table.frame["topk"] == 1) & (table.frame["experts"] == 16)
    sent = table.frame["tokens"] * table.frame["hidden"] * 2 * 7 / 8
    np.testing.assert_allclose(table.load.port[rows], sent[rows])


@wheel
def test_across_nodes_only_the_network_carries_and_only_h200_was_measured() -> None:
    tables = [t for t in deepep_tables("h200") if t.level == "network"]
    assert {t.kernel for t in tables} == {"deepep_ll", "deepep_normal", "deepep_normal_8_nodes"}
    assert all(t.rate == 50e9 and (t.load.port / t.rate <= t.seconds).all() for t in tables)
    assert not [t for t in deepep_tables("h100") if t.level == "network"]


@wheel
def test_nvlinks_dispatch_counts_its_preparation() -> None:
    tables = exchange_tables("gb200")
    there = one(tables, op="dispatch", kernel="NVLinkTwoSided")
    assert set(there.frame["ranks"]) == {2, 4, 8, 16, 32, 64}
    assert there.seconds.min() > 20e-6  # both are near 11 us for one token


@wheel
@pytest.mark.parametrize("device", PORTS)
def test_every_kept_row_obeys_the_link(device: str) -> None:
    tables = library_tables(device) + engine_tables(device)
    assert tables
    for table in tables:
        assert (table.seconds >= table.load.least / table.rate).all()
        assert len(table.frame) == len(table.load.ranks)


@wheel
def test_a_device_without_tables_is_refused() -> None:
    with pytest.raises(InputError, match="none for device 'rtx4090'"):
        library_tables("rtx4090")
