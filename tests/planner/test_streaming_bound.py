"""The bound of streamed weights: MoE-Lens's example, and a schedule played token by token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis.errors import InputError
from planner.streaming_bound import StreamingBound

MIXTRAL = 94e9  # bytes, 47 billion parameters in bf16
KV_PER_TOKEN = 2 * 32 * 8 * 128 * 2  # bytes: keys and values, layers, heads, elements, bf16


def _example(**other: float) -> StreamingBound:
    given = {
        "prompt": 98,
        "output": 32,
        "cached_tokens": 70e9 / KV_PER_TOKEN,
        "streamed_bytes": MIXTRAL,
        "bandwidth": 19.5e9,
    }
    return StreamingBound(**(given | other))


def test_the_papers_example() -> None:
    """Mixtral, p = 98, g = 32, 70 GB of cache, 19.5 GB/s: 3,948 tokens/s, 972 of them output."""
    bound = _example()
    assert bound.tokens_per_second == pytest.approx(3948, abs=1)
    assert bound.generated_per_second == pytest.approx(972, abs=1)


def test_the_processor_caps_it() -> None:
    assert _example(processor_tokens_per_second=1000.0).tokens_per_second == 1000.0


@given(p=st.integers(0, 400), g=st.integers(1, 64), groups=st.integers(1, 5))
def test_no_staggered_schedule_is_faster(p: int, g: int, groups: int) -> None:
    """Play g groups of requests, one of which begins in each pass; count cache and tokens.

    In its j-th pass (from 1) a sequence holds p + j tokens; in its first one the prompt is
    processed too. The continuous p + g / 2 is half a token below the mean of these.
    """
    cached = sum(groups * (p + age) for age in range(1, g + 1))
    tokens = groups * (p + g)  # one group begins, all g groups generate
    bound = StreamingBound(
        prompt=p, output=g, cached_tokens=cached, streamed_bytes=3.0, bandwidth=1.0
    )
    played = tokens / 3.0
    assert played <= bound.tokens_per_second * (1 + 1e-12)
    assert bound.tokens_per_second == pytest.approx(played * (2 * p + g + 1) / (2 * p + g))
    assert bound.sequences * (p + g / 2) == pytest.approx(cached)


@pytest.mark.parametrize("name", ["output", "cached_tokens", "streamed_bytes", "bandwidth"])
def test_refuses_what_is_not_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} 0"):
        _example(**{name: 0})


def test_refuses_a_negative_prompt() -> None:
    with pytest.raises(InputError, match="prompt -1"):
        _example(prompt=-1)
