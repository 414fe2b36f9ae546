"""Cost models of collectives: closed forms, limits, bounds, and what their parameters mean."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.kernels.base import Limits
from hwmodels.kernels.collective import (
    CollectiveCost,
    ExchangeLoad,
    Load,
    RingLoad,
    either,
    filled,
    load_of,
    overlapped,
)
from hwmodels.kernels.exchange import (
    ByTokens,
    ChannelExchange,
    PeersCost,
    TokenExchange,
    low_latency_units,
)
from hwmodels.kernels.rings import DirectCost, RingCost
from hwmodels.ops import AllGather, AllReduce, AllToAll

RATE = 100e9
LIMITS = Limits(flops=0.0, bandwidth=RATE, units=132.0)

RING = RingCost(launch="5 us", hop="1 us", share=0.8, own=1e9, fill="0 s")
DIRECT = DirectCost(
    launch="3 us", hop="0.1 us", one_shot=0.5, two_shot=0.8, second="4 us",
    ring_launch="20 us", share=0.9, own=2, fill="1 us", limit="8 MB",
)  # fmt: skip
PEERS = PeersCost(launch="6 us", hop="0.5 us", share=0.7, own=2, slow=0.02, setup="5 us")
TOKENS = TokenExchange(launch="9 us", share=0.5, token="2 us", expert="10 ns", spread="experts")
CHANNELS = ChannelExchange(
    launch="24 us", share=0.8, token="0.4 us", unit_rate="20 GB/s", fill="1 us",
    row_rate="1 GB/s", units=20,
)  # fmt: skip
BY_TOKENS = ByTokens(few=TOKENS, many=CHANNELS, most_tokens=128)
RINGS = (RING, RING.model_copy(update={"fill": 2e-6, "own": 2.0, "multicast": 0.55}), DIRECT)
EXCHANGES = (PEERS, TOKENS, CHANNELS)
ALL = (*RINGS, *EXCHANGES, BY_TOKENS)


def ring(tensor: Any, ranks: int, passes: int = 1) -> RingLoad:
    size = np.atleast_1d(np.asarray(tensor, dtype=np.float64))
    return RingLoad(ranks=np.full(len(size), float(ranks)), tensor=size, passes=passes)


def exchange(port: Any, tokens: Any = 0.0, ranks: int = 8, experts: int = 256) -> ExchangeLoad:
    size, each = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (port, tokens))
    ones = np.ones(len(size))
    return ExchangeLoad(
        ranks=ranks * ones, port=size, tokens=each * ones, experts=experts * ones,
        row=7168 * ones, units=0 * ones, copies=ones,
    )  # fmt: skip


def seconds(cost: CollectiveCost, load: Load, limits: Limits = LIMITS) -> Any:
    return cost.time(cost.numbers(), cost.features(load, limits))


times = st.floats(0, 1.0) | st.just(0.0)


@given(times, times)
def test_smooth_maximum_and_minimum_stay_beside_the_sharp_ones(a: float, b: float) -> None:
    top, least = (
        overlapped(np.array([a]), np.array([b]))[0],
        either(np.array([a]), np.array([b]))[0],
    )
    assert max(a, b) <= top * (1 + 1e-12)
    assert top <= 2**0.25 * max(a, b) * (1 + 1e-12)
    assert least <= min(a, b) * (1 + 1e-12)
    assert least >= 2**-0.25 * min(a, b) * (1 - 1e-12)


def test_filling_a_pipeline_by_trying_all_numbers_of_chunks() -> None:
    transfer, fill = 400e-6, 1e-6
    chunks = np.arange(1, 2000)
    best = ((transfer / chunks + fill) * (chunks + 1)).min()
    assert filled(np.array([transfer]), fill)[0] + fill == pytest.approx(best, rel=1e-6)


def test_a_ring_by_hand() -> None:
    # 4 ranks, 80 MB: 3 hops there, 3/4 of the bytes at 80 GB/s
    gather = seconds(RING, ring(80e6, 4))[0]
    assert gather == pytest.approx(5e-6 + 3e-6 + 0.75e-3)
    reduce = seconds(RING, ring(80e6, 4, passes=2))[0]
    assert reduce == pytest.approx(5e-6 + 6e-6 + 1.5e-3)


def test_the_switch_adds_up_where_that_is_faster() -> None:
    cost = RING.model_copy(update={"multicast": 0.6})
    size = 80e6
    assert seconds(cost, ring(size, 8, 2))[0] == pytest.approx(5e-6 + 14e-6 + size / (0.6 * RATE))
    assert seconds(cost, ring(size, 2, 2))[0] == seconds(RING, ring(size, 2, 2))[0]


def test_a_tree_narrows_with_each_doubling() -> None:
    cost = RING.model_copy(update={"narrow": 0.5})
    wide, narrow = (seconds(c, ring(80e6, 8))[0] - 12e-6 for c in (RING, cost))
    assert narrow == pytest.approx(4 * wide)
    assert seconds(cost, ring(80e6, 2))[0] == seconds(RING, ring(80e6, 2))[0]


def test_one_shot_reads_all_peers_and_two_shot_pays_a_barrier() -> None:
    few, many = 1e3, 4e6
    one = 3e-6 + 7 * 0.1e-6 + 7 * few / (0.5 * RATE)
    assert seconds(DIRECT, ring(few, 8, 2))[0] == pytest.approx(one, rel=1e-3)
    two = 3e-6 + 7 * 0.1e-6 + 4e-6 + 1.75 * many / (0.8 * RATE)
    assert seconds(DIRECT, ring(many, 8, 2))[0] == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize(("tensor", "ranks"), [(8.1e6, 8), (1e3, 16)])
def test_beyond_its_limits_the_engine_leaves_it_to_a_ring(tensor: float, ranks: int) -> None:
    share = (ranks - 1) / ranks
    moving = 2 * share * tensor / (0.9 * RATE) + tensor / ranks / (2 * RATE)
    expected = 20e-6 + moving + 2 * np.sqrt(1e-6 * moving)
    assert seconds(DIRECT, ring(tensor, ranks, 2))[0] == pytest.approx(expected)


def test_short_messages_go_slowly_and_long_ones_pay_a_setup() -> None:
    short = 700.0  # 100 bytes to each of 7
    expected = 6e-6 + 3.5e-6 + short / (0.7 * RATE) + 100 / (2 * RATE) + 100 / (0.02 * RATE)
    assert seconds(PEERS, exchange(short))[0] == pytest.approx(expected, rel=1e-6)
    long = 7e9
    expected = 6e-6 + 3.5e-6 + long / (0.7 * RATE) + 1e9 / (2 * RATE) + 5e-6
    assert seconds(PEERS, exchange(long))[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("experts", "blocks"), [(8, 8), (16, 16), (128, 128), (160, 80), (256, 128), (384, 128)]
)
def test_blocks_of_the_low_latency_kernels(experts: int, blocks: int) -> None:
    assert low_latency_units(np.array([float(experts)]), 132.0)[0] == blocks
    assert low_latency_units(np.array([float(experts)]), 0.0)[0] == experts


def test_few_experts_leave_most_of_the_processor_idle() -> None:
    # 1024 tokens on 8 blocks: 128 each, 2 us; their bytes take less
    slow = seconds(TOKENS, exchange(1e6, 1024, experts=8))[0]
    assert slow == pytest.approx(9e-6 + 80e-9 + 256e-6, rel=1e-4)
    fast = seconds(TOKENS, exchange(1e6, 1024, experts=256))[0]
    assert fast < slow / 4


def test_the_hosts_work_hides_the_kernel() -> None:
    cost = TOKENS.model_copy(update={"host": 1e-3})
    assert seconds(cost, exchange(1e3, 1))[0] == pytest.approx(1e-3, rel=1e-6)
    assert seconds(cost, exchange(1e9, 1))[0] == pytest.approx(
        seconds(TOKENS, exchange(1e9, 1))[0], rel=1e-3
    )


def test_more_units_pass_on_more_until_the_link_is_full() -> None:
    port = 1e9

    def took(units: int) -> float:
        cost = CHANNELS.model_copy(update={"units": units, "fill": 0.0, "token": 0.0})
        return float(seconds(cost, exchange(port))[0] - 24e-6 - 7168 / 1e9)

    assert took(1) == pytest.approx(port * 8 / 7 / 20e9, rel=0.1)
    assert took(100_000) == pytest.approx(port / (0.8 * RATE), rel=1e-3)
    assert took(20) < took(10) < took(5)


@pytest.mark.parametrize("cost", RINGS)
@settings(deadline=None, max_examples=60)
@given(
    size=st.floats(1, 1e10), more=st.floats(1.0, 100), ranks=st.integers(2, 64),
    passes=st.sampled_from([1, 2]),
)  # fmt: skip
def test_rings_never_beat_the_link(
    cost: CollectiveCost, size: float, more: float, ranks: int, passes: int
) -> None:
    few = ring(size, ranks, passes)
    assert seconds(cost, few)[0] >= few.least[0] / RATE
    if isinstance(cost, RingCost):  # an engine may change its kernel for the worse, or better
        assert seconds(cost, ring(size * more, ranks, passes))[0] >= seconds(cost, few)[0]


@pytest.mark.parametrize("cost", EXCHANGES)
@settings(deadline=None, max_examples=60)
@given(
    size=st.floats(1, 1e10), more=st.floats(1.0, 100), tokens=st.floats(0, 1e5),
    extra=st.floats(0, 1e5), ranks=st.integers(2, 64),
)  # fmt: skip
def test_exchanges_grow_with_bytes_and_tokens_and_never_beat_the_link(
    cost: CollectiveCost, size: float, more: float, tokens: float, extra: float, ranks: int
) -> None:
    few = seconds(cost, exchange(size, tokens, ranks))[0]
    assert few >= size / RATE
    assert seconds(cost, exchange(size * more, tokens, ranks))[0] >= few * (1 - 1e-12)
    assert seconds(cost, exchange(size, tokens + extra, ranks))[0] >= few * (1 - 1e-12)


@pytest.mark.parametrize("cost", ALL)
def test_without_fixed_times_twice_the_rates_take_half(cost: CollectiveCost) -> None:
    load = ring(3e6, 8, 2) if cost in RINGS else exchange(3e6, 100)
    once = cost.with_fixed(0)
    twice = once.with_rates(2)
    double = Limits(flops=0.0, bandwidth=2 * RATE, units=132.0)
    np.testing.assert_allclose(seconds(twice, load, double), seconds(once, load) / 2)


@pytest.mark.parametrize("cost", ALL)
def test_bytes_over_an_endless_link_are_free(cost: CollectiveCost) -> None:
    load = ring(3e6, 8, 2) if cost in RINGS else exchange(3e6, 100)
    endless = Limits(flops=0.0, bandwidth=float("inf"), units=132.0)
    assert seconds(cost.with_fixed(0).with_rates(float("inf")), load, endless)[0] == 0


@pytest.mark.parametrize("cost", ALL)
def test_time_is_the_sum_of_its_two_parts(cost: CollectiveCost) -> None:
    load = ring([1e3, 1e6, 1e9], 4, 2) if cost in RINGS else exchange([1e3, 1e6, 1e9], 64)
    features = cost.features(load, LIMITS)
    fixed, moving = cost.split(cost.numbers(), features)
    np.testing.assert_allclose(fixed + moving, cost.time(cost.numbers(), features))
    assert (fixed >= 0).all()
    assert (moving >= 0).all()


def test_few_tokens_take_one_kernel_and_many_the_other() -> None:
    both = seconds(BY_TOKENS, exchange([1e6, 1e6], [128, 129]))
    assert both[0] == seconds(TOKENS, exchange(1e6, 128))[0]
    assert both[1] == seconds(CHANNELS, exchange(1e6, 129))[0]
    for size in (1e3, 1e9):  # no tokens stated: whichever is faster
        least = min(seconds(cost, exchange(size))[0] for cost in (TOKENS, CHANNELS))
        assert seconds(BY_TOKENS, exchange(size))[0] == least


def test_kernels_that_send_per_expert_send_more_than_once_to_a_rank() -> None:
    traffic = np.full((2, 8, 8), 1e6)
    op = AllToAll(traffic=traffic, tokens=10, experts=256, copies=np.array([1.0, 1.5]))
    once, more = (
        cost.features(op, LIMITS)["wire"]
        for cost in (TOKENS, TOKENS.model_copy(update={"sent_per": "expert"}))
    )
    assert once.tolist() == pytest.approx([7e6 / RATE] * 2)
    assert more.tolist() == pytest.approx([7e6 / RATE, 1.5 * 7e6 / RATE])


def test_loads_of_operations() -> None:
    traffic = np.full((2, 4, 4), 5.0)
    traffic[1, 0, 2] = 50.0
    op = AllToAll(traffic=traffic, tokens=np.array([7, 9]), experts=16, row_bytes=2.5)
    load = load_of(op)
    assert isinstance(load, ExchangeLoad)
    assert load.port.tolist() == [15.0, 60.0]
    assert (load.tokens.tolist(), load.ranks[0], load.experts[0]) == ([7.0, 9.0], 4.0, 16.0)
    whole = load_of(AllReduce(bytes=np.array([8, 80]), ranks=((0, 1), (2, 3))))
    assert isinstance(whole, RingLoad)
    assert (whole.port.tolist(), whole.passes) == ([8.0, 80.0], 2)
    assert load_of(AllGather(bytes=8, ranks=(0, 1, 2, 3))).port.tolist() == [6.0]


@pytest.mark.parametrize(
    ("cost", "load", "said"),
    [(RING, exchange(1.0), "a ring prices a tensor"), (PEERS, ring(1.0, 2), "a traffic matrix")],
)
def test_a_model_refuses_the_other_kind_of_load(
    cost: CollectiveCost, load: Load, said: str
) -> None:
    with pytest.raises(TypeError, match=said):
        cost.features(load, LIMITS)
