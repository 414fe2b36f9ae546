"""One pass here, or file by file on a Dask cluster: the same figures."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from basis.errors import InputError
from traces.measures.drift import Drift
from traces.measures.flow import Flow
from traces.measures.load import Load
from traces.measures.reuse import Reuse
from traces.measures.run import statistics
from traces.measures.support import Support
from traces.routing_trace import RoutingTrace, write_trace
from traces.trace_set import open_traces

Make = Callable[..., RoutingTrace]
MAKERS = [Load, Flow, partial(Reuse, lags=(1, 4)), Drift, Support]


@pytest.fixture
def folder(make_trace: Make, tmp_path: Path) -> Path:
    for i in range(7):
        write_trace(make_trace(lengths=(9, 2, 5 + i), seed=i), tmp_path / f"{i}.parquet")
    return tmp_path


@pytest.fixture
def scheduler() -> Iterator[str]:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        yield cluster.scheduler_address


def test_results_come_in_the_order_of_the_makers(folder: Path) -> None:
    load, reuse = statistics(open_traces(folder), [Load, Reuse])
    assert load.tokens == sum(16 + i - 2 + 2 for i in range(7))
    assert reuse.pairs[0] == sum(8 + 1 + 4 + i for i in range(7))


def test_a_cluster_finds_the_same(folder: Path, scheduler: str) -> None:
    traces = open_traces(folder)
    here = [result.to_dict() for result in statistics(traces, MAKERS)]
    there = [result.to_dict() for result in statistics(traces, MAKERS, scheduler)]
    assert there == here


def test_a_bad_file_is_named_by_the_cluster_too(folder: Path, scheduler: str) -> None:
    traces = open_traces(folder)
    bad = folder / "3.parquet"
    data = bytearray(bad.read_bytes())
    data[200:400] = bytes(200)
    bad.write_bytes(bytes(data))
    for where in (None, scheduler):
        with pytest.raises(InputError, match=r"3\.parquet: damaged"):
            statistics(traces, MAKERS, where)


def test_no_dask(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"not installed -- pip install 'moeplan\[scale\]'"):
        statistics(open_traces(folder), MAKERS, "local")
