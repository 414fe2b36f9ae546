"""Tables of one's own: written and read back, rows that cannot be left out, wrong files refused."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from basis import InputError
from hwmodels.kernels.base import Limits
from hwmodels.ops import Gemm, GroupedGemm
from hwmodels.silicon.measured import Interpolated
from hwmodels.silicon.own import read_table, write_table
from hwmodels.silicon.table import Table
from hwmodels.silicon.wheel import Source

LIMITS = Limits(flops=1e12, bandwidth=1e11, units=8)
SOURCE = Source(
    device="toy", engine="torch", version="2.8", path="-", sha256="-", package="kernels_ref 0.1"
)


def _gemm_table(seconds=None) -> Table:
    m = np.array([1, 4, 16, 64] * 2)
    n = np.repeat([64, 128], 4)
    frame = pd.DataFrame({"m": m, "n": n, "k": 32, "host": ["a", "b"] * 4})
    frame["seconds"] = 2e-6 + m * 1e-8 if seconds is None else seconds
    op = Gemm(m=m, n=n, k=32, weight_dtype="bf16", activation_dtype="bf16")
    return Table(
        source=SOURCE, op="gemm", dtype="bf16", kernel="matmul", parts=[op], frame=frame,
        shape=("n", "k"), swept=("m",),
    )  # fmt: skip


def _expert_table() -> Table:
    parts, frames = [], []
    for slots in (2, 4):
        tokens = np.array([8, 16, 32])
        loads = np.repeat(tokens[:, None] // slots, slots, axis=1)
        parts.append(
            GroupedGemm(
                tokens_per_expert=loads, hidden=16, width=8, gated=True, weight_dtype="fp8",
                activation_dtype="bf16", tokens=tokens,
            )
        )  # fmt: skip
        frames.append(
            pd.DataFrame({"hidden": 16, "slots": slots, "tokens": tokens, "distribution": "even"})
        )
    frame = pd.concat(frames, ignore_index=True).assign(seconds=3e-6)
    return Table(
        source=SOURCE, op="grouped_gemm", dtype="fp8", kernel="loop", parts=parts, frame=frame,
        shape=("hidden", "slots"), swept=("tokens",),
    )  # fmt: skip


def test_gemm_comes_back(tmp_path):
    path = tmp_path / "gemm.parquet"
    write_table(_gemm_table(), path)
    back = read_table(path, LIMITS)
    assert (back.op, back.dtype, back.kernel, back.dropped) == ("gemm", "bf16", "matmul", ())
    assert (back.shape, back.swept) == (("n", "k"), ("m",))
    assert (back.source.device, back.source.package) == ("toy", "kernels_ref 0.1")
    assert len(back.source.sha256) == 64
    (op,) = back.parts
    assert op.weight_dtype == "bf16"
    assert back.seconds == pytest.approx(_gemm_table().seconds)
    assert list(back.frame["host"]) == ["a", "b"] * 4
    cost = Interpolated.of(back, LIMITS)
    ask = Gemm(m=[10], n=[128], k=32, weight_dtype="bf16", activation_dtype="bf16")
    assert cost.seconds(ask, LIMITS) == pytest.approx([2e-6 + 10e-8])


def test_loads_come_back_with_rows_in_step(tmp_path):
    path = tmp_path / "experts.parquet"
    table = _expert_table()
    write_table(table, path)
    back = read_table(path, LIMITS)
    assert sorted(p.tokens_per_expert.shape[1] for p in back.parts) == [2, 4]
    loads = np.concatenate([p.rows() for p in back.parts])
    assert list(loads) == list(back.frame["tokens"])
    slots = np.concatenate([[p.tokens_per_expert.shape[1]] * len(p) for p in back.parts])
    assert list(slots) == list(back.frame["slots"])
    cost = Interpolated.of(back, LIMITS)
    assert cost.seconds(table.parts[0], LIMITS) == pytest.approx([3e-6] * 3)


def test_rows_that_cannot_be_are_left_out_and_counted(tmp_path):
    seconds = 2e-6 + np.array([1, 4, 16, 64] * 2) * 1e-8
    seconds[0], seconds[1], seconds[2] = 1e-12, 1.0, np.nan
    path = tmp_path / "gemm.parquet"
    write_table(_gemm_table(seconds), path)
    back = read_table(path, LIMITS)
    assert len(back.frame) == 5
    assert {d.rule: d.rows for d in back.dropped} == {
        "no measurement": 1, "beats the peaks": 1, "over 10 times its bound": 1,
    }  # fmt: skip
    assert len(read_table(path, LIMITS, slowest=1e9).frame) == 6
    impossible = Limits(flops=1.0, bandwidth=1.0, units=1)
    with pytest.raises(InputError, match="none of its 8 rows can be"):
        read_table(path, impossible)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "none.parquet", LIMITS)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"m": [1]}), other)
    with pytest.raises(InputError, match="no measured table of ours"):
        read_table(other, LIMITS)
    text = tmp_path / "text.parquet"
    text.write_text("not parquet")
    with pytest.raises(InputError, match="no measured table of ours"):
        read_table(text, LIMITS)


def test_changed_metadata_and_missing_columns_are_refused(tmp_path):
    path = tmp_path / "gemm.parquet"
    write_table(_gemm_table(), path)
    data = pq.read_table(path)
    about = json.loads(data.schema.metadata[b"moeplan"])
    newer = {b"moeplan": json.dumps(about | {"schema": 2}).encode()}
    pq.write_table(data.replace_schema_metadata(newer), path)
    with pytest.raises(InputError, match="schema 2"):
        read_table(path, LIMITS)
    same = {b"moeplan": json.dumps(about).encode()}
    pq.write_table(data.drop_columns(["n"]).replace_schema_metadata(same), path)
    with pytest.raises(InputError, match="column 'n' is missing"):
        read_table(path, LIMITS)
