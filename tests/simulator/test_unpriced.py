"""Models with work that has no operation are refused; latent widths are priced."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from basis.errors import InputError
from hwmodels.ops import Gemm, GroupedGemm, Route
from simulator.batches import Composition, StepBatch
from simulator.dispatch import Dispatcher
from simulator.layout import Layout
from simulator.loads import count_loads
from simulator.lowering import lower
from simulator.memory import expert_slot_bytes, weights_outside_experts
from simulator.parallelism import Parallelism
from simulator.placement import Placement
from simulator.unpriced import refuse_unpriced
from traces.model_spec import ModelSpec, load_model
from traces.routing_trace import RoutingTrace

EXAMPLES = json.loads((Path(__file__).parents[1] / "traces" / "families.json").read_text())


def example(folder: Path, name: str) -> ModelSpec:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": name} | EXAMPLES[name]))
    return load_model(path)


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("nemotron_h", "Mamba-2"),
        ("nemotron_h", "layers without a feed-forward network"),
        ("qwen3_next", "Gated DeltaNet"),
        ("deepseek_v32", "lightning indexer"),
        ("deepseek_v4", "hyper-connections"),
        ("llama4_text", "attention within chunks"),
        ("longcat_flash", "zero-computation experts"),
        ("switch_transformers", "an encoder"),
        ("afmoe", "an output gate on attention"),
        ("mimo_v2_flash", "sliding attention with heads of its own"),
    ],
)
def test_what_has_no_price_is_refused_by_name(tmp_path: Path, name: str, feature: str) -> None:
    with pytest.raises(InputError, match=f"{feature}.*trace stats"):
        refuse_unpriced(example(tmp_path, name))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "minimax_m2"])
def test_plain_models_pass(tmp_path: Path, name: str) -> None:
    refuse_unpriced(example(tmp_path, name))


def test_a_latent_width_costs_its_two_projections(
    make_model: Callable[..., ModelSpec],
    make_trace: Callable[..., RoutingTrace],
    contiguous: Callable[[ModelSpec, int], Placement],
) -> None:
    """FLOPs are two per active parameter and token, the latent's matrices among them."""
    model = make_model(comm_size=512, gated=False, shared_expert_width=256)
    trace, ranks = make_trace(model, requests=3, length=4), 4
    tokens = trace.num_tokens
    batch = StepBatch(
        rows=np.arange(tokens),
        context=np.ones(tokens, dtype=np.int64),
        home=np.arange(tokens) % ranks,
        last=np.ones(tokens, dtype=np.bool_),
    )
    steps = Composition(batches=(batch,), decode=True, statement="", stand_in=False)
    dispatcher = Dispatcher(
        placement=contiguous(model, ranks), dispatch="even", node_of=np.zeros(ranks, dtype=np.int64)
    )
    loads = count_loads(model, trace, steps, dispatcher)
    works = lower(model, loads)

    attention = 1024 * (8 + 2 + 2) * 128 + 8 * 128 * 1024
    experts = 2 * (2 * 512 * 1536) + 8 * 1024 + 2 * 1024 * 256  # chosen, router, shared
    layers = model.num_layers * (attention + experts + 2 * 1024 * 512)
    active = layers + 4096 * 1024
    flops = sum(
        work.op.flops().sum() * len(work.layers) / work.shape[1]
        for work in works
        if isinstance(work.op, (Gemm, GroupedGemm, Route))
    )
    assert flops == pytest.approx(2 * active * tokens, rel=1e-12)
    names = [work.name for work in works]
    assert names.index("latent down") < names.index("dispatch") < names.index("experts")
    assert names.index("experts") < names.index("combine") < names.index("latent up")
    assert not [w for w in lower(make_model(), loads) if w.name.startswith("latent")]


@pytest.mark.parametrize("name", ["mixtral", "phimoe", "dots1", "deepseek_v3", "qwen2_moe"])
def test_one_rank_holds_every_byte(tmp_path: Path, name: str) -> None:
    layout = Layout.of(Parallelism.dp_ep(1), 1)
    plain = example(tmp_path, name)
    for model in (plain, plain.model_copy(update={"comm_size": 32})):
        held = weights_outside_experts(model, layout).sum()
        assert held == pytest.approx(model.bytes_outside_experts, rel=1e-12)
        assert expert_slot_bytes(model, layout) == model.bytes_per_expert


def test_a_layout_is_refused_before_anything_is_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Mamba"):
        Layout.of(Parallelism.dp_ep(1), 1).check(example(tmp_path, "jamba"))
