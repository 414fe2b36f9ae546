"""Deployments as data, and what is refused, each with one clear message."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import yaml

from basis import InfeasibleError, InputError, validate
from hwmodels import Cluster
from simulator import Deployment, Placement, Workload, simulate
from traces import ModelSpec, RoutingTrace

ModelOf = Callable[..., ModelSpec]
TraceOf = Callable[..., RoutingTrace]
PlacementOf = Callable[[ModelSpec, int], Placement]
ClusterOf = Callable[[int], Cluster]


def _data(ranks: int = 4, **changes: object) -> dict[str, object]:
    data: dict[str, object] = {
        "parallelism": {
            "attention": {"dp": ranks, "tp": 1, "pp": 1},
            "experts": {"ep": ranks, "tp": 1},
        },
        "physical_to_logical_map": [list(range(8))] * 2,
        "dispatch": "even",
        "slot_share": None,
    }
    return data | changes


def test_it_round_trips_through_json_and_yaml(make_model: ModelOf, contiguous: PlacementOf) -> None:
    share = np.full((2, 8), 1.0)
    deployment = Deployment.of(contiguous(make_model(), 4), "shares", share)
    assert Deployment.model_validate_json(deployment.model_dump_json()) == deployment
    text = yaml.safe_dump(deployment.model_dump(mode="json"))
    assert validate(yaml.safe_load(text), Deployment, "here") == deployment
    assert validate(_data(), Deployment, "here") == Deployment.of(contiguous(make_model(), 4))


def test_the_placement_survives(
    make_model: ModelOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model()
    slots = np.array([[7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 6, 1, 3, 5, 7]])
    deployment = Deployment.of(Placement(slots=slots, num_experts=8, num_ranks=2))
    again = Deployment.model_validate(json.loads(deployment.model_dump_json()))
    assert again.placement_for(model, cluster_of(2)).slots.tolist() == slots.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallelism": {"attention": {"dp": 2}, "experts": {"ep": 2}}},
            "attention dp 2 x tp 1 x pp 1 = 2 on 4 ranks -- the product must be 4, so dp 4",
        ),
        (
            {"parallelism": {"attention": {"dp": 4}, "experts": {"ep": 3}}},
            "ep 3 x tp 1 = 3 do not divide the 4 ranks of a stage -- .* one of 1, 2, 4",
        ),
        (
            {"physical_to_logical_map": [list(range(8))]},
            "has 1 rows, tiny has 2 MoE layers -- give one row per MoE layer",
        ),
        (
            {"physical_to_logical_map": [list(range(8)), list(range(7))]},
            r"rows have \[7, 8\] entries",
        ),
        ({"physical_to_logical_map": [[*range(8), 0]] * 2}, "do not divide over 4 ranks"),
        ({"physical_to_logical_map": [[*range(7), 8]] * 2}, "names expert 8"),
        ({"physical_to_logical_map": [[*range(7), 0]] * 2}, "expert 7 of MoE layer row 0"),
        ({"dispatch": "shares"}, "without slot_share"),
        ({"slot_share": [[1.0] * 8] * 2}, "with slot_share"),
        ({"dispatch": "shares", "slot_share": [[1.0] * 8, [1.0] * 4]}, "slot_share: rows have"),
    ],
)
def test_what_does_not_fit_is_refused(
    make_model: ModelOf,
    make_trace: TraceOf,
    cluster_of: ClusterOf,
    changes: dict[str, object],
    message: str,
) -> None:
    model = make_model()
    deployment = validate(_data(**changes), Deployment, "here")
    with pytest.raises(InputError, match=message):
        simulate(model, make_trace(model), cluster_of(4), deployment, Workload(decode_batch=4))


def test_unknown_keys_and_dispatch_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'dispatch'"):
        validate(_data(dispach="even"), Deployment, "here")
    with pytest.raises(InputError, match="dispatch"):
        validate(_data(dispatch="odd"), Deployment, "here")


def test_trace_and_model_must_agree(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model()
    deployment = Deployment.of(contiguous(model, 4))
    for other in (make_model(top_k=3), make_model(num_experts=16), make_model(num_layers=3)):
        with pytest.raises(InputError):
            simulate(model, make_trace(other), cluster_of(4), deployment, Workload(decode_batch=4))


def test_widths_are_free(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    """A small model's routing may be replayed on a larger geometry."""
    small, large = make_model(), make_model(hidden_size=4096, comm_size=4096, expert_width=8192)
    deployment = Deployment.of(contiguous(large, 4))
    options = (cluster_of(4), deployment, Workload(decode_batch=16))
    slow = simulate(large, make_trace(small), *options)
    assert slow.step_times.sum() > simulate(small, make_trace(small), *options).step_times.sum()


def test_a_model_that_does_not_fit_is_infeasible(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model(expert_width=4_000_000)
    deployment = Deployment.of(contiguous(model, 4))
    with pytest.raises(InfeasibleError, match="tiny does not fit on hgx-h100-8") as error:
        simulate(model, make_trace(model), cluster_of(4), deployment, Workload(decode_batch=4))
    assert error.value.levers


@pytest.mark.parametrize("data", [{}, {"decode_batch": 4, "prefill_tokens": 4}])
def test_a_workload_names_exactly_one_phase(data: dict[str, int]) -> None:
    with pytest.raises(InputError, match="exactly one of decode_batch and prefill_tokens"):
        validate(data, Workload, "here")


@pytest.mark.parametrize("steps", [0, -1])
def test_at_least_one_step(
    make_model: ModelOf,
    make_trace: TraceOf,
    contiguous: PlacementOf,
    cluster_of: ClusterOf,
    steps: int,
) -> None:
    model = make_model()
    deployment = Deployment.of(contiguous(model, 4))
    with pytest.raises(InputError, match=f"steps {steps} -- must be at least 1"):
        simulate(
            model,
            make_trace(model),
            cluster_of(4),
            deployment,
            Workload(decode_batch=4),
            steps=steps,
        )
