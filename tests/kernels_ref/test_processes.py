"""Processes with a group: order, pinning, and that no failure leaves anything hanging."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kernels_ref.processes import crowding, run_processes

CAN_PIN = hasattr(os, "sched_getaffinity")


def facts(rank, n, base, tensor):
    own = os.sched_getaffinity(0) if CAN_PIN else None
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return rank, n, base + rank, tensor * rank, own, torch.get_num_threads(), total.item(), loops()


def loops():
    """Policies of gloo's polling threads, and of the thread that computes."""
    if not hasattr(os, "SCHED_IDLE"):
        return None
    tasks = {
        task: (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()
    }
    polling = [os.sched_getscheduler(int(t.name)) for t, n in tasks.items() if n == "gloo_tcp_loop"]
    return polling, os.sched_getscheduler(0)


def fails_on_rank_1(rank, n):
    if rank == 1:
        raise KeyError("no such expert")
    dist.barrier()  # waits for the one that failed


def hangs_on_rank_1(rank, n):
    if rank == 1:
        time.sleep(600)


def dies(rank, n):
    os._exit(7)


@pytest.fixture(scope="module")
def answers():
    return run_processes(2, facts, 10, torch.arange(3), crowded=True)


def test_results_come_in_rank_order_from_one_group(answers):
    assert [answer[:3] for answer in answers] == [(0, 2, 10), (1, 2, 11)]
    assert [answer[3].tolist() for answer in answers] == [[0, 0, 0], [0, 1, 2]]
    assert [answer[5:7] for answer in answers] == [(1, 3.0), (1, 3.0)]
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not CAN_PIN, reason="this system does not pin processes to cores")
def test_each_process_has_a_core_of_its_own_while_there_are_any(answers):
    cores = sorted(os.sched_getaffinity(0))  # of this process, which was not pinned
    assert [answer[4] for answer in answers] == [{cores[0]}, {cores[1 % len(cores)]}]


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no idle priority")
def test_what_polls_for_messages_does_not_hold_the_rank_up(answers):
    for *_, (polling, computing) in answers:
        assert polling == [os.SCHED_IDLE]
        assert computing == os.SCHED_OTHER


def test_failure_of_a_rank_comes_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)^rank 1 of 2 failed.*fails_on_rank_1.*no such"):
        run_processes(2, fails_on_rank_1, crowded=True)
    assert not multiprocessing.active_children()


def test_a_hanging_rank_ends_at_the_time_limit():
    with pytest.raises(TimeoutError, match=r"no answer of rank\(s\) .*1 of 2 within 3 s"):
        run_processes(2, hangs_on_rank_1, timeout=3, crowded=True)
    assert not multiprocessing.active_children()


def test_a_process_that_dies_is_named_with_its_exit_code():
    with pytest.raises(RuntimeError, match=r"rank 0 of 1 failed:\n.*exit code 7"):
        run_processes(1, dies)


def test_too_many_threads_are_refused_unless_said_otherwise():
    many = (os.cpu_count() or 1) + 1
    with pytest.raises(ValueError, match=f"1 processes of {many} thread.*crowded=True"):
        run_processes(1, facts, threads=many)
    assert crowding(1, many).startswith(f"1 processes of {many} thread(s) on ")
    assert crowding(1, 1) == ""


@pytest.mark.parametrize(("n", "threads"), [(0, 1), (1, 0)])
def test_nothing_to_start_is_refused(n, threads):
    with pytest.raises(ValueError, match=f"{n} processes of {threads} threads -- both"):
        run_processes(n, facts, threads=threads)


def test_a_local_function_is_refused():
    with pytest.raises(ValueError, match="top level of a module"):
        run_processes(1, lambda rank, n: rank)
