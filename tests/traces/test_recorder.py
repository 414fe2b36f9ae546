"""The recorder against the router's own output, on a tiny torch model with padding."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from basis import InputError
from traces.recorder import RoutingRecorder
from traces.routing_trace import read_trace, write_trace

E, K, D, MOE_LAYERS = 8, 3, 6, (1, 2, 4)


class Experts(nn.Module):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states * top_k_weights.sum(-1, keepdim=True)


class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = Experts()
        self.log = []

    def forward(self, x):
        flat = x.flatten(0, 1)
        weights, ids = self.gate(flat).softmax(-1).topk(K)
        self.log.append((ids, weights))
        return self.experts(flat, ids, top_k_weights=weights).view_as(x)


class Model(nn.Module):
    """Layers 0 and 3 are dense, as in models whose first layers are."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.layers = nn.ModuleList()
        for layer in range(5):
            mlp = MoE() if layer in MOE_LAYERS else nn.Linear(D, D)
            self.layers.append(nn.ModuleDict({"mlp": mlp}))

    def forward(self, ids, repeat=1, skip=None):
        x = self.embed(ids)
        for number, layer in enumerate(self.layers):
            for _ in range(repeat if number == 1 else 1):
                x = x if number == skip else x + layer["mlp"](x)
        return x

    def router_output(self, part):
        """Ids (0) or weights (1) of the last pass, ``[T, L, K]``."""
        logs = [self.layers[n]["mlp"].log[-1] for n in MOE_LAYERS]
        return torch.stack([log[part] for log in logs], 1).detach().numpy()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def finish(recorder):
    return recorder.trace(model="tiny", source="test", licence="Apache-2.0")


def test_records_what_the_router_chose_without_padding(model, tmp_path):
    ids = torch.randint(50, (2, 5))
    mask = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=bool)  # right and left padding
    with RoutingRecorder(model, num_experts=E) as recorder:
        recorder.begin(
            request_ids=[7, 3], phase="prefill", step=0, domains=["code", "prose"], mask=mask
        )
        model(ids)
        prefill_ids, prefill_weights = (model.router_output(part) for part in (0, 1))
        recorder.begin(
            request_ids=[7, 3], phase="decode", step=1, domains=["code", "prose"],
            positions=[[3], [4]],
        )  # fmt: skip
        model(torch.randint(50, (2, 1)))
        decode_ids = model.router_output(0)
    trace = finish(recorder)

    assert trace.meta.moe_layer_ids == MOE_LAYERS
    assert (trace.meta.num_experts, trace.meta.top_k) == (E, K)
    assert trace.request_id.tolist() == [3] * 5 + [7] * 4
    assert trace.position.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert trace.decode.tolist() == [False] * 4 + [True] + [False] * 3 + [True]
    assert trace.step.tolist() == trace.decode.astype(int).tolist()
    assert [trace.domains[d] for d in trace.domain] == ["prose"] * 5 + ["code"] * 4
    prefill = ~trace.decode
    rows = [6, 7, 8, 9, 0, 1, 2]  # request 3 is the second row of the batch
    np.testing.assert_array_equal(trace.experts[prefill], prefill_ids[rows])
    np.testing.assert_array_equal(trace.experts[~prefill], decode_ids[[1, 0]])
    np.testing.assert_allclose(trace.weights[prefill], prefill_weights[rows], rtol=1e-3)

    write_trace(trace, tmp_path / "trace.parquet")
    again = read_trace(tmp_path / "trace.parquet")
    np.testing.assert_array_equal(again.experts, trace.experts)
    np.testing.assert_array_equal(again.decode, trace.decode)


def test_phase_and_step_per_token(model):
    with RoutingRecorder(model, num_experts=E) as recorder:
        recorder.begin(
            request_ids=[0], phase=[["prefill", "prefill", "decode"]], step=[[0, 0, 1]],
            domains=["code"],
        )  # fmt: skip
        model(torch.randint(50, (1, 3)))
    trace = finish(recorder)
    assert trace.decode.tolist() == [False, False, True]
    assert trace.step.tolist() == [0, 0, 1]


def test_hooks_are_gone_after_the_block(model):
    with RoutingRecorder(model, num_experts=E):
        pass
    model(torch.randint(50, (1, 3)))  # would complain of a missing begin()
    assert not any(module._forward_pre_hooks for module in model.modules())


def begin(recorder, **changes):
    arguments = {"request_ids": [0], "phase": "prefill", "step": 0, "domains": ["code"]}
    recorder.begin(**(arguments | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"repeat": 2}, "layer 1 was seen twice"),
        ({"skip": 2}, r"1 of 3 MoE layers were not seen .*first: layer 2"),
    ],
)
def test_each_layer_is_seen_exactly_once(model, call, message):
    with RoutingRecorder(model, num_experts=E) as recorder:
        begin(recorder)
        with pytest.raises(InputError, match=message):
            model(torch.randint(50, (1, 3)), **call)


def test_a_forward_needs_its_begin(model):
    with RoutingRecorder(model, num_experts=E) as recorder:
        with pytest.raises(InputError, match=r"without begin\(\)"):
            model(torch.randint(50, (1, 3)))
        begin(recorder)
        model(torch.randint(50, (1, 3)))
        with pytest.raises(InputError, match=r"without begin\(\)"):
            model(torch.randint(50, (1, 3)))


def test_nothing_to_hook_or_nothing_recorded(model):
    with pytest.raises(InputError, match="0 modules named"):
        RoutingRecorder(nn.Linear(2, 2), num_experts=E)
    with RoutingRecorder(model, num_experts=E) as recorder:
        pass
    with pytest.raises(InputError, match="no forward pass was recorded"):
        finish(recorder)


def test_the_batch_must_be_the_one_described(model):
    with RoutingRecorder(model, num_experts=E) as recorder:
        begin(recorder, request_ids=[0, 1], domains=["code", "code"])
        with pytest.raises(InputError, match="got 3 tokens for 2 requests"):
            model(torch.randint(50, (1, 3)))
        begin(recorder, positions=[[0, 1]])
        with pytest.raises(InputError, match=r"position has shape \(1, 2\)"):
            model(torch.randint(50, (1, 3)))


def test_ids_must_be_below_num_experts(model):
    with RoutingRecorder(model, num_experts=2) as recorder:
        begin(recorder)
        with pytest.raises(InputError, match="allowed are 0 to 1"):
            model(torch.randint(50, (1, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "generate"}, "phase 'generate' -- allowed are"),
        ({"domains": ["a", "b"]}, "1 requests and 2 domains"),
        ({"request_ids": [], "domains": []}, "0 requests and 0 domains"),
    ],
)
def test_bad_descriptions_are_refused(model, changes, message):
    with (
        RoutingRecorder(model, num_experts=E) as recorder,
        pytest.raises(InputError, match=message),
    ):
        begin(recorder, **changes)


@pytest.mark.parametrize("module", ["traces.recorder", "traces.record_model"])
def test_importing_the_recorder_does_not_import_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
