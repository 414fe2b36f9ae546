"""Metrics against their definitions, worked out again from the trace in plain loops."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hwmodels import Cluster, Stage, load_cluster
from simulator import Deployment, Placement, Result, Workload, sampling_floor, simulate
from simulator.batches import compose
from traces import Attention, ModelSpec, RoutingTrace, decode_batches, read_trace

ModelOf = Callable[..., ModelSpec]
TraceOf = Callable[..., RoutingTrace]
PlacementOf = Callable[[ModelSpec, int], Placement]
ClusterOf = Callable[[int], Cluster]


@pytest.fixture(scope="module")
def setting(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf
) -> tuple[ModelSpec, RoutingTrace, Placement, Cluster]:
    """Four ranks on two nodes of two."""
    model = make_model()
    eight = load_cluster("hgx-h100-8x2")
    node = eight.node.model_copy(update={"devices": 2})
    return model, make_trace(model), contiguous(model, 4), eight.model_copy(update={"node": node})


@pytest.fixture(scope="module")
def result(setting: tuple[ModelSpec, RoutingTrace, Placement, Cluster]) -> Result:
    model, trace, placement, cluster = setting
    workload = Workload(decode_batch=32)
    return simulate(model, trace, cluster, Deployment.of(placement), workload, steps=3, seed=2)


def test_throughput_is_tokens_over_time(result: Result) -> None:
    assert result.tokens_per_second == pytest.approx(3 * 32 / result.step_times.sum())
    low, high = result.tokens_per_second_interval
    assert low < result.tokens_per_second < high
    assert low == pytest.approx(3 * 32 / result.step_times_high.sum())


def test_loads_and_sends_equal_a_plain_count(
    setting: tuple[ModelSpec, RoutingTrace, Placement, Cluster], result: Result
) -> None:
    model, trace, placement, _ = setting
    work = compose(trace, Workload(decode_batch=32), 4, steps=3, seed=2)
    ratios, ranks_away, nodes_away = [], 0, 0
    share = np.zeros((model.num_moe_layers, 4))
    for batch in work.batches:
        for layer in range(model.num_moe_layers):
            load = np.zeros(4)
            for row, home in zip(batch.rows, batch.home, strict=True):
                visited = [int(e) // 2 for e in trace.experts[row, layer]]  # two slots per rank
                for rank in visited:
                    load[rank] += 1
                ranks_away += len(set(visited) - {home})
                nodes_away += len({rank // 2 for rank in visited} - {home // 2})
            ratios.append(load.max() / load.mean())
            share[layer] += load / load.sum() / 3
    assert placement.slots_per_rank == 2
    assert result.straggler == pytest.approx(np.mean(ratios))
    assert result.rank_load == pytest.approx(share)
    assert result.cross_rank_sends == pytest.approx(ranks_away / (3 * 32 * 2))
    assert result.cross_node_sends == pytest.approx(nodes_away / (3 * 32 * 2))


def test_combine_returns_what_dispatch_sent(result: Result) -> None:
    assert result.traffic == pytest.approx(result.traffic.T)
    assert result.traffic.sum() == pytest.approx(2 * result.loads.sent.sum() / 3)


def test_causes_are_the_stages_and_wait(result: Result) -> None:
    elsewhere = {Stage.FETCH, Stage.TRANSFER, Stage.TENSOR_PARALLEL}
    here = [stage.value for stage in Stage if stage not in elsewhere]
    assert list(result.seconds_by_cause) == [*here, "wait"]
    assert result.seconds_by_cause["wait"] > 0
    assert result.seconds_by_cause["dense_ffn"] == 0


def test_shares_of_evidence_are_whole_and_every_line_has_a_source(result: Result) -> None:
    shares = [item.share for item in result.evidence if item.share is not None]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert all(item.source for item in result.evidence)
    assert result.evidence[0].what == "routing"
    assert result.evidence[0].evidence == "assumed"  # a synthetic trace
    kinds = {item.what.split(":")[0] for item in result.evidence}
    assert {"gemm", "grouped_gemm", "attention_decode", "route", "stream", "all_to_all"} <= kinds


def test_everything_is_plain_json(result: Result) -> None:
    whole = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert whole["summary"] == result.summary()
    assert whole["summary"]["sampling_floor"] == sampling_floor(32, 2, 4, seed=2)
    assert whole["summary"]["step_time_s"] == whole["step_time_s"]["mean"]
    assert len(whole["memory"]["total"]) == len(whole["traffic"]) == 4
    assert "seed 2" in whole["composition"]


def test_prefill_counts_prompt_tokens(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    model = make_model()
    deployment = Deployment.of(contiguous(model, 4))
    result = simulate(
        model,
        make_trace(model),
        cluster_of(4),
        deployment,
        Workload(prefill_tokens=64),
        steps=2,
    )
    assert result.loads.tokens.sum() == 2 * 64  # four whole prompts of 16 in each step
    assert result.loads.sequences.sum() == 2 * 4
    assert result.tokens_per_second == pytest.approx(128 / result.step_times.sum())


def test_more_skew_costs_time(
    make_model: ModelOf, make_trace: TraceOf, contiguous: PlacementOf, cluster_of: ClusterOf
) -> None:
    """The same number of (token, expert) pairs, all on one rank or spread over four."""
    model = make_model()
    piled = make_trace(model, np.tile(np.array([0, 1]), (128, 2, 1)))
    pairs = np.arange(128) % 4
    even = make_trace(model, np.stack([2 * pairs, 2 * pairs + 1], axis=-1)[:, None].repeat(2, 1))
    times = [
        simulate(
            model,
            trace,
            cluster_of(4),
            Deployment.of(contiguous(model, 4)),
            Workload(decode_batch=512),
            steps=2,
        )
        for trace in (piled, even)
    ]
    assert times[0].straggler == pytest.approx(4)
    assert times[0].seconds_by_cause["wait"] > times[1].seconds_by_cause["wait"]
    assert times[0].step_times.min() > times[1].step_times.max()


def test_a_real_trace_has_the_straggler_of_its_counts(moeplan_data: Path) -> None:
    trace = read_trace(moeplan_data / "traces" / "gpt-oss-20b-mmlu.parquet")
    attention = Attention(
        kind="gqa", num_heads=64, num_kv_heads=8, head_dim=64, v_head_dim=64, windows=(None,) * 24
    )
    model = ModelSpec(
        name="gpt-oss-20b",
        family="gpt_oss",
        num_layers=24,
        hidden_size=2880,
        vocab_size=201088,
        tie_embeddings=False,
        moe_layer_ids=tuple(range(24)),
        num_experts=32,
        top_k=4,
        expert_width=2880,
        attention=attention,
        weight_dtype="bf16",
        expert_dtype="mxfp4",
        activation_dtype="bf16",
        kv_dtype="bf16",
        comm_size=2880,
    )
    placement = Placement(slots=np.tile(np.arange(32), (24, 1)), num_experts=32, num_ranks=8)
    cluster = load_cluster("hgx-h100-8")
    workload = Workload(decode_batch=256)
    result = simulate(model, trace, cluster, Deployment.of(placement), workload, steps=4)
    rows = decode_batches(trace, batch=256, steps=4, seed=0).rows
    load = np.stack([(trace.experts[rows] // 4 == rank).sum(axis=(1, 3)) for rank in range(8)], -1)
    assert result.straggler == pytest.approx((load.max(-1) / load.mean(-1)).mean())
    assert result.straggler > result.sampling_floor > 1
