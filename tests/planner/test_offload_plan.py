"""Offload plans on a small model: what is promised must hold in the simulator."""

import numpy as np
import pytest

from basis.errors import InfeasibleError, InputError
from hwmodels import load_cluster
from planner.offload_baselines import first_layers, most_frequent, rows_of, uniform
from planner.offload_candidates import Maker, Menu
from planner.offload_options import OffloadOptions
from planner.offload_plan import OffloadPlan, make_offload_plan
from planner.offload_sample import OffloadFacts, sample_steps
from simulator.deployment import Deployment, Workload
from simulator.offload import Cache, Offload, Site, SiteChoice
from traces.model_spec import Attention, ModelSpec
from traces.splits import split_requests
from traces.synth import synthetic_trace, zipf_shares

LAYERS, EXPERTS, TOP_K = 4, 8, 2
MODEL = ModelSpec(
    name="tiny",
    family="mixtral",
    num_layers=5,
    hidden_size=1024,
    vocab_size=1000,
    tie_embeddings=False,
    moe_layer_ids=(0, 1, 2, 3),
    num_experts=EXPERTS,
    top_k=TOP_K,
    expert_width=2048,
    shared_expert_width=512,
    dense_width=2048,
    attention=Attention(
        kind="gqa", num_heads=8, num_kv_heads=2, head_dim=128, v_head_dim=128, windows=(None,) * 5
    ),
    weight_dtype="bf16",
    expert_dtype="mxfp4",
    activation_dtype="bf16",
    kv_dtype="bf16",
    comm_size=1024,
)
TRACE = synthetic_trace(
    zipf_shares(EXPERTS, 0.8, layers=LAYERS, seed=1),
    tokens=2000,
    requests=40,
    top_k=TOP_K,
    seed=2,
    candidates=2 * TOP_K,
    reuse=0.6,
)
ONE = MODEL.bytes_per_expert


def _facts(
    cluster: str = "workstation-rtx4090", batch: int = 1, gpus: int | None = None, **options: object
) -> OffloadFacts:
    asked = {
        "fast_memory": 12.5 * ONE,
        "planning_seeds": 20,
        "steps": 12,
        "seeds": 3,
        "time_limit": "5 s",
        "workers": 1,
    } | options
    asked["fast_memory"] = f"{asked['fast_memory']} B" if asked["fast_memory"] else None
    return OffloadFacts(
        model=MODEL,
        cluster=load_cluster(cluster, gpus=gpus),
        workload=Workload(decode_batch=batch),
        options=OffloadOptions.model_validate(asked),
    )


PLACES = [
    ("workstation-rtx4090", "host", "auto"),
    ("gpu-cxl-ndp", "cxl", "auto"),
    ("workstation-rtx4090", "nvme", "auto"),
    ("workstation-rtx4090", "host", None),
]


@pytest.mark.parametrize(("cluster", "home", "processor"), PLACES)
@pytest.mark.parametrize("batch", [1, 6])
def test_the_programmes_objective_is_the_simulated_step_time(
    cluster: str, home: str, processor: str | None, batch: int
) -> None:
    facts = _facts(cluster, batch, home=home, processor=processor)
    sample = sample_steps(facts, TRACE)
    rng = np.random.default_rng(batch)
    for _ in range(3):
        draw = rng.random((LAYERS, EXPERTS))
        keep = draw < 0.4
        fetch = ~keep if facts.processor is None else draw > 0.7
        expected = sample.outside + sum(
            layer.mean(k[None], f[None])[0]
            for layer, k, f in zip(sample.layers, keep, fetch, strict=True)
        )
        deployment = facts.deploy(_planned(facts, keep, fetch))
        simulated = [
            facts.simulate(TRACE, deployment, steps=2, seed=seed).step_times.mean()
            for seed in range(20)
        ]
        assert expected == pytest.approx(np.mean(simulated), rel=1e-9)


