"""The file that grows while a model runs: order of rows, bounded memory, all or nothing."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.meta import TraceMeta
from traces.record_file import open_sink
from traces.routing_trace import iter_trace, read_trace
from traces.trace_set import open_traces

E, K, LAYERS = 8, 2, 3


def meta(top_k):
    return TraceMeta(model="m", num_experts=E, top_k=top_k, moe_layer_ids=tuple(range(LAYERS)))


def one_pass(requests, position, seed=0):
    """Rows of a decode pass: one token of each request."""
    rng = np.random.default_rng([seed, position])
    cells = rng.random((len(requests), LAYERS, E)).argsort(-1)[..., :K]
    return {
        "request_id": np.array(requests), "position": np.full(len(requests), position),
        "decode": np.full(len(requests), position > 0), "step": np.full(len(requests), position),
        "domain": np.zeros(len(requests), np.int64), "experts": cells.astype(np.uint16),
        "weights": rng.random(cells.shape).astype(np.float16) + np.float16(0.01),
    }  # fmt: skip


def write(path, batches, length, **options):
    with open_sink(path, meta, ("text",), **options) as sink:
        for requests in batches:
            sink.batch_over()
            for position in range(length):
                sink.add(one_pass(requests, position))
        assert sink.rows == sum(map(len, batches)) * length


def expected(batches, length):
    """Experts by (request, position)."""
    return {
        (request, position): one_pass(requests, position)["experts"][row].tolist()
        for requests in batches
        for position in range(length)
        for row, request in enumerate(requests)
    }


BATCHES = [[0, 1, 2], [3], [4, 5]]


def test_requests_come_one_after_the_other(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, BATCHES, 5)
    trace = read_trace(path)
    keys = list(zip(trace.request_id.tolist(), trace.position.tolist(), strict=True))
    wanted = expected(BATCHES, 5)
    assert keys == sorted(wanted)
    assert trace.experts.tolist() == [wanted[key] for key in keys]
    assert open_traces(path).files[0].ordered


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 2000))
def test_whatever_the_bound_the_rows_are_the_same_and_positions_ascend(tmp_path_factory, bound):
    path = tmp_path_factory.mktemp("bound") / "a.parquet"
    write(path, BATCHES, 4, max_bytes=bound)
    last, wanted = {}, expected(BATCHES, 4)
    for chunk in iter_trace(path, 5):
        for row, request in enumerate(chunk.request_id.tolist()):
            position = int(chunk.position[row])
            assert position > last.get(request, -1)
            last[request] = position
            assert chunk.experts[row].tolist() == wanted.pop((request, position))
    assert not wanted


def test_a_bound_is_kept(tmp_path):
    path = tmp_path / "a.parquet"
    row = sum(column[:1].nbytes for column in one_pass([0], 0).values())
    write(path, [[0, 1]], 10, max_bytes=4 * row)  # three passes of two rows are over it
    groups = pq.ParquetFile(path).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [6, 6, 6, 2]


def add(path, passes):
    with open_sink(path, meta, ("text",), max_bytes=1) as sink:
        for columns in passes:
            sink.add(columns)


def test_bad_rows_or_none_leave_no_file(tmp_path):
    path = tmp_path / "a.parquet"
    bad = one_pass([0], 0) | {"experts": np.full((1, LAYERS, K), 3, np.uint16)}
    with pytest.raises(InputError, match="repeated expert"):
        add(path, [one_pass([1], 0), bad])
    with pytest.raises(InputError, match="no forward pass"), open_sink(path, meta, ("text",)):
        pass
    with pytest.raises(KeyError):
        add(path, [one_pass([1], 0), {}])
    with (
        pytest.raises(InputError, match="no such folder"),
        open_sink(tmp_path / "none" / "a", meta, ("text",)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
