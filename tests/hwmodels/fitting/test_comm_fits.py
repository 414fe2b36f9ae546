"""Fits of collectives: parameters found again, what rows cannot tell, errors on unseen sizes."""

import numpy as np
import pandas as pd
import pytest
import yaml

from basis import validate
from hwmodels import AllToAll, load_cluster, price
from hwmodels.fitting import comm_transfer
from hwmodels.fitting.comm import CommFit, fit_comm
from hwmodels.fitting.comm_engines import engine_comm
from hwmodels.fitting.comm_transfer import transfer_comm
from hwmodels.fitting.write import plain
from hwmodels.kernels.base import Limits
from hwmodels.kernels.exchange import TokenExchange
from hwmodels.kernels.rings import RingCost
from hwmodels.link import Link
from hwmodels.silicon.comm import CommTable, exchange, library_tables
from hwmodels.silicon.comm_moe import deepep_tables
from hwmodels.silicon.wheel import Source

SOURCE = Source(
    device="none", engine="sglang", version="0", path="made", sha256="", package="by hand"
)


@pytest.fixture
def made() -> CommTable:
    """Low-latency dispatch of known parameters, without noise."""
    rng = np.random.default_rng(0)
    rows = 400
    tokens, experts = rng.integers(1, 2048, rows), rng.choice([8, 64, 256], rows)
    port = tokens * 8.0 * 7168 * 7 / 8
    load = exchange(
        np.full(rows, 8.0), port, tokens=tokens.astype(float), experts=experts.astype(float)
    )
    cost = TokenExchange(launch="9 us", share=0.6, token="3 us", expert="20 ns", spread="experts")
    frame = pd.DataFrame({"tokens": tokens, "experts": experts})
    frame["seconds"] = cost.seconds(load, Limits(flops=0.0, bandwidth=450e9, units=132.0))
    return CommTable(
        source=SOURCE, op="dispatch", dtype="bf16", kernel="deepep_ll", frame=frame,
        shape=("tokens", "experts"), swept=("tokens",), load=load, link="nvlink4", rate=450e9,
    )  # fmt: skip


def test_known_parameters_are_found_again(made: CommTable) -> None:
    (found,) = fit_comm([made], units=132)
    numbers = found.cost.numbers()
    expected = {"launch": 9e-6, "share": 0.6, "token": 3e-6, "expert": 20e-9}
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, rel=1e-3)
    assert numbers["peer"] == numbers["host"] == 0  # all rows have eight ranks; a graph has no host
    assert found.cost.held_out is not None
    assert found.cost.held_out.mean < 1e-4
    assert found.cost.held_out.rows == made.held_out.sum()


def test_held_out_rows_do_not_move_the_fit(made: CommTable) -> None:
    changed = made.frame.copy()
    changed.loc[made.held_out, "seconds"] *= 3
    other = CommTable(
        **{f: getattr(made, f) for f in made.__dataclass_fields__} | {"frame": changed}
    )
    (first,), (second,) = fit_comm([made], units=132), fit_comm([other], units=132)
    assert second.cost.numbers() == first.cost.numbers()
    assert second.cost.held_out is not None
    assert second.cost.held_out.median == pytest.approx(2 / 3, rel=1e-2)
    assert second.cost.high == pytest.approx(3, rel=1e-2)


def test_a_table_without_enough_rows_is_left_out(made: CommTable) -> None:
    rows = np.flatnonzero(~made.held_out)[:7]
    load = exchange(np.full(7, 8.0), made.load.port[rows])
    few = CommTable(
        **{f: getattr(made, f) for f in made.__dataclass_fields__}
        | {"frame": made.frame.iloc[rows].reset_index(drop=True), "load": load}
    )
    assert fit_comm([few], units=132) == []


def test_a_fit_is_written_and_read_again(made: CommTable) -> None:
    (found,) = fit_comm([made], units=132)
    text = yaml.safe_dump(plain(found.cost))
    link = validate(
        {"standard": "nvlink4", "direction": "one-way", "bandwidth": "450 GB/s",
         "costs": {"dispatch": yaml.safe_load(text)}}, Link, "test",
    )  # fmt: skip
    limits = Limits(flops=0.0, bandwidth=450e9, units=132.0)
    again = link.cost("dispatch")
    assert isinstance(again, TokenExchange)
    assert again.spread == "experts"
    np.testing.assert_allclose(
        again.seconds(made.load, limits), found.cost.seconds(made.load, limits), rtol=1e-3
    )


