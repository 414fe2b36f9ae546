"""MoNDE's cut into hot experts (copied to the GPU) and cold ones (computed in the CXL device).

The device's figures are assumed (catalog/clusters/monde.yaml, catalog/pim/monde.yaml): what is
shown is that the rule finds the best cut at these prices, not that a device has them. The oracle
plays every cut, and for few experts every one of the 2^n assignments, in plain arithmetic.
"""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from hwmodels import Cluster, load_cluster
from hwmodels.ops import GroupedGemm
from simulator.offload import Offload
from simulator.site_costs import SiteCosts, site_costs
from simulator.sites import SiteProblem, assign

HIDDEN, WIDTH = 2048, 8192  # NLLB-MoE 54B
EXPERT_BYTES = 2 * HIDDEN * WIDTH * 2.0
Ints = NDArray[np.int64]


def _costs(cluster: Cluster, most: int) -> SiteCosts:
    op = GroupedGemm(
        tokens_per_expert=np.arange(most + 1)[None, :],
        hidden=HIDDEN,
        width=WIDTH,
        gated=False,
        weight_dtype="bf16",
        activation_dtype="bf16",
    )
    offload = Offload.model_validate({"home": "cxl", "site": {"name": "split", "processor": "ndp"}})
    return site_costs(offload, cluster, op, EXPERT_BYTES)


def _end(costs: SiteCosts, hot: Ints, cold: Ints) -> float:
    """Copies one after the other, hottest first; the GPU takes each when it is there."""
    link = gpu = 0.0
    for tokens in sorted(hot, reverse=True):
        link += costs.fetch_s
        gpu = max(gpu, link) + costs.fast_fixed + costs.fast_s[tokens]
    side = sum(costs.side_s[n] for n in cold) + (costs.side_fixed if len(cold) else 0.0)
    return float(max(gpu, side))


def _problem(costs: SiteCosts, tokens: Ints) -> SiteProblem:
    return SiteProblem(
        tokens=tokens[None, :],
        resident=np.zeros(1, dtype=np.bool_),
        fast_s=costs.fast_s[tokens][None, :],
        fetch_s=np.full((1, len(tokens)), costs.fetch_s),
        side_s=costs.side_s[tokens][None, :],
        fast_fixed=costs.fast_fixed,
        side_fixed=costs.side_fixed,
    )


@pytest.fixture(scope="module")
def monde() -> Cluster:
    return load_cluster("monde")


def test_a_copy_and_a_cold_expert_by_hand(monde: Cluster) -> None:
    """67.1 MB: 2 us + bytes / (0.8 x 31.5 GB/s); 4 tokens: bytes / (0.8 x 512 GB/s) and 16 KB
    of activations there and back at 0.8 x 31.5 GB/s each way.
    """
    costs = _costs(monde, 8)
    assert costs.fetch_s == pytest.approx(2e-6 + 67_108_864 / 25.2e9)
    moved = 67_108_864 + 4 * 2 * (2 * 2048 + 2 * 8192)
    way = 2 * 4 * 2048 * 2 / 25.2e9
    assert costs.side_s[4] == pytest.approx(moved / 409.6e9 + way, rel=1e-9)


@pytest.mark.parametrize("tokens_in_step", [16, 256, 2048, 16384])
def test_split_is_the_best_of_all_cuts(monde: Cluster, tokens_in_step: int) -> None:
    """H hottest experts to the GPU, for every H from none to all; skewed loads."""
    rng = np.random.default_rng(tokens_in_step)
    shares = np.arange(1, 129) ** -0.8
    counts = [rng.multinomial(tokens_in_step, shares / shares.sum()) for _ in range(5)]
    costs = _costs(monde, int(np.max(counts)))
    for tokens in counts:
        falling = np.sort(tokens[tokens > 0])[::-1]
        cuts = [_end(costs, falling[:h], falling[h:]) for h in range(len(falling) + 1)]
        found = float(assign("split", _problem(costs, tokens)).makespan[0])
        assert found == pytest.approx(min(cuts), rel=1e-12)
        assert found <= min(cuts[0], cuts[-1]) * (1 + 1e-12)  # at least as good as either baseline


def _best(costs: SiteCosts, tokens: Ints) -> float:
    """Least end over all 2^n assignments."""
    ends = []
    for hot in itertools.product([False, True], repeat=len(tokens)):
        chosen = np.array(hot)
        ends.append(_end(costs, tokens[chosen], tokens[~chosen]))
    return min(ends)


@pytest.mark.parametrize("tokens_in_step", [256, 2048])
def test_split_is_the_best_of_all_assignments_of_skewed_loads(
    monde: Cluster, tokens_in_step: int
) -> None:
    """Eight experts with Zipf loads: no other set of hot experts ends earlier."""
    rng = np.random.default_rng(tokens_in_step)
    shares = np.arange(1, 9) ** -0.8
    costs = _costs(monde, tokens_in_step)
    for _ in range(30):
        tokens = rng.multinomial(tokens_in_step, shares / shares.sum())
        tokens = tokens[tokens > 0]
        found = float(assign("split", _problem(costs, tokens)).makespan[0])
        assert found == pytest.approx(_best(costs, tokens), rel=1e-12)


def test_a_cut_loses_little_where_sets_pack_better(monde: Cluster) -> None:
    """Loads from 1 to 2,000 tokens, uniform in their logarithm: a set that is no cut may fill the
    side better; the cut is the best in four of five, and 2 % off at most in these.
    """
    rng = np.random.default_rng(0)
    costs = _costs(monde, 2000)
    ratios = []
    for _ in range(60):
        tokens = np.exp(rng.uniform(0, np.log(2000), 8)).astype(np.int64)
        found = float(assign("split", _problem(costs, tokens)).makespan[0])
        ratios.append(found / _best(costs, tokens))
    assert min(ratios) > 1 - 1e-12
    assert np.mean(np.array(ratios) < 1 + 1e-9) > 0.7
    assert max(ratios) < 1.03
