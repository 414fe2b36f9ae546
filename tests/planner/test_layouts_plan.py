import json
from dataclasses import replace

import numpy as np
import pytest

from basis.errors import InfeasibleError, InputError
from hwmodels import Cluster, load_cluster
from planner.layouts import enumerate_layouts
from planner.layouts_measured import Measured, Simulator
from planner.layouts_memory import by_rank, need_of
from planner.layouts_plan import LayoutPlan, confirm_layouts, plan_layouts
from planner.layouts_question import Sweep, ask, at_lengths, effort
from planner.layouts_words import is_tie, why_lost
from planner.options import PlanOptions
from planner.plan import keeps_the_rules, make_plan
from planner.scoring import Facts
from simulator.deployment import Workload
from simulator.parallelism import AttentionLayout, ExpertLayout, Parallelism
from traces.model_spec import Attention, ModelSpec
from traces.splits import split_requests
from traces.synth import synthetic_trace, zipf_shares

EXPERTS = 12
TRACE = synthetic_trace(
    zipf_shares(EXPERTS, 0.8, layers=2, seed=1), tokens=1200, requests=40, top_k=2, seed=2
)
MODEL = ModelSpec(
    name="tiny", family="mixtral", num_layers=2, hidden_size=1024, vocab_size=1000,
    tie_embeddings=False, moe_layer_ids=(0, 1), num_experts=EXPERTS, top_k=2, expert_width=2048,
    attention=Attention(
        kind="gqa", num_heads=8, num_kv_heads=2, head_dim=128, v_head_dim=128, windows=(None,) * 2
    ),
    weight_dtype="bf16", expert_dtype="bf16", activation_dtype="bf16", kv_dtype="bf16",
    comm_size=1024,
)  # fmt: skip
SWEEP = Sweep(input_tokens=512, output_tokens=128, concurrency=(1, 8, 64))


def small(cluster: Cluster, capacity: float) -> Cluster:
    """The same cluster with ``capacity`` times the memory."""
    memory = cluster.device.memory
    less = memory.model_copy(update={"capacity": memory.capacity.times(capacity)})
    device = cluster.device.model_copy(update={"memories": {"hbm": less}})
    return cluster.model_copy(update={"device": device})


def replace_ranks(cluster: Cluster, ranks: int) -> Cluster:
    return cluster.model_copy(update={"gpus": ranks})


def facts(cluster: Cluster | None = None, batch: int = 64, **options: object) -> Facts:
    asked = {"steps": 2, "seeds": 3, "time_limit": "2 s"} | options
    return Facts(
        model=MODEL,
        cluster=cluster or load_cluster("hgx-h100-8", gpus=4),
        workload=Workload(decode_batch=batch),
        options=PlanOptions.model_validate(asked),
    )


@pytest.fixture(scope="module")
def swept() -> LayoutPlan:
    return plan_layouts(facts(), TRACE, "early_late", sweep=SWEEP)


def everything(asked: Facts, sizes: tuple[int, ...], sweep: Sweep | None) -> list[Measured]:
    """Simulate every layout at every batch size: the oracle."""
    seen, unseen = split_requests(TRACE, "early_late")
    unseen = unseen if sweep is None else at_lengths(unseen, sweep)
    simulator = Simulator(facts=asked, seen=seen, unseen=unseen, second_stage_time=1.0)
    return [
        simulator.measure(candidate, size, 0.0, full=True)
        for candidate in enumerate_layouts(MODEL, asked.cluster)
        for size in sizes
    ]


def test_the_proved_choice_is_the_best_of_all_layouts(swept: LayoutPlan) -> None:
    assert swept.proof.proved
    assert "optimal within the model" in swept.proof.statement
    assert swept.proof.simulated < swept.proof.points
    best = max(everything(facts(), (1, 8, 64), SWEEP), key=lambda m: m.tokens_per_second)
    assert swept.chosen.tokens_per_second >= best.tokens_per_second * (1 - 1e-3)


