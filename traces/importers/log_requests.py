"""The second reading of a log of cells: rows with their request, position and phase."""

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.log_cells import Cells, Groups, group, whole_steps
from traces.importers.log_rows import Ints, Layout, Rows, fill
from traces.importers.log_survey import Survey
from traces.importers.rows import LONE_TOKENS

WARM_UP = "warm-up tokens (the same experts in a whole step)"
RENUMBERED = "tokens of steps that were numbered after rows were lost (layers do not line up)"


def rows_of(
    read: Callable[[], Iterator[Cells]],
    found: Survey,
    layout: Layout,
    where: str,
    dropped: Counter[str],
) -> Iterator[Rows]:
    """Read all cells again, as rows.

    Parameters
    ----------
    read
        Starts another reading of the file.
    found
        Of the first reading.
    dropped
        Gets the tokens of warm-up, and of steps that were numbered after rows were lost.

    Raises
    ------
    InputError
        If a token has a layer twice.
    """
    state = _Requests(found)
    warm_up = np.array(found.warm_up, np.int64)
    for cells in whole_steps(read(), where):
        dummy = np.isin(cells.step, warm_up)
        if dummy.any():
            dropped[WARM_UP] += len(group(cells.select(dummy)).first)
            cells = cells.select(~dummy)
        unclear = renumbered(cells)
        if unclear.any():
            dropped[RENUMBERED] += len(group(cells.select(unclear)).first)
            cells = cells.select(~unclear)
        if not len(cells.step):
            continue
        groups = group(cells)
        tokens = cells.select(groups.lead)
        yield state.rows(tokens, *_filled(cells, groups, layout, where), warm_up)


def renumbered(cells: Cells) -> NDArray[np.bool_]:
    """Return ``[N]`` cells of steps whose tokens were numbered, layer by layer, after losses.

    Rows that a recorder lost leave gaps. Where layers have three different numbers of tokens or
    more and none has a gap, a number means another token in each layer: nothing lines up. (Two
    different numbers can come of a cut, or of a lost end of a step.)
    """
    order = np.lexsort((cells.token, cells.layer, cells.request, cells.step))
    step, request, layer = (x[order] for x in (cells.step, cells.request, cells.layer))
    token = cells.token[order]
    changed = (np.diff(step, prepend=-1) != 0) | (np.diff(request, prepend=-1) != 0)
    part_begins = np.flatnonzero(changed)
    layer_begins = np.flatnonzero(changed | (np.diff(layer, prepend=-1) != 0))
    if not len(order):
        return np.zeros(0, np.bool_)
    part = np.cumsum(changed)[layer_begins] - 1
    size = np.diff(layer_begins, append=len(order))
    lowest = np.minimum.reduceat(token, part_begins)
    gapless = (token[layer_begins] == lowest[part]) & (
        token[layer_begins + size - 1] == lowest[part] + size - 1
    )
    sizes = np.bincount(np.unique(np.stack([part, size]), axis=1)[0], minlength=len(part_begins))
    unclear = (sizes >= 3) & (np.bincount(part, ~gapless, len(part_begins)) == 0)
    mask = np.empty(len(order), np.bool_)
    mask[order] = unclear[np.cumsum(changed) - 1]
    return mask


