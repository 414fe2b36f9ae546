"""From a model, a trace, a cluster and a deployment to a Result: the front of the simulator.

Batches are composed from the trace's requests, tokens assigned to replicas, each step written as
operations, priced in seconds on the cluster, and played as a program of streams and collectives.
"""

from basis.errors import InputError
from hwmodels.cluster import Cluster
from simulator.batches import compose
from simulator.deployment import Deployment, Workload
from simulator.evidence import list_evidence
from simulator.loads import count_loads
from simulator.lowering import lower
from simulator.memory import memory_need
from simulator.memory_fits import check_fits
from simulator.metrics import sampling_floor
from simulator.micro_batches import split
from simulator.offload_simulate import simulate_offload
from simulator.playing import parts_of, play_steps
from simulator.pricing import price_step
from simulator.result import Result, causes_of
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace, check_against_model


def simulate(
    model: ModelSpec,
    trace: RoutingTrace,
    cluster: Cluster,
    deployment: Deployment,
    workload: Workload,
    *,
    steps: int = 32,
    seed: int = 0,
) -> Result:
    """Predict how a deployment performs on the work that a trace recorded.

    Parameters
    ----------
    model : ModelSpec
        Geometry that is deployed. It must agree with the trace in MoE layers, experts and top-k;
        widths are the model's own.
    trace : RoutingTrace
        Routing to replay; pass the part that was not planned on.
    cluster, deployment, workload : Cluster, Deployment, Workload
        Where it runs, what was chosen, and what a step carries.
    steps : int
        Steps to simulate, back to back.
    seed : int
        Of the batch composition and of the replica rotation.

    Raises
    ------
    InputError
        If trace and model disagree, or the deployment does not match model or cluster.
    InfeasibleError
        If a rank's memory does not hold what it must.
    """
    if steps < 1:
        raise InputError(f"steps {steps} -- must be at least 1")
    if deployment.offload is not None:
        return simulate_offload(model, trace, cluster, deployment, workload, steps=steps, seed=seed)
    check_against_model(trace, model)
    dispatcher = deployment.dispatcher_for(model, cluster)
    placement, layout = dispatcher.placement, deployment.layout_for(model, cluster)
    composition = compose(trace, workload, layout.dp, steps=steps, seed=seed)
    stage_batches = split(composition, layout.pp).batches
    memory = memory_need(model, placement, composition.batches, layout, stage_batches)
    check_fits(memory, model, placement, cluster, workload.tokens, layout)
    loads = count_loads(
        model,
        trace,
        split(composition, parts_of(layout, deployment.overlap)),
        dispatcher,
        seed=seed,
        layout=layout,
        node_of=cluster.node_of,
    )
    works = lower(model, loads)
    priced = price_step(works, loads, cluster)
    played, low, high = (
        play_steps(
            priced.items,
            seconds,
            layout,
            model.num_layers,
            overlap=deployment.overlap,
            decode=loads.decode,
        )
        for seconds in (priced.seconds, priced.low, priced.high)
    )
    mean_tokens = round(float(loads.step_tokens.mean()))
    return Result(
        step_times=played.step_times,
        step_times_low=low.step_times,
        step_times_high=high.step_times,
        seconds_by_cause=causes_of(played.stages, played.step_times),
        loads=loads,
        memory=memory,
        sampling_floor=sampling_floor(
            mean_tokens, model.top_k, placement.num_ranks * layout.edp, seed=seed
        ),
        evidence=list_evidence(trace, composition, works, priced, cluster),
        composition=composition.statement,
        seed=seed,
        first_step=played.first,
    )
