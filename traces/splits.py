"""Two parts of a trace by request: one to plan on, one to score on.

Requests are numbered in order of first appearance. ``early_late`` plans on the first half and
so also shows drift; ``interleaved`` plans on every other request and so scores the same mix.
"""

from typing import Literal, get_args

from basis.errors import InputError
from traces.routing_trace import RoutingTrace, request_order

Split = Literal["early_late", "interleaved"]


def split_requests(trace: RoutingTrace, how: Split) -> tuple[RoutingTrace, RoutingTrace]:
    """Return (plan on, score on); every request is whole in one of them.

    Parameters
    ----------
    trace : RoutingTrace
        R requests.
    how : {"early_late", "interleaved"}
        The first ceil(R / 2) requests against the rest, or the even against the odd ones.

    Raises
    ------
    InputError
        If ``how`` is unknown or the trace has a single request.
    """
    if how not in get_args(Split):
        raise InputError(f"unknown split {how!r} -- one of {', '.join(get_args(Split))}")
    request = request_order(trace)
    count = int(request.max(initial=-1)) + 1
    if count < 2:
        raise InputError(
            f"trace of {trace.meta.model}: {count} request(s) -- a split needs at least 2, so that "
            "a plan can be scored on requests that it has not seen; record more"
        )
    planned = request < (count + 1) // 2 if how == "early_late" else request % 2 == 0
    return trace.select(planned), trace.select(~planned)
