"""Requests pieced together from passes, against an engine that knows them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.importers.sglang_requests import Requests, segment_lengths


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def extend(requests: Requests, *segments: tuple[int, int], mixed: bool = False) -> list[int]:
    """Requests of segments, each given by its first and the position after its last."""
    position = np.concatenate([np.arange(start, stop) for start, stop in segments])
    lengths = ints(*(stop - start for start, stop in segments))
    found, _ = requests.extend(position, lengths, mixed=mixed)
    firsts = np.cumsum(lengths) - lengths
    return found[firsts].tolist()


def test_a_prompt_in_chunks_is_one_request() -> None:
    requests = Requests()
    assert extend(requests, (0, 3), (0, 5)) == [0, 1]
    assert extend(requests, (5, 9), (0, 2)) == [1, 2]
    assert requests.decode(ints(3, 9, 2)).tolist() == [0, 1, 2]
    assert (requests.total, requests.guessed, requests.late) == (3, 0, 0)


def test_only_the_first_segment_can_go_on() -> None:
    requests = Requests()
    extend(requests, (0, 5))
    assert extend(requests, (0, 3), (5, 9)) == [1, 2]
    assert requests.late == 1


def test_requests_leave_and_join() -> None:
    requests = Requests()
    extend(requests, (0, 4), (0, 6), (0, 8))
    assert requests.decode(ints(4, 6, 8)).tolist() == [0, 1, 2]
    assert requests.decode(ints(5, 9)).tolist() == [0, 2]
    extend(requests, (0, 2))
    assert requests.decode(ints(6, 10, 2)).tolist() == [0, 2, 3]
    assert requests.guessed == 0


def test_which_of_two_equal_ones_went_on_is_a_guess() -> None:
    requests = Requests()
    extend(requests, (0, 4), (0, 4))
    assert requests.decode(ints(4, 4)).tolist() == [0, 1]
    assert requests.guessed == 0
    requests.decode(ints(5))
    assert requests.guessed == 1


def test_a_row_nobody_expects_begins_a_request() -> None:
    requests = Requests()
    assert requests.decode(ints(17, 4)).tolist() == [0, 1]
    assert requests.decode(ints(18, 5)).tolist() == [0, 1]
    assert (requests.total, requests.late) == (2, 2)


def test_a_mixed_pass() -> None:
    requests = Requests()
    extend(requests, (0, 4))
    position, lengths = ints(0, 1, 2, 4), ints(3, 1)
    found, decode = requests.extend(position, lengths, mixed=True)
    assert found.tolist() == [1, 1, 1, 0]
    assert decode.tolist() == [False, False, False, True]
    found, decode = requests.extend(ints(3, 4, 0, 5), ints(2, 1, 1), mixed=True)
    assert found.tolist() == [1, 1, 2, 0]
    assert decode.tolist() == [False, False, False, True]
    assert requests.decode(ints(5, 1, 6)).tolist() == [1, 2, 0]


def test_after_a_mixed_pass_the_new_requests_come_first() -> None:
    requests = Requests()
    extend(requests, (0, 4))
    requests.extend(ints(0, 1, 2, 3, 4, 4), ints(5, 1), mixed=True)
    assert requests.decode(ints(5, 5)).tolist() == [1, 0]
    assert requests.guessed == 0


def test_a_prompt_that_goes_on_is_not_decoding_in_the_same_pass() -> None:
    requests = Requests()
    extend(requests, (0, 3))
    found, decode = requests.extend(ints(3, 4, 3), ints(2, 1), mixed=True)
    assert found.tolist() == [0, 0, 1]
    assert not decode.any()
    assert requests.late == 1


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), min_size=1, max_size=12),
    chunk=st.integers(2, 25),
    mixed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_an_engine(
    sizes: list[tuple[int, int]], chunk: int, mixed: bool, seed: int
) -> None:
    """Every request comes back whole, unless rows were guessed; arrivals are random."""
    rng = np.random.default_rng(seed)
    requests, waiting, running = Requests(), list(range(len(sizes))), []
    done, truth, ours = [0] * len(sizes), [], []
    while waiting or running:
        segments, room = [], chunk
        while waiting and room and (not running or done[waiting[0]] or rng.random() < 0.5):
            request = waiting[0]
            rows = min(sizes[request][0] - done[request], room)
            segments.append((request, rows))
            room -= rows
            if done[request] + rows < sizes[request][0]:
                break
            waiting.pop(0)
        rows_of = list(segments)
        decoded = list(running) if mixed or not segments else []
        rows_of += [(request, 1) for request in decoded]
        position = [done[r] + place for r, rows in rows_of for place in range(rows)]
        if segments:
            lengths = ints(*(rows for _, rows in rows_of))
            found, _ = requests.extend(ints(*position), lengths, mixed=bool(decoded))
        else:
            found = requests.decode(ints(*position))
        ours += found.tolist()
        for request, rows in rows_of:
            truth += [request] * rows
            done[request] += rows
        new = [r for r, _ in segments if done[r] >= sizes[r][0]]
        running = new + running if decoded else running + new
        running = [r for r in running if done[r] < sum(sizes[r]) - 1]
    pairs = set(zip(truth, ours, strict=True))
    if not requests.guessed and not requests.late:
        assert len(pairs) == len(sizes) == requests.total
    assert len(set(ours)) == requests.total


def test_segments() -> None:
    position = ints(0, 1, 2, 7, 8, 0)
    assert segment_lengths(position, None, "x").tolist() == [3, 2, 1]
    assert segment_lengths(position, ints(3, 0, 2, 1), "x").tolist() == [3, 2, 1]
    assert segment_lengths(position, ints(1, 2, 2, 1), "x").tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("stated", [(4, 2), (6,), (-1, 4, 2, 1)])
def test_lengths_that_do_not_fit(stated: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"x: extend_seq_lens .* do not fit the positions"):
        segment_lengths(ints(0, 1, 2, 7, 8, 0), ints(*stated), "x")
