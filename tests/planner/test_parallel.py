import subprocess
import sys

import pytest

from basis.errors import SolverError
from planner.parallel import run_parallel


def test_one_task_runs_here():
    assert run_parallel(divmod, [(7, 2)]) == [(3, 1)]


def test_tasks_run_in_other_processes_and_keep_their_order():
    assert run_parallel(divmod, [(7, 2), (9, 4), (1, 1)]) == [(3, 1), (2, 1), (1, 0)]


def test_a_failing_worker_is_an_error_with_its_reason():
    with pytest.raises(SolverError, match="ZeroDivisionError"):
        run_parallel(divmod, [(7, 2), (1, 0)])


def test_works_from_a_script_without_main_guard():
    script = (
        "import numpy as np; from planner.balance import balance\n"
        "loads = np.random.default_rng(0).pareto(1.0, (4, 32))\n"
        "r = balance(loads, 48, 16, time_limit=5, gap=0.0, workers=2)\n"
        "print(bool((r.bound <= r.objective).all()))"
    )
    path = ":".join(sys.path)
    done = subprocess.run(
        [sys.executable, "-"], input=script, text=True, capture_output=True, check=True,
        env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout == "True\n"
