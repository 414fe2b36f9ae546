"""The benchmark's arithmetic: its baseline, its residencies, and the simulator's recurrence."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from hwmodels import load_cluster
from simulator.deployment import Deployment, Workload
from simulator.offload import Offload, Site
from simulator.offload_simulate import simulate_offload
from simulator.placement import Placement
from simulator.sites import SiteProblem, assign
from traces.model_spec import Attention, ModelSpec
from traces.synth import synthetic_trace, zipf_shares

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ktransformers.py"
if not SCRIPT.exists():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("ktransformers_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ktransformers_benchmark"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ktransformers_benchmark"]


@pytest.fixture(scope="module")
def drawn(bench):
    """Loads, and the experts that 64 steps of one token use."""
    setting = bench.Setting(tokens=64)
    loads = bench.FAMILIES["log-normal"][0](0.5, 0)
    return loads, bench.active_experts(loads, setting)


def test_straight_line_errs_as_published(bench):
    line = bench.Fit(skew=0, met=True, fixed=0, per_expert=1, predicted=bench.straight_line())
    assert [f"{x:.1f}" for x in bench.scores(line, []).values()] == ["6.5", "1.2", "5.3", "24.6"]


@pytest.mark.parametrize("strategy", ["random", "uniform", "front-loading", "frequency"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_every_strategy_fills_the_share(bench, drawn, strategy, share):
    mask = bench.resident(strategy, share, drawn[0])
    assert mask.sum() == int(bench.LAYERS * bench.EXPERTS * share)


def test_residencies_are_those_of_the_strategies(bench, drawn):
    loads, _ = drawn
    uniform, front, frequent = (
        bench.resident(s, 0.3, loads) for s in ("uniform", "front-loading", "frequency")
    )
    assert np.ptp(uniform.sum(axis=1)) <= 1
    assert ((front.sum(axis=1) % bench.EXPERTS) > 0).sum() <= 1  # one layer at most is split
    assert loads[frequent].min() >= loads[~frequent].max()


def test_counts_follow_the_hypergeometric_mean(bench):
    """Without skew a share s of the experts holds a share s of the choices."""
    loads = np.full((bench.LAYERS, bench.EXPERTS), 1 / bench.EXPERTS)
    active = bench.active_experts(loads, bench.Setting(tokens=256))
    counts = bench.count(active, bench.resident("uniform", 0.5, loads))
    assert (counts.cpu + counts.gpu == bench.TOP_K).all()
    assert counts.cpu.mean() == pytest.approx(bench.TOP_K / 2, rel=0.02)
    absent = np.prod([(256 - i) / (512 - i) for i in range(10)])  # no choice is on the CPU
    assert (counts.cpu == 0).mean() == pytest.approx(absent, abs=0.001)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_predictions_meet_both_ends(bench, concurrency):
    setting = bench.Setting(concurrency=concurrency, tokens=64)
    loads = bench.FAMILIES["log-normal"][0](0.5, 0)
    active = bench.active_experts(loads, setting)
    for strategy, measured in bench.MEASURED.items():
        curve = [bench.count(active, bench.resident(strategy, s, loads)) for s in (0.0, 0.5, 1.0)]
        predicted = bench.predict(strategy, curve, 50e-6, setting, bench.Structure())
        assert predicted[[0, 2]] == pytest.approx(measured[[0, 10]], rel=1e-12)
        assert predicted[0] < predicted[1] < predicted[2]


def test_a_layer_is_the_simulators_site_home(bench, drawn):
    """base + max(GPU, CPU) is `simulator.sites` with the same fixed and added times."""
    loads, active = drawn
    mask = bench.resident("frequency", 0.6, loads)
    base, fixed, per_expert = 150e-6, 80e-6, 17e-6
    gpu = bench.gpu_seconds()
    launch = gpu[1] - (gpu[2] - gpu[1])
    problem = SiteProblem(
        tokens=active.astype(np.int64), resident=np.broadcast_to(mask, active.shape),
        fast_s=np.full(active.shape, gpu[2] - gpu[1]), fetch_s=np.zeros(active.shape),
        side_s=np.full(active.shape, per_expert), fast_fixed=launch, side_fixed=fixed,
    )  # fmt: skip
    expected = (base + assign("home", problem).makespan).sum(axis=1).mean()
    counts = bench.count(active, mask)
    found = bench.step_seconds(counts, base=base, fixed=fixed, per_expert=per_expert)
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_simulator_plays_the_same_recurrence():
    """A step of `simulate_offload` is, layer by layer, what is common plus the longer side."""
    layers, experts, top_k = 6, 64, 8
    model = ModelSpec(
        name="small", family="test", num_layers=layers, hidden_size=2048, vocab_size=4096,
        tie_embeddings=False, moe_layer_ids=tuple(range(layers)), num_experts=experts,
        top_k=top_k, expert_width=512, shared_expert_width=0, dense_width=0,
        weight_dtype="bf16", expert_dtype="fp8", activation_dtype="bf16", kv_dtype="bf16",
        comm_size=2048,
        attention=Attention(
            kind="gqa", num_heads=16, num_kv_heads=2, head_dim=128, v_head_dim=128,
            windows=(None,) * layers,
        ),
    )  # fmt: skip
    trace = synthetic_trace(
        zipf_shares(experts, 0.5, layers, 0), tokens=64, requests=4, top_k=top_k, seed=0
    )
    slots = np.tile(np.arange(experts), (layers, 1))
    deployment = Deployment.of(Placement(slots=slots, num_experts=experts, num_ranks=1)).model_copy(
        update={
            "offload": Offload(
                home="host",
                resident=(tuple(range(48)),) * layers,
                site=Site(name="home", processor="cpu"),
            )
        }
    )
    result = simulate_offload(
        model, trace, load_cluster("ktransformers-4x4090", gpus=1), deployment,
        Workload(decode_batch=1), steps=16,
    )  # fmt: skip
    busy = result.played.busy[:, :, 0]
    names = np.array([item.name for item in result.played.items])

    def of(*wanted: str) -> np.ndarray:
        return np.stack([busy[:, names == name] for name in wanted]).sum(axis=0)

    aside = of("aside out", "experts aside", "aside back")
    fast = of("experts")
    common = busy.sum(axis=1) - aside.sum(axis=1) - fast.sum(axis=1)
    assert (aside > fast).any()
    assert (aside == 0).any()  # the fixed cost is gone where no active expert is on the CPU
    expected = common + np.maximum(fast, aside).sum(axis=1)
    assert result.step_times == pytest.approx(expected, rel=1e-9)
