"""Measuring a data set: here in one pass, or file by file on a Dask cluster with the same result.

On a cluster every worker reads whole files, so all of them must see the files under the same paths.
What it finds is merged here in the order of the files.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from basis.errors import InputError
from traces.measures.base import About, Measure, measure
from traces.trace_set import TraceSet

LOCAL = "local"
Maker = Callable[[About], Measure]
"""A class of measures, or a `functools.partial` of one; picklable."""


def statistics(
    traces: TraceSet, makers: Sequence[Maker], scheduler: str | None = None
) -> list[Any]:
    """Return the results of measures on a data set.

    Parameters
    ----------
    traces
        The data set.
    makers
        What makes the measures, given `About`: ``[Load, partial(Reuse, lags=(1,))]``.
    scheduler
        None reads in this process; ``local`` starts a Dask cluster of this machine's cores for
        the time of the call; an address (``tcp://host:8786``) is that of a running Dask scheduler.

    Returns
    -------
    list
        One result of each measure, in order; the same whatever the scheduler.

    Raises
    ------
    InputError
        If a file is bad, Dask is not installed, or the scheduler does not answer.
    """
    about = About.of(traces)
    measures = [make(about) for make in makers]
    if scheduler is None:
        measure(traces, measures)
    else:
        for part in _parts(traces, makers, scheduler):
            for mine, theirs in zip(measures, part, strict=True):
                mine.merge(theirs)
    return [each.result() for each in measures]


def _measure_file(traces: TraceSet, makers: Sequence[Maker], file: int) -> list[Measure]:
    about = About.of(traces)
    measures = [make(about) for make in makers]
    measure(traces, measures, [file])
    return measures


def _parts(traces: TraceSet, makers: Sequence[Maker], scheduler: str) -> Iterator[list[Measure]]:
    """Yield what each file gave, in order; a few files per thread are under way at a time."""
    with ExitStack() as stack:
        client = _client(scheduler, stack)
        everywhere = client.scatter(traces, broadcast=True)
        ahead = 2 * max(sum(client.nthreads().values()), 1)
        waiting: deque[Any] = deque()
        for file in range(len(traces.files)):
            waiting.append(client.submit(_measure_file, everywhere, makers, file, pure=False))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _client(scheduler: str, stack: ExitStack) -> Any:
    try:
        distributed = import_module("distributed")
    except ImportError:
        raise InputError(
            f"scheduler {scheduler!r}: Dask is not installed -- pip install 'moeplan[scale]', or "
            "leave the scheduler out"
        ) from None
    if scheduler == LOCAL:
        scheduler = stack.enter_context(
            distributed.LocalCluster(threads_per_worker=1, dashboard_address=None)
        )
    try:
        return stack.enter_context(distributed.Client(scheduler))
    except (OSError, ValueError) as error:
        raise InputError(
            f"scheduler {scheduler!r} does not answer ({error}) -- the address of a running Dask "
            f"scheduler such as tcp://host:8786, or {LOCAL}"
        ) from None
