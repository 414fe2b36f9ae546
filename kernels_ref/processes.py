"""A function run on N processes at once, as ranks of one gloo group on this machine.

Each process is new (spawned, so that it inherits no threads), pinned to cores of its own, and
answers once: with the function's result or with a traceback. The first failure, or the time
limit (seconds), ends them all. A CUDA group can be made inside the function by `new_group`.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

_Result = TypeVar("_Result")

_LOOP = "gloo_tcp_loop"
"""Name of gloo's thread that polls for messages."""
_GRACE = 5.0
"""Seconds that a process has to end before it is killed."""


def run_processes(
    n: int,
    function: Callable[..., _Result],
    *args: object,
    threads: int = 1,
    timeout: float = 120.0,
    crowded: bool = False,
) -> list[_Result]:
    """Run ``function(rank, n, *args)`` on ``n`` pinned processes that form a gloo group.

    Parameters
    ----------
    n
        Processes, at least 1.
    function
        Function at the top level of a module that a new process can import.
    args
        Further arguments; they are pickled, and so is the result.
    threads
        Cores of each process, and threads of its torch.
    timeout
        Seconds until every rank must have answered, the start of the processes included (some
        seconds). Collectives of the group have the same limit.
    crowded
        Let processes share cores where there are too few, see `crowding`. Right for a check of
        results, wrong for a measurement.

    Returns
    -------
    list
        The results in rank order.

    Raises
    ------
    ValueError
        For fewer than one process or thread, for more than the cores hold unless ``crowded``,
        and for a function or argument that cannot be pickled.
    RuntimeError
        When a rank failed; the message has the traceback of the one that failed first.
    TimeoutError
        When a rank gave no answer in time.

    Notes
    -----
    As always with spawned processes, a script calls this under ``if __name__ == "__main__":``.
    """
    note = crowding(n, threads)
    if note and not crowded:
        raise ValueError(f"{note} -- take fewer, or crowded=True if nothing is timed")
    call = _pickled(function, args)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        started: list[_Started] = []
        try:
            for rank in range(n):
                receiver, sender = context.Pipe(duplex=False)
                task = _Task(rank, n, threads, _cores(rank, threads), store, timeout, call)
                process = context.Process(target=_work, args=(task, sender), daemon=True)
                process.start()
                sender.close()  # the child has the only one left: its death ends the pipe
                started.append(_Started(process, receiver))
            results = _results(started, time.monotonic() + timeout, timeout)
            for each in started:
                each.process.join(_GRACE)
            return results
        finally:
            _end(started)


def crowding(n: int, threads: int) -> str:
    """Say whether ``n`` processes of ``threads`` threads find a core for each thread.

    Parameters
    ----------
    n, threads
        Processes, and threads of each; both at least 1.

    Returns
    -------
    str
        Empty when they do, else how many there are and how many fit: times taken then are
        those of waiting for each other.

    Raises
    ------
    ValueError
        For fewer than one process or thread.
    """
    if n < 1 or threads < 1:
        raise ValueError(f"{n} processes of {threads} threads -- both are at least 1 -- raise them")
    cores = len(_allowed())
    if n * threads <= cores:
        return ""
    return f"{n} processes of {threads} thread(s) on {cores} core(s) -- at most one thread per core"


class _Task(NamedTuple):
    """What a new process is told."""

    rank: int
    ranks: int
    threads: int
    cores: Sequence[int]
    store: str
    """File where the ranks of the group find each other."""
    timeout: float
    """Seconds."""
    call: bytes
    """Pickled function and arguments, so that what cannot be imported is an answer as well."""


class _Started(NamedTuple):
    """A process and the end of the pipe on which it answers."""

    process: BaseProcess
    receiver: Connection


class _Answer(NamedTuple):
    """What a process says, once.

    Pickled by plain pickle: torch's own would hand over memory of a process that may have ended.
    """

    failure: str
    """Traceback; empty: none."""
    at: float
    """Seconds of the machine's clock; failures of other ranks often follow the first."""
    result: Any


def _allowed() -> list[int]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cores(rank: int, threads: int) -> list[int]:
    """Choose the cores of a rank, the next ``threads`` in turn; shared if there are too few."""
    cores = _allowed()
    return [cores[(rank * threads + i) % len(cores)] for i in range(threads)]


def _pickled(function: Callable[..., Any], args: tuple[object, ...]) -> bytes:
    try:
        return pickle.dumps((function, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{function!r} with its arguments cannot be sent to a new process ({error}) -- allowed "
            "is a function at the top level of a module, with values that pickle takes -- move it"
        ) from error


def _work(task: _Task, sender: Connection) -> None:
    """Run in the new process: answer with the result or the traceback, whatever happens."""
    try:
        answer = pickle.dumps(_Answer("", time.monotonic(), _called(task)))
    except BaseException:
        answer = pickle.dumps(_Answer(traceback.format_exc(), time.monotonic(), None))
        sender.send_bytes(answer)
        return
    sender.send_bytes(answer)
    with suppress(RuntimeError):  # of a rank that failed; it says so itself
        dist.barrier()  # nobody closes its connections while another may still read from them
        dist.destroy_process_group()


def _called(task: _Task) -> Any:
    """Pin this process, join the group and call the function."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, task.cores)
    torch.set_num_threads(task.threads)
    function, args = pickle.loads(task.call)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{task.store}",
        rank=task.rank,
        world_size=task.ranks,
        timeout=timedelta(seconds=task.timeout),
    )
    _poll_only_when_idle()
    return function(task.rank, task.ranks, *args)


def _poll_only_when_idle() -> None:
    """Let gloo's event loop run only while the rank waits.

    The loop polls, on the rank's own core: when a message has come, the rank would get its core
    back with the next tick of the clock only, up to 4 ms later (Linux, 250 ticks a second).
    """
    if not hasattr(os, "SCHED_IDLE"):
        return
    for thread in Path("/proc/self/task").iterdir():
        if (thread / "comm").read_text().strip() == _LOOP:
            os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def _results(started: Sequence[_Started], deadline: float, timeout: float) -> list[Any]:
    """Take one answer from each process; raise the first failure."""
    results: dict[int, Any] = {}
    rank_of = {each.receiver: rank for rank, each in enumerate(started)}
    while missing := sorted(set(rank_of.values()) - set(results)):
        ready = wait([started[r].receiver for r in missing], deadline - time.monotonic())
        if not ready:
            raise TimeoutError(
                f"no answer of rank(s) {', '.join(map(str, missing))} of {len(started)} within "
                f"{timeout:g} s -- all answer in time -- raise timeout, or look for a collective "
                "that not every rank enters"
            )
        answers = {r: _answer(started[r]) for r in missing if started[r].receiver in ready}
        failed = {r: a for r, a in answers.items() if a.failure}
        if failed:
            first = min(failed, key=lambda r: failed[r].at)
            raise RuntimeError(f"rank {first} of {len(started)} failed:\n{failed[first].failure}")
        results |= {r: a.result for r, a in answers.items()}
    return [results[r] for r in range(len(started))]


def _answer(started: _Started) -> _Answer:
    try:
        answer: _Answer = pickle.loads(started.receiver.recv_bytes())
    except EOFError:
        started.process.join(_GRACE)
        code = started.process.exitcode
        return _Answer(f"the process ended without an answer, exit code {code}", 0.0, None)
    return answer


def _end(started: Sequence[_Started]) -> None:
    """End every process that has not ended by itself, and release what belongs to it."""
    for process, _ in started:
        process.terminate()
    for process, receiver in started:
        process.join(_GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
        receiver.close()
