"""What a calibration draws and how it is timed."""

import numpy as np
import pytest

from hwmodels.fitting.library import MODELS, held_out_of
from hwmodels.kernels.base import Limits
from hwmodels.silicon.own import read_table, write_table
from kernels_ref.machine import this_machine
from kernels_ref.operands import Operands
from kernels_ref.peaks import Peaks, measure_peaks
from kernels_ref.prepare import prepare
from kernels_ref.sweep import Sample, draw_cases, measure_cases
from kernels_ref.sweep_tables import tables_of


def _faked(cases):
    """Return the cases with times that their sizes explain."""
    moved = [float(np.sum(c.op.bytes_moved())) for c in cases]
    return [
        Sample(case=c, seconds=1e-5 + m / 1e10, floor=0.01)
        for c, m in zip(cases, moved, strict=True)
    ]


def test_cases_are_single_operations_of_every_kernel():
    cases = draw_cases(scale=0.2)
    assert {c.kernel for c in cases} == set(MODELS)
    assert all(len(c.op) == 1 for c in cases)
    again = draw_cases(scale=0.2)
    assert [c.shape for c in cases] == [c.shape for c in again]
    assert [c.shape for c in cases] != [c.shape for c in draw_cases(scale=0.2, seed=1)]


def test_smallest_cases_run_and_are_timed():
    smallest = {}
    for case in draw_cases(scale=0.2):
        size = float(np.sum(case.op.bytes_moved()))
        if case.kernel not in smallest or size < smallest[case.kernel][0]:
            smallest[case.kernel] = (size, case)
    cases = [case for _, case in smallest.values()]
    told = []
    operands = Operands(cache_bytes=2**18)
    samples = measure_cases(cases, operands, rounds=2, progress=lambda d, of: told.append((d, of)))
    assert [s.case for s in samples] == cases
    assert all(s.seconds > 0 and s.floor >= 0 for s in samples)
    assert told[-1] == (2 * len(cases), 2 * len(cases))


def test_activations_are_touched_and_weights_are_not():
    case = next(c for c in draw_cases(scale=0.2) if c.kernel == "gemm")
    prepared = prepare(case.op, 0, Operands(cache_bytes=2**18), cold=False)
    (m,), (k,) = case.op.m, case.op.k
    assert [tuple(each.shape) for each in prepared._activations] == [(m, k)]
    before = prepared.run().clone()
    prepared.touch()
    assert before.equal(prepared.run())  # read, not changed


def test_tables_hold_each_kernel_and_come_back_from_disk(tmp_path):
    machine = this_machine()
    tables = tables_of(_faked(draw_cases(scale=0.3)), machine, "fp32")
    assert {t.op for t in tables} == set(MODELS)
    peaks = Peaks(flops={"fp32": 1e9}, bandwidth=1e15, how="made up").with_seen("fp32", tables)
    assert peaks.flops["fp32"] >= 1e9
    for table in tables:
        held = held_out_of(table)
        assert 0 < held.sum() < len(held)
        path = tmp_path / f"{table.op}.parquet"
        write_table(table, path)
        back = read_table(path, Limits(flops=1e20, bandwidth=1e20, units=1), slowest=1e12)
        assert sorted(back.seconds) == pytest.approx(sorted(table.seconds))
        assert back.source.device == machine.processor


def test_peaks_are_positive_and_named():
    peaks = measure_peaks("cpu", 2**16, ("fp32",))
    assert peaks.flops["fp32"] > 1e8
    assert peaks.bandwidth > 1e7
    assert peaks.how in ("a sum", "a copy", "a product with a vector")
