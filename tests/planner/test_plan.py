import numpy as np
import pytest

from basis import InfeasibleError, InputError
from hwmodels import load_cluster
from planner.options import Limits, PlanOptions
from planner.plan import Plan, baseline_deployments, keeps_the_rules, make_plan
from planner.scoring import Facts, score
from simulator.deployment import Workload
from traces.model_spec import Attention, ModelSpec
from traces.splits import Split, split_requests
from traces.synth import synthetic_trace, zipf_shares

SPLITS: tuple[Split, ...] = ("early_late", "interleaved")
TRACE = synthetic_trace(
    zipf_shares(16, 0.7, layers=3, seed=1), tokens=3000, requests=60, top_k=2, seed=2
)
MODEL = ModelSpec(
    name="tiny",
    family="mixtral",
    num_layers=3,
    hidden_size=1024,
    vocab_size=1000,
    tie_embeddings=False,
    moe_layer_ids=(0, 1, 2),
    num_experts=16,
    top_k=2,
    expert_width=2048,
    shared_expert_width=0,
    dense_width=0,
    attention=Attention(
        kind="gqa", num_heads=8, num_kv_heads=2, head_dim=128, v_head_dim=128, windows=(None,) * 3
    ),
    weight_dtype="bf16",
    expert_dtype="bf16",
    activation_dtype="bf16",
    kv_dtype="bf16",
    comm_size=1024,
)


def _facts(workload: Workload | None = None, **options: object) -> Facts:
    asked = {"redundant_experts": 4, "steps": 3, "seeds": 3, "time_limit": "5 s"} | options
    return Facts(
        model=MODEL,
        cluster=load_cluster("hgx-h100-8", gpus=4),
        workload=workload or Workload(decode_batch=512),
        options=PlanOptions.model_validate(asked),
    )


@pytest.fixture(scope="module", params=SPLITS)
def planned(request: pytest.FixtureRequest) -> tuple[Facts, Plan]:
    facts = _facts()
    return facts, make_plan(facts, TRACE, request.param)


def test_certificate_is_of_the_chosen_placement(planned: tuple[Facts, Plan]) -> None:
    _, plan = planned
    seen, _ = split_requests(TRACE, plan.split)
    loads = np.stack(
        [np.bincount(seen.experts[:, i].ravel(), minlength=16) for i in range(3)]
    ).astype(float)
    slots = np.array(plan.deployment.physical_to_logical_map)
    for layer in range(3):
        count = np.bincount(slots[layer], minlength=16)
        rank = (loads[layer] / count)[slots[layer]].reshape(4, 5).sum(axis=1)
        assert plan.certificate.objective_by_layer[layer] == pytest.approx(rank.max())
    assert (plan.certificate.bound_by_layer <= plan.certificate.objective_by_layer + 1e-6).all()
    assert (plan.certificate.bound_by_layer >= plan.certificate.mean_by_layer - 1e-6).all()


def test_the_plan_keeps_the_rules(planned: tuple[Facts, Plan]) -> None:
    facts, plan = planned
    assert keeps_the_rules(plan.deployment, 20, facts)


def test_never_slower_than_a_baseline_that_keeps_the_rules_where_it_was_planned(
    planned: tuple[Facts, Plan],
) -> None:
    facts, plan = planned
    seen, _ = split_requests(TRACE, plan.split)
    mine = score(facts, seen, plan.deployment)
    for deployment in baseline_deployments(facts, seen).values():
        if keeps_the_rules(deployment, 20, facts):
            gain, noise = mine.gain_over(score(facts, seen, deployment))
            assert gain >= -noise


def test_every_candidate_is_accounted_for(planned: tuple[Facts, Plan]) -> None:
    _, plan = planned
    named = {plan.name} | {lost.name for lost in plan.alternatives}
    assert named == {"second stage", "first stage", "contiguous", "round_robin", "eplb"}


def test_contiguous_has_no_redundant_slots(planned: tuple[Facts, Plan]) -> None:
    facts, plan = planned
    seen, _ = split_requests(TRACE, plan.split)
    base = baseline_deployments(facts, seen)
    assert len(base["contiguous"].physical_to_logical_map[0]) == 16
    assert len(base["eplb"].physical_to_logical_map[0]) == 20


def test_same_seed_same_plan() -> None:
    first, again = (make_plan(_facts(), TRACE, "early_late") for _ in range(2))
    assert first.deployment == again.deployment
    assert first.predicted.summary() == again.predicted.summary()


def test_a_score_against_itself_gains_nothing(planned: tuple[Facts, Plan]) -> None:
    _, plan = planned
    assert plan.predicted.gain_over(plan.predicted) == (0.0, 0.0)


def test_limits() -> None:
    with pytest.raises(InfeasibleError, match="tpot_p99"):
        make_plan(_facts(limits={"tpot_p99": "1 us"}), TRACE, "early_late")
    with pytest.raises(InputError, match="needs decode_batch"):
        make_plan(
            _facts(Workload(prefill_tokens=256), limits={"tpot_p99": "1 s"}), TRACE, "early_late"
        )
    assert Limits().tpot_p99 is None
