import numpy as np
import pytest

from basis.errors import InputError
from hwmodels import load_cluster
from hwmodels.cost import price
from hwmodels.ops import GroupedGemm
from planner.offload_costs import GroupTimes, expert_times
from traces.model_spec import Attention, ModelSpec

MODEL = ModelSpec(
    name="tiny",
    family="mixtral",
    num_layers=2,
    hidden_size=1024,
    vocab_size=1000,
    tie_embeddings=False,
    moe_layer_ids=(0, 1),
    num_experts=8,
    top_k=2,
    expert_width=2048,
    shared_expert_width=0,
    dense_width=0,
    attention=Attention(
        kind="gqa", num_heads=8, num_kv_heads=2, head_dim=128, v_head_dim=128, windows=(None,) * 2
    ),
    weight_dtype="bf16",
    expert_dtype="mxfp4",
    activation_dtype="bf16",
    kv_dtype="bf16",
    comm_size=1024,
)
PLACES = (
    ("workstation-rtx4090", "host", "cpu"),
    ("workstation-rtxpro6000", "host", "cpu"),
    ("gpu-cxl-ndp", "cxl", "ndp"),
)


def _group(times: GroupTimes, tokens: np.ndarray) -> np.ndarray:
    sums = times.parts[:, tokens].sum(axis=-1).max(axis=0)
    return np.where(tokens.any(axis=-1), times.launch + sums, 0.0)


@pytest.mark.parametrize(("cluster", "home", "processor"), PLACES)
def test_split_prices_add_up_to_the_price_of_any_group(
    cluster: str, home: str, processor: str
) -> None:
    hardware = load_cluster(cluster)
    most = 600  # far beyond the point where compute takes over from memory
    times = expert_times(MODEL, hardware, home, processor, most)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, most + 1, (40, 8)) * (rng.random((40, 8)) < 0.5)
    tokens[:10] = np.minimum(tokens[:10], 3)
    op = GroupedGemm(
        tokens_per_expert=tokens,
        hidden=1024,
        width=2048,
        gated=True,
        weight_dtype="mxfp4",
        activation_dtype="bf16",
    )
    np.testing.assert_allclose(_group(times.fast, tokens), price(op, hardware).seconds, rtol=1e-12)
    assert times.side is not None
    aside = price(op, hardware, on=processor).seconds
    np.testing.assert_allclose(_group(times.side, tokens), aside, rtol=1e-12)


def test_a_processor_at_another_memory_is_refused() -> None:
    with pytest.raises(InputError, match=r"'cpu' works on 'host', the experts live in 'nvme'"):
        expert_times(MODEL, load_cluster("workstation-rtx4090"), "nvme", "cpu", 4)


def test_unknown_home_is_refused() -> None:
    with pytest.raises(InputError, match="tape"):
        expert_times(MODEL, load_cluster("workstation-rtx4090"), "tape", None, 4)