def _filled(
    cells: Cells, groups: Groups, layout: Layout, where: str
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return experts and weights ``[T, L, K]``."""
    cells = cells.select(groups.order)
    place = layout.place(cells.layer, where)
    twice = (np.diff(groups.token_of) == 0) & (np.diff(place) == 0)
    if twice.any():
        at = int(cells.record[1:][twice].min())
        raise InputError(
            f"{where}: record {at} repeats layer {int(cells.layer[1:][cells.record[1:] == at][0])} "
            "of its token -- were two requests recorded under one id?"
        )
    shape = (len(groups.first), len(layout.numbered), layout.top_k)
    return (
        fill(groups.token_of, place, cells.ids, shape),
        fill(groups.token_of, place, cells.weights, shape, np.nan),
    )


class _Requests:
    """Gives each token its request, position and phase, step after step."""

    def __init__(self, found: Survey) -> None:
        self._found = found
        self._alone = found.restarts and found.requests == 1
        """One id for everything: requests have to be told from the steps, if at all."""
        count = 1 if self._alone else found.requests
        self._next = np.zeros(count, np.int64)
        self._decoding = np.zeros(count, np.bool_)
        self._begun = -1
        """Last request that was told from the steps."""

    def rows(
        self,
        tokens: Cells,
        experts: NDArray[np.int32],
        weights: NDArray[np.float32],
        warm_up: Ints,
    ) -> Rows:
        """Return the rows of whole steps; ``tokens`` are sorted by step and token number."""
        request = self._told(tokens)
        size = _sizes(request, tokens.step)
        if self._alone:
            decode = np.full(len(size), False) if self._found.crowded else size == 1
        else:
            decode = self._phases(request, tokens.step, size)
        return Rows(
            request=request,
            position=self._positions(request, tokens.token),
            decode=decode,
            step=tokens.step - np.searchsorted(warm_up, tokens.step),
            domain=tokens.domain,
            experts=experts,
            weights=weights,
        )

    def _told(self, tokens: Cells) -> Ints:
        """Return ``[T]`` requests; under one id for all, as `phase_note` says."""
        if not self._alone:
            return tokens.request
        if self._found.crowded:
            first = self._begun + 1
            self._begun += len(tokens.step)
            return np.arange(first, self._begun + 1)
        _, of_step, sizes = np.unique(tokens.step, return_inverse=True, return_counts=True)
        if self._begun < 0 and sizes[0] == 1:
            self._begun = 0  # the log begins within a request
        number = self._begun + np.cumsum(sizes > 1)
        self._begun = int(number[-1])
        return number[of_step]

    def _phases(self, request: Ints, step: Ints, size: Ints) -> NDArray[np.bool_]:
        """Return ``[T]``: a request decodes from its first step of one token on."""
        never = np.iinfo(np.int64).max
        first = np.full(len(self._decoding), never)
        single = size == 1
        np.minimum.at(first, request[single], step[single])
        decode = self._decoding[request] | (step >= first[request])
        self._decoding |= first != never
        return decode

    def _positions(self, request: Ints, token: Ints) -> Ints:
        """Return ``[T]`` token numbers; where they restart, the request's tokens before each."""
        if not self._found.restarts:
            return token
        if self._alone and self._found.crowded:
            return np.zeros(len(token), np.int64)
        order = np.argsort(request, kind="stable")
        ordered = request[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        counts = np.diff(starts, append=len(ordered))
        self._make_room(int(ordered[-1]) + 1)
        rank = np.arange(len(ordered)) - np.repeat(starts, counts)
        position = np.empty(len(request), np.int64)
        position[order] = rank + self._next[ordered]
        self._next[ordered[starts]] += counts
        return position

    def _make_room(self, requests: int) -> None:
        if requests > len(self._next):
            more = np.zeros(max(requests, 2 * len(self._next)), np.int64)
            more[: len(self._next)] = self._next
            self._next = more


def _sizes(request: Ints, step: Ints) -> Ints:
    """Return ``[T]`` tokens that each token's request has in its step."""
    order = np.lexsort((request, step))
    changed = (np.diff(request[order], prepend=-1) != 0) | (np.diff(step[order], prepend=-1) != 0)
    group = np.cumsum(changed) - 1
    size = np.empty(len(step), np.int64)
    size[order] = np.bincount(group)[group]
    return size


def phase_note(found: Survey) -> str:
    """Say how requests and phases were told."""
    if found.restarts and found.requests == 1:
        if found.crowded:
            return (
                "all rows have one request id, and steps of several tokens follow each other, so "
                f"that a batch ran: {LONE_TOKENS}"
            )
        return (
            "all rows have one request id; every step of several tokens is taken as the prompt of "
            "a new request, since no two of them follow each other"
        )
    return (
        "a request's tokens are prefill until its first step of one token; a log that is sorted by "
        "layer looks like one step, all prefill"
    )
