"""Run a function on several tasks at once, one Python process each.

Worker processes are started as ``python -c`` with this module: unlike `multiprocessing` this
never imports the caller's main module again, so it works from scripts without a main guard,
``python -c``, notebooks and pytest alike.
"""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from basis.errors import SolverError

_COMMAND = "import sys; from planner.parallel import work; work(sys.argv[1])"


def run_parallel(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call a module-level function on each tuple of arguments, all at the same time.

    A single task runs in this process.

    Raises
    ------
    SolverError
        If a worker fails; carries the end of its traceback.
    """
    if len(tasks) == 1:
        return [function(*tasks[0])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"task{i}.pickle" for i in range(len(tasks))]
        workers = []
        for path, task in zip(paths, tasks, strict=True):
            path.write_bytes(pickle.dumps((function.__module__, function.__name__, task)))
            command = [sys.executable, "-c", _COMMAND, str(path)]
            workers.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
                )
            )
        try:
            return [_result(w, path) for w, path in zip(workers, paths, strict=True)]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
                if worker.stderr:
                    worker.stderr.close()


def _result(worker: "subprocess.Popen[bytes]", path: Path) -> Any:
    _, stderr = worker.communicate()
    if worker.returncode != 0:
        tail = stderr.decode(errors="replace").strip()[-500:]
        raise SolverError(f"a planner process ended with {worker.returncode} -- {tail}")
    return pickle.loads(path.read_bytes())


def work(path: str) -> None:
    """Carry out the task in a file and leave its result there; runs in the worker."""
    file = Path(path)
    module, name, task = pickle.loads(file.read_bytes())
    function = getattr(importlib.import_module(module), name)
    file.write_bytes(pickle.dumps(function(*task)))
