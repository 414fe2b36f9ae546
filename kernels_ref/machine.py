"""The machine that something was measured on, and pinning a process to some of its cores.

A measured time means nothing without the processor, the threads and the versions that made it.
What the system does not say is 0 (a size) or the next best name, never a guess. Sizes in bytes.
"""

import contextlib
import datetime
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from basis.errors import InputError

Kind = Literal["cpu", "cuda"]
_CPUS = Path("/sys/devices/system/cpu")
_TASKS = Path("/proc/self/task")
_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a measurement ran on, and when."""

    kind: Kind
    processor: str
    """Name of the processor or of the accelerator."""
    cores: int
    """Cores that the process may use; multiprocessors of an accelerator."""
    threads: int
    """Threads that torch computes with on the host."""
    memory_bytes: int
    """Memory of the host, or of the accelerator."""
    cache_bytes: int
    """Last-level cache; 0: the system does not say."""
    torch: str
    """Version, the build's suffix included."""
    python: str
    os: str
    date: str
    """UTC, ISO 8601, to the second."""

    def describe(self) -> dict[str, str | int]:
        """Return the fields as plain values, for a table's provenance."""
        return asdict(self)


def this_machine(device: str = "cpu") -> Machine:
    """Describe the machine of this process as it is now.

    Parameters
    ----------
    device
        ``"cpu"`` or a CUDA device (``"cuda"``, ``"cuda:1"``).

    Returns
    -------
    Machine
        Cores and threads are those of the moment: call it inside `pinned`.

    Raises
    ------
    InputError
        When the device is neither, or torch finds no such device.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda" and (index or "0").isdigit():
        return _cuda(device, int(index or "0"))
    if device != "cpu":
        raise InputError(
            f"device is {device!r} -- allowed are 'cpu', 'cuda' and 'cuda:N' -- name one"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _machine("cpu", _processor_name(), len(_available()), memory, last_level_cache())


def _cuda(device: str, index: int) -> Machine:
    if index >= torch.cuda.device_count():
        raise InputError(
            f"device is {device!r}, but torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} CUDA devices -- allowed is one that is there -- take "
            "'cpu', or install a torch built for this accelerator"
        )
    found = torch.cuda.get_device_properties(index)
    cores, memory, cache = found.multi_processor_count, found.total_memory, found.L2_cache_size
    return _machine("cuda", torch.cuda.get_device_name(index), cores, memory, cache)


def _machine(kind: Kind, processor: str, cores: int, memory: int, cache: int) -> Machine:
    return Machine(
        kind=kind,
        processor=processor,
        cores=cores,
        threads=torch.get_num_threads(),
        memory_bytes=memory,
        cache_bytes=cache,
        torch=str(torch.__version__),
        python=platform.python_version(),
        os=platform.platform(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _processor_name() -> str:
    """Name of the processor as Linux reports it, else what the platform calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def last_level_cache(folder: Path = _CPUS / "cpu0" / "cache") -> int:
    """Bytes of the highest cache level of the first core, as Linux reports it; 0 if it does not.

    Parameters
    ----------
    folder
        Holds ``index*/level`` and ``index*/size`` (Linux: Documentation/ABI/stable/sysfs-devices).
    """
    found = [(0, 0)]
    for cache in folder.glob("index*"):
        try:
            level, size = (cache / "level").read_text(), (cache / "size").read_text().strip()
        except OSError:
            continue
        number, unit = (size[:-1], _UNITS[size[-1]]) if size[-1:] in _UNITS else (size, 1)
        found.append((int(level), int(number) * unit))
    return max(found)[1]


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Keep the process on as many cores as it has torch threads; undo both at the end.

    Every thread of the process is moved, since torch's workers may have been started before.
    Cores are taken one per physical core first: two threads on the halves of one core would
    share its arithmetic. Where the system cannot pin, only the threads are set.

    Parameters
    ----------
    threads
        Threads of torch, between 1 and the cores that the process may use.

    Yields
    ------
    tuple of int
        The cores; empty where the system cannot pin.

    Raises
    ------
    InputError
        When there are fewer cores than threads.
    """
    cores, before = _available(), torch.get_num_threads()
    if not 1 <= threads <= len(cores):
        raise InputError(
            f"threads is {threads} -- allowed is 1 to {len(cores)}, the cores of this process -- "
            "take fewer threads"
        )
    can_pin = hasattr(os, "sched_setaffinity")
    chosen = _apart(cores)[:threads] if can_pin else ()
    masks = _affinities() if can_pin else {}
    if can_pin:
        _move({thread: set(chosen) for thread in masks})
    torch.set_num_threads(threads)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)
        if can_pin:  # threads born meanwhile inherited the narrow mask
            _move({thread: masks.get(thread, set(cores)) for thread in _affinities()})


def _available() -> tuple[int, ...]:
    """Cores that the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _apart(cores: tuple[int, ...]) -> tuple[int, ...]:
    """Order cores such that the first hardware thread of each physical core comes first."""
    seen: dict[str, int] = {}
    ranks = []
    for core in cores:
        file = _CPUS / f"cpu{core}" / "topology" / "thread_siblings_list"
        siblings = file.read_text() if file.exists() else str(core)
        ranks.append((seen.setdefault(siblings, 0), core))
        seen[siblings] += 1
    return tuple(core for _, core in sorted(ranks))


def _affinities() -> dict[int, set[int]]:
    """Cores of each thread of the process, by thread id."""
    masks = {}
    for task in _TASKS.iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            masks[int(task.name)] = os.sched_getaffinity(int(task.name))
    return masks


def _move(masks: dict[int, set[int]]) -> None:
    for thread, cores in masks.items():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)
