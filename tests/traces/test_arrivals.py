"""Arrivals and lengths as objects: what they refuse, rescaling, the first so many, blocks."""

import numpy as np
import pytest

from basis.errors import InputError
from traces.arrivals import Arrivals, Lengths, PrefixBlocks


def test_arrivals_refuse_disorder_and_empty_requests() -> None:
    with pytest.raises(InputError, match=r"request 1: arrives at 0.5 s, before"):
        _arrivals([1.0, 0.5], [1, 1], [1, 1])
    with pytest.raises(InputError, match=r"request 0: arrives at -1.0 s"):
        _arrivals([-1.0], [1], [1])
    with pytest.raises(InputError, match="request 1: 0 input and 3 output"):
        _arrivals([0.0, 1.0], [1, 0], [1, 3])
    with pytest.raises(InputError, match="request 0: 1 input and 2147483648 output"):
        _arrivals([0.0], [1], [2**31])
    with pytest.raises(InputError, match="at least one request"):
        _arrivals([], [], [])
    with pytest.raises(InputError, match="equal length"):
        _arrivals([0.0], [1, 2], [1])
    with pytest.raises(InputError, match="whole numbers"):
        Arrivals(seconds=np.zeros(1), inputs=np.array([1.5]), outputs=np.array([1]), source="test")


def test_all_bad_requests_are_counted_and_a_few_are_listed() -> None:
    with pytest.raises(InputError) as caught:
        _arrivals([0.0, np.nan, 2.0, 1.0, -1.0, 5.0, 6.0, 7.0], [1] * 6 + [0] * 2, [1] * 8)
    message = str(caught.value)
    assert "arrivals: 5 bad requests" in message
    assert "request 1: arrives at nan s" in message
    assert "request 3: arrives at 1.0 s, before the one ahead" in message
    assert "request 7: 0 input and 1 output tokens" in message
    assert "correct or remove these requests" in message
    with pytest.raises(InputError, match=r"9 bad rows(.|\n)*and 4 more"):
        Lengths(inputs=np.zeros(9, np.int64), outputs=np.ones(9, np.int64))


def test_scaling_keeps_lengths_and_burstiness() -> None:
    arrivals = _arrivals([0.0, 1.0, 5.0], [1, 2, 3], [4, 5, 6])
    scaled = arrivals.scaled_to(8.0)
    assert scaled.rate == pytest.approx(8.0)
    np.testing.assert_allclose(scaled.seconds * 20, arrivals.seconds)
    assert scaled.inputs.tolist() == [1, 2, 3]
    assert "rescaled to 8 requests/s" in scaled.source


def test_limits() -> None:
    arrivals = _arrivals([0.0, 0.0], [1, 2], [1, 1])
    assert len(arrivals.first(1)) == 1
    with pytest.raises(InputError, match="has 2; ask for at most"):
        arrivals.first(3)
    with pytest.raises(InputError, match="must be at least 1"):
        arrivals.first(0)
    with pytest.raises(InputError, match="at one time"):
        arrivals.scaled_to(1.0)
    with pytest.raises(InputError, match="0 input"):
        Lengths.fixed(0, 1)


def test_blocks_follow_their_requests() -> None:
    inputs = [1, 512, 513, 1500]
    unshared = PrefixBlocks.unshared(np.array(inputs))
    assert unshared.counts.tolist() == [1, 1, 2, 3]
    assert len(set(unshared.ids.tolist())) == 7
    arrivals = _arrivals([0.0] * 4, inputs, [1] * 4, unshared)
    first = arrivals.first(3).blocks
    assert first is not None
    assert first.ids.tolist() == [0, 1, 2, 3]
    moved = unshared.select(np.array([3, 0, 2]))
    assert moved.ids.tolist() == [4, 5, 6, 0, 2, 3]
    assert moved.counts.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("size", "ids", "counts", "said"),
    [
        (512, [0, 1], [2, 0], "request 0 of 512 tokens has 2 blocks of 512"),
        (512, [0], [1, 1], "1 ids in all"),
        (512, [0], [1], "for 1 of 2 requests"),
        (0, [0, 1], [1, 1], "at least 1 token"),
    ],
)
def test_blocks_that_do_not_cover_the_prompts(
    size: int, ids: list[int], counts: list[int], said: str
) -> None:
    blocks = PrefixBlocks(size=size, ids=np.array(ids), counts=np.array(counts))
    with pytest.raises(InputError, match=said):
        _arrivals([0.0, 1.0], [512, 1], [1, 1], blocks)


def _arrivals(
    seconds: list[float],
    inputs: list[int],
    outputs: list[int],
    blocks: PrefixBlocks | None = None,
) -> Arrivals:
    return Arrivals(
        seconds=np.array(seconds),
        inputs=np.array(inputs, dtype=np.int64),
        outputs=np.array(outputs, dtype=np.int64),
        source="test",
        blocks=blocks,
    )