def test_the_front_is_that_of_all_layouts(swept: LayoutPlan) -> None:
    assert swept.proof.sizes_proved == swept.proof.sizes == 3
    for found in everything(facts(), (1, 8, 64), SWEEP):
        assert any(
            point.step_time <= found.step_time * (1 + 1e-3)
            and point.tokens_per_second >= found.tokens_per_second * (1 - 1e-3)
            for point in swept.front
        )
    times = [point.step_time for point in swept.front]
    speeds = [point.tokens_per_second for point in swept.front]
    assert times == sorted(times)
    assert speeds == sorted(speeds)


def test_every_layout_is_accounted_for(swept: LayoutPlan) -> None:
    names = {lost.name for lost in (*swept.alternatives, *swept.rejected)}
    every = {c.name for c in enumerate_layouts(MODEL, facts().cluster)}
    assert names | {swept.chosen.candidate.name} == every
    assert len(names) == len(every) - 1 == swept.enumerated - 1
    assert all(lost.why for lost in swept.alternatives)


def test_bounds_hold_and_times_add_up(swept: LayoutPlan) -> None:
    for point in swept.front:
        assert point.bound <= point.step_time * (1 + 1e-9)
        assert point.tokens_per_second == pytest.approx(point.size / point.step_time)
        assert sum(point.seconds_by_cause.values()) == pytest.approx(point.step_time)


def test_memory_is_that_of_the_simulator(swept: LayoutPlan) -> None:
    need = need_of(MODEL, swept.chosen.candidate, swept.chosen.size, 512 + 129 / 2)
    even = by_rank(need, facts().cluster)
    assert swept.chosen.memory["weights"] == even["weights"]
    assert swept.chosen.memory["experts"] == even["experts"]
    assert swept.chosen.memory["kv_cache"] == pytest.approx(even["kv_cache"], rel=0.1)


def test_plain_data(swept: LayoutPlan) -> None:
    data = json.loads(json.dumps(swept.to_dict(), allow_nan=False))
    assert data["chosen"]["tokens_per_second_per_gpu"] * 4 == pytest.approx(
        data["chosen"]["tokens_per_second"]
    )
    assert data["runner_up"]["why_lost"] == swept.why_lost
    assert data["proof"]["proved"] is True
    Parallelism.model_validate(data["chosen"]["parallelism"])


def test_the_loser_is_explained_by_its_causes(swept: LayoutPlan) -> None:
    runner = swept.runner_up
    assert runner is not None
    assert runner.candidate.name != swept.chosen.candidate.name
    assert swept.tie == is_tie(swept.chosen, runner)
    rest = {"experts": swept.chosen.step_time}
    fast = replace(swept.chosen, seconds_by_cause=rest)
    slow = replace(
        swept.chosen,
        step_times=swept.chosen.step_times * 2,
        throughput_by_seed=swept.chosen.throughput_by_seed / 2,
        seconds_by_cause=rest | {"tensor_parallel": swept.chosen.step_time},
    )
    text = why_lost(slow, fast)
    assert text.startswith("50.0% fewer tokens/s (noise 0.0%)")
    assert "tensor-parallel all-reduces and gathers (50% of its step against 0%)" in text


def test_a_layout_ties_with_itself(swept: LayoutPlan) -> None:
    assert is_tie(swept.chosen, swept.chosen)
    assert swept.chosen.gain_over(swept.chosen) == (0.0, 0.0)


def test_one_batch_size_and_the_other_split() -> None:
    plan = plan_layouts(facts(), TRACE, "interleaved")
    assert plan.question.sizes == (64,)
    assert len(plan.front) == 1  # at one batch size the fastest step has the most tokens/s
    assert plan.front[0].candidate.name == plan.chosen.candidate.name
    assert "early_late" in confirm_layouts(facts(), TRACE, "early_late", plan)


def test_redundant_experts_are_found() -> None:
    asked = facts(load_cluster("gb200-nvl72", gpus=8), batch=512)
    plan = plan_layouts(asked, TRACE, "early_late")
    needed = [c for c in enumerate_layouts(MODEL, asked.cluster) if c.layout.ep == 8]
    assert {c.redundant_experts for c in needed} == {4}
    rows = plan.chosen.deployment.physical_to_logical_map
    assert len(rows[0]) == EXPERTS + plan.chosen.candidate.redundant_experts


