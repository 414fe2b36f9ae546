"""What the machine is called and holds, against other sources; pinning, and its undoing."""

import contextlib
import datetime
import json
import os
import threading

import pytest
import torch

from basis.errors import InputError
from kernels_ref import machine
from kernels_ref.machine import last_level_cache, pinned, this_machine

needs_pinning = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot pin threads to cores"
)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_this_machine_says_what_other_sources_say():
    found = this_machine()
    assert found.kind == "cpu"
    assert found.processor
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.threads == torch.get_num_threads()
    assert found.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.torch == torch.__version__
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found.date)
    assert abs(age.total_seconds()) < 60


def test_describe_is_plain():
    described = this_machine().describe()
    assert json.loads(json.dumps(described)) == described
    assert {"kind", "processor", "cores", "threads", "cache_bytes", "torch", "date"} <= set(
        described
    )


def test_cache_is_that_of_the_highest_level(tmp_path):
    levels = {"index0": (1, "48K"), "index2": (2, "1M"), "index3": (3, "32768K"), "index1": (1, "")}
    for name, (level, size) in levels.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "level").write_text(f"{level}\n")
        if size:  # a level without a size is passed over
            (tmp_path / name / "size").write_text(f"{size}\n")
    assert last_level_cache(tmp_path) == 32 * 2**20


def test_cache_that_is_not_reported_is_zero(tmp_path):
    assert last_level_cache(tmp_path / "missing") == 0


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:0"])
def test_unknown_device(device):
    with pytest.raises(InputError, match=f"device is '{device}' -- allowed are 'cpu'"):
        this_machine(device)


@without_cuda
def test_missing_cuda_device():
    with pytest.raises(InputError, match="finds 0 CUDA devices -- allowed is one that is there"):
        this_machine("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_machine():
    found = this_machine("cuda")
    assert (found.kind, found.processor) == ("cuda", torch.cuda.get_device_name(0))
    assert 0 < found.cache_bytes < found.memory_bytes


@contextlib.contextmanager
def waiting_thread():
    """Start a thread that lives until the block ends."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        yield thread.native_id
    finally:
        stop.set()
        thread.join()


@needs_pinning
def test_pinned_moves_all_threads_and_back():
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with waiting_thread() as early, contextlib.ExitStack() as late:
        with pinned(1) as chosen:
            assert set(chosen) == os.sched_getaffinity(0) == os.sched_getaffinity(early)
            assert len(chosen) == torch.get_num_threads() == this_machine().cores == 1
            born_inside = late.enter_context(waiting_thread())
        for thread in (0, early, born_inside):
            assert os.sched_getaffinity(thread) == cores
    assert torch.get_num_threads() == threads


@needs_pinning
def test_pinned_restores_after_an_error():
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with pytest.raises(KeyError), pinned(1):
        raise KeyError
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads)


@pytest.mark.parametrize("threads", [0, 100_000])
def test_pinned_needs_a_core_for_each_thread(threads):
    with (
        pytest.raises(InputError, match=f"threads is {threads} -- allowed is 1 to "),
        pinned(threads),
    ):
        pass


def test_physical_cores_come_before_their_second_threads(tmp_path, monkeypatch):
    for core, siblings in {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}.items():
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    monkeypatch.setattr(machine, "_CPUS", tmp_path)
    assert machine._apart((0, 1, 2, 3)) == (0, 2, 1, 3)
    assert machine._apart((1, 2, 3, 7)) == (1, 2, 7, 3)  # the system is silent about core 7