def _planned(facts: OffloadFacts, keep: np.ndarray, fetch: np.ndarray) -> Offload:
    names: list[SiteChoice] = ["side", "fetch", "fast"]
    codes = np.where(keep, 2, fetch.astype(int))
    table = tuple(tuple(names[c] for c in row) for row in codes)
    site = (
        Site(name="fetch")
        if facts.processor is None
        else Site(name="planned", processor=facts.processor, table=table)
    )
    return Offload(home=facts.options.home, resident=rows_of(keep), site=site)


@pytest.fixture(scope="module", params=["early_late", "interleaved"])
def planned(request: pytest.FixtureRequest) -> tuple[OffloadFacts, OffloadPlan]:
    facts, split = _facts(batch=3), request.param
    return facts, make_offload_plan(facts, TRACE, split)


def test_never_slower_than_a_baseline_where_it_was_planned(
    planned: tuple[OffloadFacts, OffloadPlan],
) -> None:
    _, plan = planned
    own = plan.planned_on[plan.name]
    assert set(plan.baselines) == {
        "first_layers",
        "uniform",
        "most_frequent",
        "lru_on_demand",
        "all_aside",
    }
    for name in plan.baselines:
        assert own <= plan.planned_on[name]
    assert own == min(plan.planned_on.values())
    assert {lost.name for lost in plan.alternatives} == set(plan.planned_on) - {plan.name}


def test_certificates_are_proofs_of_what_is_simulated(
    planned: tuple[OffloadFacts, OffloadPlan],
) -> None:
    _, plan = planned
    assert set(plan.certificates) == {"home", "planned", "any"}
    for rule, certificate in plan.certificates.items():
        assert certificate.bound <= certificate.objective
        assert 0 <= certificate.gap < (0.01 if rule == "home" else 0.25)
        assert certificate.status in ("optimal", "gap", "time_limit")
        assert "12 experts" in certificate.problem
    both = plan.certificates
    assert both["planned"].objective <= both["home"].objective * 1.001  # it may do more
    assert both["any"].bound <= both["planned"].objective  # whatever they may do, it may do
    assert both["any"].bound <= both["home"].objective
    own = {"ilp_home": "home", "ilp_planned": "planned"}.get(plan.name, "any")
    assert plan.certificate == both[own]


def test_no_candidate_takes_more_than_the_budget(
    planned: tuple[OffloadFacts, OffloadPlan],
) -> None:
    facts, plan = planned
    seen, _ = split_requests(TRACE, plan.split)
    assert plan.slots == 12
    for deployment in (plan.deployment, *plan.engine.values()):
        for result in facts.score(seen, deployment).results:
            terms = result.tiers["hbm"].terms  # type: ignore[attr-defined]
            experts = ("resident experts", "expert cache", "landing buffers")
            assert sum(terms.get(name, 0.0) for name in experts) <= plan.fast_bytes


def _kept(deployment: Deployment) -> np.ndarray:
    assert deployment.offload is not None
    return deployment.offload.resident_mask(MODEL)


def test_engines_get_what_they_can_run(planned: tuple[OffloadFacts, OffloadPlan]) -> None:
    _, plan = planned
    assert set(plan.engine) == {"experts", "layers", "last_layers"}
    for deployment in plan.engine.values():
        assert deployment.offload is not None
        assert deployment.offload.site.name == "home"
        assert deployment.offload.cache is None
    whole = _kept(plan.engine["layers"]).sum(axis=1)
    assert set(whole.tolist()) <= {0, EXPERTS}
    last = _kept(plan.engine["last_layers"]).any(axis=1).astype(int)
    assert (np.diff(last) >= 0).all()
    times = {name: s.step_times.mean() for name, s in plan.engine_predicted.items()}
    assert times["experts"] <= times["layers"] * 1.05  # the coarser grain does not gain