def test_the_limit_on_tpot() -> None:
    free = plan_layouts(facts(), TRACE, "early_late", sweep=SWEEP)
    limit = (free.front[0].tpot_p99 + free.chosen.tpot_p99) / 2
    asked = facts(limits={"tpot_p99": f"{limit * 1e6} us"})
    kept = plan_layouts(asked, TRACE, "early_late", sweep=SWEEP)
    assert kept.chosen.tpot_p99 <= limit
    assert kept.chosen.tokens_per_second <= free.chosen.tokens_per_second
    with pytest.raises(InfeasibleError, match="no layout keeps tpot_p99") as caught:
        plan_layouts(facts(limits={"tpot_p99": "1 us"}), TRACE, "early_late", sweep=SWEEP)
    assert caught.value.levers


def test_a_model_that_fits_nowhere() -> None:
    cramped = small(load_cluster("hgx-h100-8", gpus=2), 1e-3)
    with pytest.raises(InfeasibleError, match="in none of 9 layouts") as caught:
        plan_layouts(facts(cramped), TRACE, "early_late")
    levers = " | ".join(caught.value.levers)
    assert "at least 8 GPUs" in levers
    assert "of memory" in levers
    with pytest.raises(InfeasibleError):
        plan_layouts(facts(replace_ranks(cramped, 4)), TRACE, "early_late")
    assert plan_layouts(facts(replace_ranks(cramped, 8)), TRACE, "early_late").chosen


def test_the_rejected_say_what_they_lack() -> None:
    one = small(load_cluster("hgx-h100-8", gpus=4), 4e-3)
    plan = plan_layouts(facts(one), TRACE, "early_late")
    assert plan.rejected
    assert all("are usable" in lost.why for lost in plan.rejected)
    assert plan.chosen.memory["total"] <= plan.chosen.memory["usable"]


def test_prefill_is_refused() -> None:
    asked = replace(facts(), workload=Workload(prefill_tokens=64))
    with pytest.raises(InputError, match="compared in decode"):
        plan_layouts(asked, TRACE, "early_late")


def test_sizes_of_a_sweep() -> None:
    free = Sweep(input_tokens=10, output_tokens=10)
    sizes = ask(facts(), TRACE, free).sizes
    assert sizes[:8] == (1, 2, 4, 8, 16, 32, 64, 128)
    assert 4 * 48 in sizes  # halfway where memory decides
    assert ask(facts(), TRACE, free).mean_context == pytest.approx(10 + 5.5)
    with pytest.raises(InputError, match="concurrency 0"):
        ask(facts(), TRACE, Sweep(input_tokens=1, output_tokens=1, concurrency=0))


def test_contexts_follow_the_lengths_and_routing_stays() -> None:
    moved = at_lengths(TRACE, Sweep(input_tokens=100, output_tokens=60))
    assert moved.position.min() == 100
    assert moved.position.max() < 160
    assert moved.position.mean() == pytest.approx(129, abs=1)
    assert np.array_equal(moved.experts, TRACE.experts)
    first = TRACE.request_id == TRACE.request_id[0]
    assert (np.diff(moved.position[first]) >= 0).all()


def test_effort_shrinks_with_the_step() -> None:
    options = PlanOptions(steps=16, seeds=5)
    few = effort(options, MODEL, 4, 8)
    many = effort(options, MODEL, 4, 2**22)
    assert (many.steps, many.seeds) == (1, 1)
    assert few.steps * few.seeds > 1


@pytest.mark.parametrize(("ep", "tp"), [(2, 2), (2, 1), (1, 4)])
def test_a_plan_on_another_layout(ep: int, tp: int) -> None:
    """`make_plan` places over the EP ranks of a block, whatever the layout."""
    layout = Parallelism(attention=AttentionLayout(dp=2, tp=2), experts=ExpertLayout(ep=ep, tp=tp))
    asked = replace(facts(seeds=2), parallelism=layout)
    plan = make_plan(asked, TRACE, "early_late")
    assert plan.deployment.parallelism == layout
    assert plan.certificate.bound <= plan.certificate.objective * (1 + 1e-9)
    assert keeps_the_rules(plan.deployment, EXPERTS, asked)
    seen, _ = split_requests(TRACE, "early_late")
    assert plan.certificate.mean_by_layer.tolist() == [seen.num_tokens * 2 / ep] * 2