def errors(found: list[CommFit]) -> np.ndarray:
    return np.array([fit.cost.held_out.median for fit in found if fit.cost.held_out is not None])


def test_nccl_on_sizes_that_no_fit_saw() -> None:
    pytest.importorskip("aiconfigurator_core")
    found = fit_comm([t for t in library_tables("h100") if t.dtype == "bf16"], units=132)
    assert len(found) == 4
    assert errors(found).max() < 0.08
    for fit in found:
        assert set(fit.by_ranks) == {2, 4, 8}
        assert sum(part.rows for part in fit.by_ranks.values()) == fit.cost.held_out.rows  # type: ignore[union-attr]
    reduce = next(f.cost for f in found if f.table.op == "all_reduce")
    assert isinstance(reduce, RingCost)
    assert 0.6 < reduce.share < 1
    assert reduce.multicast > 0


def test_deepep_on_shapes_that_no_fit_saw() -> None:
    pytest.importorskip("aiconfigurator_core")
    tables = [t for t in deepep_tables("h200") if t.kernel.startswith("deepep_ll")]
    found = fit_comm(tables, units=132)
    assert {(f.table.op, f.table.level) for f in found} == {
        (phase, level) for phase in ("dispatch", "combine") for level in ("node", "network")
    }
    assert errors(found).max() < 0.08


def test_an_engines_entries_are_written_and_price_a_cluster() -> None:
    pytest.importorskip("aiconfigurator_core")
    found = engine_comm("h200", "sglang", 132)
    halves = {"dispatch", "combine"}
    assert set(found.interconnect) == {
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", *halves
    }  # fmt: skip
    assert set(found.network) == halves
    cluster = load_cluster("hgx-h200-8x2")
    links = {}
    for name, costs in (("interconnect", found.interconnect), ("network", found.network)):
        link = cluster.intra if name == "interconnect" else cluster.network
        assert link is not None
        read = validate(
            {"standard": "other", "direction": "one-way", "bandwidth": "1 GB/s",
             "costs": yaml.safe_load(yaml.safe_dump(plain(costs)))}, Link, "test",
        )  # fmt: skip
        links[name] = link.model_copy(update={"costs": read.costs})
    node = cluster.node.model_copy(update={"interconnect": links["interconnect"]})
    cluster = cluster.model_copy(update={"node": node, "network": links["network"]})
    # 128 tokens a rank to 8 experts of 256 each, over 16 ranks: 102 us there on silicon
    pairs = 128 * 8 * 7168 * (1 + 4 / 128)
    traffic = np.zeros((1, 16, 16))
    traffic[0, :8, 8:] = traffic[0, 8:, :8] = pairs / 16
    traffic[0, :8, :8] = traffic[0, 8:, 8:] = pairs / 16
    for rank in range(16):  # a rank's peer of the other node takes all that crosses
        other = (rank + 8) % 16
        traffic[0, rank, other // 8 * 8 : other // 8 * 8 + 8] = 0
        traffic[0, rank, other] = pairs / 2
    op = AllToAll(traffic=traffic, phase="dispatch", tokens=128, experts=256, row_bytes=7392)
    there = price(op, cluster)
    assert there.seconds[0] == pytest.approx(102e-6, rel=0.1)
    assert there.evidence == "fitted"


def test_what_was_not_measured_is_left_to_the_cluster() -> None:
    pytest.importorskip("aiconfigurator_core")
    found = engine_comm("a100", "vllm", 108)
    assert "dispatch" not in found.interconnect
    assert found.network == {}
    across = engine_comm("b200", "sglang", 148).network["combine"]
    assert across.evidence == "transfer"


def test_what_is_learnt_elsewhere_states_the_errors_of_devices_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("aiconfigurator_core")

    def scatters(device: str, engine: str) -> list[CommTable]:
        tables = library_tables(device)
        return [t for t in tables if (t.op, t.dtype) == ("reduce_scatter", "bf16")]

    monkeypatch.setattr(comm_transfer, "reads_by", scatters)
    found = transfer_comm("trtllm", {"h100": 132, "h200": 132, "a100": 108}, "nvlink4")
    (ring,) = found.values()
    assert ring.evidence == "transfer"
    assert "h100, h200" in ring.source  # A100 has another link
    assert ring.held_out is not None
    assert ring.held_out.median < 0.08
    assert ring.held_out.rows == sum(len(scatters(d, "")[0].frame) for d in ("h100", "h200"))
    assert transfer_comm("trtllm", {"h100": 132}, "nvlink4") == {}
