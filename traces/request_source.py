"""The routing of served requests: rows of a trace that stand for their tokens.

An arrival trace has lengths but no experts, a routing trace has experts but its own lengths. Each
served request draws a request of the trace, with replacement, and walks round its recorded tokens
from an offset, as often as its own length asks for; what repeats is counted and said. Places and
offsets are counts of tokens.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.arrivals import Lengths
from traces.routing_trace import RoutingTrace, request_order

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Walks:
    """One walk per served request, round a stretch of consecutive places; N requests."""

    first: Ints
    """Place at which the stretch begins, [N]."""
    length: Ints
    """Places of the stretch, [N]."""
    offset: Ints
    """Places into the stretch at which the walk begins, [N]."""

    def places(self, request: Ints, nth: Ints) -> Ints:
        """Place of the ``nth`` token (from 0) of each request; any shape, broadcast."""
        return np.asarray(self.first[request] + (self.offset[request] + nth) % self.length[request])

    def span_ends(self, request: Ints, start: Ints, stop: Ints) -> tuple[Ints, Ints]:
        """Write the tokens ``start`` to ``stop`` of requests as differences of running sums.

        With C(p) the sum of anything over the places before p, the sum over the tokens of span i
        is ``sum_j weight[j, i] C(place[j, i])``: whole turns, and the rest of the last one less
        what of the first turn lies before the start.

        Parameters
        ----------
        request, start, stop : int64 arrays [M]

        Returns
        -------
        place, weight : int64 arrays [4, M]
        """
        first, length = self.first[request], self.length[request]
        turns, rest = np.divmod(self.offset[request] + np.stack([start, stop]), length)
        whole = turns[1] - turns[0]
        one = np.ones_like(whole)
        place = np.stack([first + rest[1], first + rest[0], first + length, first])
        return place, np.stack([one, -one, whole, -whole])

    def mark(self, steps: Ints, tokens: Ints) -> None:
        """Add to ``steps`` where spans of the walks' first ``tokens`` places begin and end.

        Parameters
        ----------
        steps : int64 array [T + 1]
            Its running sum counts, afterwards, how many walks come by each place.
        tokens : int64 array [N]
            At least 0.
        """
        end = self.offset + np.minimum(tokens, self.length)
        around = np.maximum(end - self.length, 0)  # places from the start of the stretch again
        np.add.at(steps, self.first + self.offset, 1)
        np.add.at(steps, self.first + end - around, -1)
        np.add.at(steps, self.first, 1)
        np.add.at(steps, self.first + around, -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestSource:
    """Where served requests take their routing from. A place is an index into ``rows``."""

    rows: Ints
    """Rows of the trace: request after request, of each its prompt and then its answer, [T]."""
    prompt: Walks
    answer: Walks
    statement: str
    """How routing was given to the requests, in a sentence for the report."""
    stand_in: bool
    """Whether tokens of one phase stand in for those of the other."""

    @property
    def num_requests(self) -> int:
        """Served requests, N."""
        return len(self.prompt.first)

    def token_rows(self, request: int, inputs: int, start: int, stop: int) -> Ints:
        """Rows of tokens ``start`` to ``stop`` of one request whose prompt has ``inputs`` tokens.

        Tokens from ``inputs`` on are generated ones.
        """
        split = min(max(inputs, start), stop)
        who = np.asarray(request)
        prompt = self.prompt.places(who, np.arange(start, split))
        answer = self.answer.places(who, np.arange(split, stop) - inputs)
        return self.rows[np.concatenate([prompt, answer])]

    def distinct_rows(self, lengths: Lengths) -> int:
        """Count the rows of the trace that stand for at least one token of the requests.

        Parameters
        ----------
        lengths : Lengths
            Of the N served requests. The last token of an answer is not computed again.
        """
        steps = np.zeros(len(self.rows) + 1, dtype=np.int64)
        self.prompt.mark(steps, lengths.inputs)
        self.answer.mark(steps, lengths.outputs - 1)
        return int(np.count_nonzero(np.cumsum(steps)[:-1]))


def draw_requests(
    trace: RoutingTrace, count: int, seed: int, lengths: Lengths | None = None
) -> RequestSource:
    """Give ``count`` served requests the routing of requests of the trace.

    Every served request draws one request of the trace, uniformly and with replacement. Its prompt
    walks that request's prefill tokens, its answer the decode tokens, each from an offset of its
    own (uniform), round from the last token to the first. A request without tokens of one phase
    lends those of the other.

    Parameters
    ----------
    trace : RoutingTrace
        Whose requests are drawn.
    count : int
        Served requests, N.
    seed : int
        Of ``numpy.random.default_rng``.
    lengths : Lengths, optional
        Of the N served requests, so that the statement tells how much of the routing repeats.

    Raises
    ------
    InputError
        If ``count`` is below 1, the trace is empty, or there are not N lengths.
    """
    if count < 1 or not trace.num_tokens:
        raise InputError(
            f"{count} requests from {trace.num_tokens} recorded tokens -- both are at least 1"
        )
    if lengths is not None and len(lengths) != count:
        raise InputError(f"{len(lengths)} lengths for {count} requests -- give one pair for each")
    number = request_order(trace)
    rows = np.lexsort((trace.position, trace.decode, number))
    total = np.bincount(number)
    decodes = np.bincount(number[trace.decode], minlength=len(total))
    first = np.cumsum(total) - total
    has_prompt, has_answer = decodes < total, decodes > 0
    prompt_length = np.where(has_prompt, total - decodes, total)
    answer_first = np.where(has_answer, first + total - decodes, first)
    answer_length = np.where(has_answer, decodes, total)

    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(total), size=count)
    source = RequestSource(
        rows=rows,
        prompt=_walks(first, prompt_length, drawn, rng),
        answer=_walks(answer_first, answer_length, drawn, rng),
        statement=_statement(trace, count, seed, drawn, has_prompt, has_answer),
        stand_in=not (has_prompt[drawn].all() and has_answer[drawn].all()),
    )
    if lengths is None:
        return source
    return replace(source, statement=source.statement + _repeated(source, lengths))


def _walks(first: Ints, length: Ints, drawn: Ints, rng: np.random.Generator) -> Walks:
    return Walks(first=first[drawn], length=length[drawn], offset=rng.integers(length[drawn]))


def _statement(
    trace: RoutingTrace,
    count: int,
    seed: int,
    drawn: Ints,
    has_prompt: NDArray[np.bool_],
    has_answer: NDArray[np.bool_],
) -> str:
    kind = "synthetic" if trace.meta.synthetic else "recorded"
    lent = ""
    phases = ((has_prompt, "prefill", "decode"), (has_answer, "decode", "prefill"))
    for having, phase, other in phases:
        lacking = np.count_nonzero(~having[drawn])
        if lacking:
            lent += f"; {other} tokens stand in for the {phase} of {lacking} of them"
    times = np.bincount(drawn)
    again = np.count_nonzero(times > 1)
    return (
        f"routing of {count} requests drawn with replacement from the {len(has_prompt)} of the "
        f"{kind} trace of {trace.meta.model}, prompts and answers each from a random offset, round "
        f"again where the trace's request ends, seed {seed}{lent}; {np.count_nonzero(times)} "
        f"recorded requests serve, {again} of them more than once (at most {times.max()} times)"
    )


def _repeated(source: RequestSource, lengths: Lengths) -> str:
    tokens = int(lengths.inputs.sum() + (lengths.outputs - 1).sum())
    repeated = tokens - source.distinct_rows(lengths)
    return (
        f"; of {tokens} tokens {repeated} ({100 * repeated / tokens:.1f} %) repeat the routing of "
        "a recorded token that another one has"
    )