def test_without_a_processor_everything_that_is_not_kept_is_fetched() -> None:
    facts = _facts(home="nvme", fast_memory=20 * ONE)
    plan = make_offload_plan(facts, TRACE, "interleaved")
    assert facts.processor is None
    assert set(plan.certificates) == {"planned", "any"}
    assert "all_fetched" in plan.baselines
    assert plan.engine == {}
    for name in plan.baselines:
        assert plan.planned_on[plan.name] <= plan.planned_on[name]


def test_the_same_question_has_the_same_answer() -> None:
    facts = _facts(fast_memory=5 * ONE)
    first, second = (make_offload_plan(facts, TRACE, "early_late") for _ in range(2))
    assert first.name == second.name
    assert first.deployment == second.deployment
    np.testing.assert_array_equal(first.predicted.step_times, second.predicted.step_times)


def test_by_default_the_whole_fast_memory_is_used() -> None:
    facts = _facts(fast_memory=None)
    sample = sample_steps(facts, TRACE)
    plan = make_offload_plan(facts, TRACE, "early_late")
    assert plan.fast_bytes == pytest.approx(sample.limit - sample.fixed_bytes, rel=0.01)
    assert plan.slots == LAYERS * EXPERTS  # a small model: everything fits
    assert plan.certificates["home"].status == "optimal"


def test_candidates_that_a_memory_does_not_hold_lose_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = Menu.candidates

    def with_one_that_does_not_fit(menu: Menu) -> dict[str, Maker]:
        def too_large(room: int) -> Offload:
            raise InfeasibleError("memory host 2 B -- at most 1 B", levers=("a larger host",))

        return known(menu) | {"too_large": too_large}

    monkeypatch.setattr(Menu, "candidates", with_one_that_does_not_fit)
    plan = make_offload_plan(_facts(fast_memory=3 * ONE), TRACE, "early_late")
    lost = {its.name: its.why for its in plan.alternatives}
    assert lost["too_large"] == "does not fit: memory host 2 B -- at most 1 B"
    assert "too_large" not in plan.planned_on


def test_every_deployment_is_scored_on_the_same_steps() -> None:
    facts = _facts(batch=3)
    cached = Offload(cache=Cache(slots=2), site=Site(name="fetch"))
    static = Offload(resident=((0,), (1,), (2,), (3,)), site=Site(name="fetch"))
    scores = [facts.score(TRACE, facts.deploy(offload)) for offload in (cached, static)]
    for one, other in zip(*(score.results for score in scores), strict=True):
        np.testing.assert_array_equal(one.loads.per_slot, other.loads.per_slot)


@pytest.mark.parametrize("memory", [0.5 * ONE, 1e12])
def test_memory_that_is_not_there_is_refused(memory: float) -> None:
    with pytest.raises(InfeasibleError, match=r"for experts -- one expert takes") as caught:
        make_offload_plan(_facts(fast_memory=memory), TRACE, "early_late")
    assert any("fast_memory between" in lever for lever in caught.value.levers)


def test_several_ranks_are_refused() -> None:
    with pytest.raises(InputError, match=r"2 ranks of .* set gpus: 1"):
        make_offload_plan(_facts("rtx4090-8", gpus=2), TRACE, "early_late")


@pytest.mark.parametrize("slots", [0, 7, 8, 20, 32])
def test_baselines_fill_their_slots(slots: int) -> None:
    rng = np.random.default_rng(slots)
    counts = rng.integers(0, 100, (LAYERS, EXPERTS))
    front, even = first_layers(LAYERS, EXPERTS, slots), uniform(LAYERS, EXPERTS, slots)
    top = most_frequent(counts, slots)
    assert front.sum() == slots // EXPERTS * EXPERTS
    assert (np.diff(front.any(axis=1).astype(int)) >= 0).all()  # first layers stay at home
    assert even.sum() == top.sum() == slots
    assert np.ptp(even.sum(axis=1)) <= 1
    assert (np.diff(even.astype(int), axis=1) <= 0).all()  # lowest ids
    if 0 < slots < counts.size:
        assert counts[top].min() >= counts[~top].max()
