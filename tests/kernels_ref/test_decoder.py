"""The decoder against a plain float64 forward pass in numpy, written token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.ops import Stage
from kernels_ref.decoder import Decoder
from kernels_ref.decoder_experts import ResidentExperts
from kernels_ref.decoder_weights import Weights, expert_record, expert_slots
from kernels_ref.stage_clock import StageClock
from traces.model_spec import ModelSpec

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def geometry(**changes):
    attention = {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "v_head_dim": 6}
    attention |= changes.pop("attention", {})
    fields = {
        "name": "tiny",
        "family": "test",
        "num_layers": 3,
        "hidden_size": 20,
        "vocab_size": 31,
        "tie_embeddings": False,
        "moe_layer_ids": (1, 2),
        "num_experts": 5,
        "top_k": 2,
        "expert_width": 7,
        "shared_expert_width": 4,
        "dense_width": 9,
        "attention": attention,
        "weight_dtype": "fp32",
        "expert_dtype": "fp32",
        "activation_dtype": "fp32",
        "kv_dtype": "fp32",
        "comm_size": 20,
    }
    return ModelSpec.model_validate(fields | changes)


def decoder(model, dtype=torch.float64, slot_map=None, *, requests=4, context=24, **options):
    if slot_map is None:
        slot_map = np.tile(np.arange(model.num_experts), (model.num_moe_layers, 1))
    weights = Weights.random(model, dtype=dtype, seed=3)
    experts = ResidentExperts(model, slot_map, expert_slots(model, slot_map, dtype=dtype, seed=3))
    return Decoder(model, weights, experts, requests=requests, context=context, **options)


def wide(tensor):
    return tensor.double().numpy()


def norm(x, gains):
    return x / np.sqrt((x * x).mean() + 1e-6) * gains


def gated(x, w13, w2):
    gate, up = np.split(w13 @ x, 2)
    return w2 @ (gate / (1 + np.exp(-gate)) * up)


def turned(head, position):
    half = len(head) // 2
    angle = position * 10_000.0 ** (-np.arange(half) / half)
    low, high = head[:half], head[half:]
    c, s = np.cos(angle), np.sin(angle)
    return np.concatenate([low * c - high * s, high * c + low * s])


def attended(model, layer, window, xs):
    """Output of attention for every position of one request."""
    a, out, keys, values = model.attention, [], [], []
    for position, x in enumerate(xs):
        heads = (wide(layer.qkv_QD) @ x).reshape(-1, a.head_dim)
        q, k, v = np.split(heads, [a.num_heads, a.num_heads + a.num_kv_heads])
        keys.append([turned(head, position) for head in k])
        values.append(v)
        first = max(0, position + 1 - window) if window else 0
        mixed = []
        for h in range(a.num_heads):
            g = h // (a.num_heads // a.num_kv_heads)
            query = turned(q[h], position)
            scores = [keys[p][g] @ query / a.head_dim**0.5 for p in range(first, position + 1)]
            shares = np.exp(np.array(scores) - max(scores))
            shares /= shares.sum()
            mixed.append(sum(s * values[first + i][g] for i, s in enumerate(shares)))
        out.append(wide(layer.o_DO) @ np.concatenate(mixed))
    return out


def mixture(model, seed_dtype, moe_layer, layer, x, forced, renormalise):
    logits = wide(layer.router_ED) @ x
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    chosen = np.argsort(-probs)[: model.top_k] if forced is None else forced
    weights = probs[chosen] / (probs[chosen].sum() if renormalise else 1)
    total = np.zeros_like(x)
    for expert, weight in zip(chosen, weights, strict=True):
        record = wide(expert_record(model, moe_layer, int(expert), seed_dtype, 3))
        up = 2 * model.expert_width * model.hidden_size
        w13 = record[:up].reshape(-1, model.hidden_size)
        total += weight * gated(x, w13, record[up:].reshape(model.hidden_size, -1))
    return total + (gated(x, wide(layer.ffn.w13_GD), wide(layer.ffn.w2_DF)) if layer.ffn else 0)


def oracle(model, tokens, forced=None, *, dtype=torch.float64, renormalise=True):
    """Logits after every position of one request; forced experts [MoE layers, tokens, K]."""
    weights = Weights.random(model, dtype=dtype, seed=3)
    stream = [wide(weights.embedding_VD)[token] for token in tokens]
    for at, layer in enumerate(weights.layers):
        normed = [norm(x, wide(layer.attention_norm_D)) for x in stream]
        mixed = attended(model, layer, model.attention.windows[at], normed)
        stream = [x + y for x, y in zip(stream, mixed, strict=True)]
        for position, x in enumerate(stream):
            y = norm(x, wide(layer.ffn_norm_D))
            if at in model.moe_layer_ids:
                moe = model.moe_layer_ids.index(at)
                ids = None if forced is None else forced[moe, position]
                stream[position] = x + mixture(model, dtype, moe, layer, y, ids, renormalise)
            else:
                stream[position] = x + gated(y, wide(layer.ffn.w13_GD), wide(layer.ffn.w2_DF))
    return np.array([wide(weights.head_VD) @ norm(x, wide(weights.final_norm_D)) for x in stream])


def distance(found, expected):
    expected = np.asarray(expected)
    return np.linalg.norm(wide(found) - expected) / np.linalg.norm(expected)


def prompts(model, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(model.vocab_size, size=n) for n in lengths]


def choices(model, tokens, experts=None, seed=0):
    """Distinct slots of each token in each layer."""
    rng, many = np.random.default_rng(seed), experts or model.num_experts
    order = rng.random((model.num_moe_layers, tokens, many)).argsort(axis=2)
    return order[:, :, : model.top_k]


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "shared_expert_width": 0},
        {"attention": {"windows": (3, None, 2)}},
        {"moe_layer_ids": (0, 1, 2), "dense_width": 0},
    ],
    ids=["shared", "tied", "windows", "no dense"],
)
def test_own_routing_equals_a_plain_forward_pass(changes, renormalise):
    model = geometry(**changes)
    runs = decoder(model, renormalise=renormalise)
    tokens = prompts(model, [6, 3])
    found = runs.prefill(tokens, [2, 0])
    expected = [oracle(model, each, renormalise=renormalise)[-1] for each in tokens]
    assert distance(found, expected) < 1e-11
    assert runs.lengths == (3, 0, 6, 0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(deadline=None, max_examples=30)
@given(
    heads=st.sampled_from([(2, 1), (4, 4), (6, 2)]),
    head_dim=st.sampled_from([2, 8]),
    experts=st.integers(2, 6),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
)
def test_forced_routing_equals_a_plain_forward_pass(dtype, heads, head_dim, experts, lengths, seed):
    sizes = {"num_heads": heads[0], "num_kv_heads": heads[1]}
    sizes |= {"head_dim": head_dim, "v_head_dim": head_dim}
    model = geometry(attention=sizes, num_experts=experts)
    tokens = prompts(model, lengths, seed)
    forced = choices(model, sum(lengths), seed=seed)
    found = decoder(model, dtype).prefill(tokens, range(len(lengths)), forced)
    ends = np.cumsum(lengths)
    expected = [
        oracle(model, each, forced[:, end - len(each) : end], dtype=dtype)[-1]
        for each, end in zip(tokens, ends, strict=True)
    ]
    assert distance(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("windows", [(None, None, None), (4, None, 3)])
def test_decode_and_chunks_equal_a_whole_prefill(dtype, windows):
    model = geometry(attention={"windows": windows})
    long = prompts(model, [9, 7, 12])
    forced = choices(model, 28)
    rows = np.split(np.arange(28), [9, 16])
    whole = decoder(model, dtype).prefill(long, [0, 1, 2], forced)

    runs = decoder(model, dtype)
    first = np.concatenate([row[: len(row) - 4] for row in rows])
    runs.prefill([tokens[:-4] for tokens in long], [3, 0, 1], forced[:, first])
    second = np.concatenate([row[-4:-2] for row in rows])
    runs.prefill([tokens[-4:-2] for tokens in long], [3, 0, 1], forced[:, second])
    for back in (2, 1):
        # another order of the requests than they have in the cache
        turn = [1, 2, 0]
        tokens = np.array([long[i][-back] for i in turn])
        chosen = forced[:, [rows[i][-back] for i in turn]]
        logits = runs.decode(tokens, [[3, 0, 1][i] for i in turn], chosen)
    assert distance(logits, wide(whole)[[1, 2, 0]]) < TOLERANCE[dtype]
    assert runs.lengths == (7, 12, 0, 9)


def test_any_slot_map_computes_the_same():
    model, tokens = geometry(), prompts(geometry(), [5, 4])
    slot_map = np.array([[3, 0, 4, 1, 2, 3, 0], [4, 4, 2, 0, 1, 3, 1]])
    slots = choices(model, 9, experts=7)
    # a token's two choices may be replicas of one expert: the oracle counts them as two
    experts = np.take_along_axis(slot_map[:, None], slots, axis=2)
    found = decoder(model, slot_map=slot_map).prefill(tokens, [0, 1], slots)
    expected = [
        oracle(model, tokens[0], experts[:, :5])[-1],
        oracle(model, tokens[1], experts[:, 5:])[-1],
    ]
    assert distance(found, expected) < 1e-11


def test_own_routing_finds_the_slots_of_a_map():
    model, tokens = geometry(), prompts(geometry(), [6])
    slot_map = np.array([[3, 0, 4, 1, 2, 3], [4, 4, 2, 0, 1, 3]])
    found = decoder(model, slot_map=slot_map).prefill(tokens, [0])
    assert distance(found, oracle(model, tokens[0])[-1:]) < 1e-11


def test_activations_stay_finite_in_many_layers():
    many = geometry(num_layers=40, moe_layer_ids=tuple(range(40)), attention={"windows": ()})
    runs = decoder(many, torch.bfloat16)
    runs.warm_cache([20, 3, 7, 1])
    logits = runs.decode(np.array([1, 2, 3, 4]), range(4))
    assert torch.isfinite(logits).all()
    assert logits.abs().max() < 100


def test_warm_cache_and_rewind_set_the_context():
    model = geometry()
    runs = decoder(model, torch.float32)
    runs.warm_cache([5, 20], seed=1)
    assert runs.lengths == (5, 20, 0, 0)
    forced = choices(model, 2)
    first = runs.decode(np.array([1, 2]), [0, 1], forced)
    assert runs.lengths == (6, 21, 0, 0)
    runs.rewind([5, 20])
    assert torch.equal(runs.decode(np.array([1, 2]), [0, 1], forced), first)
    runs.warm_cache([5, 20], seed=2)
    assert not torch.equal(runs.decode(np.array([1, 2]), [0, 1], forced), first)
    with pytest.raises(ValueError, match="at most these"):
        runs.rewind([7])


def test_kernels_and_stages_fill_the_step():
    runs = decoder(geometry(), laps=True)
    runs.warm_cache([3])
    runs.decode(np.array([1]), [0])
    seconds = runs.clock.seconds()
    assert {"qkv", "attention", "router", "experts", "ffn up"} <= seconds.kernel_s.keys()
    assert {Stage.DENSE_FFN, Stage.SHARED_EXPERTS, Stage.HEAD} <= seconds.stage_s.keys()
    for parts in (seconds.kernel_s, seconds.stage_s):
        assert 0 < sum(parts.values()) <= seconds.total_s


def test_a_clock_without_laps_takes_the_total():
    runs = decoder(geometry())
    with pytest.raises(ValueError, match="no step"):
        runs.clock.seconds()
    runs.prefill(prompts(geometry(), [4]), [0])
    seconds = runs.clock.seconds()
    assert seconds.total_s > 0
    assert seconds.kernel_s == {}


def test_laps_add_up(monkeypatch):
    ticks = iter([0, 5, 12, 20, 21])
    monkeypatch.setattr("kernels_ref.stage_clock.perf_counter_ns", lambda: next(ticks))
    clock = StageClock()
    clock.start()
    clock.lap(Stage.ATTENTION, "qkv")
    clock.lap(Stage.ATTENTION, "o")
    clock.lap(Stage.ATTENTION, "qkv")
    clock.stop()
    seconds = clock.seconds()
    assert seconds.kernel_s == pytest.approx({"qkv": 13e-9, "o": 7e-9})
    assert seconds.stage_s == pytest.approx({Stage.ATTENTION: 20e-9})
    assert seconds.total_s == pytest.approx(21e-9)


def test_a_step_keeps_no_memory():
    runs = decoder(geometry(), laps=True)
    runs.warm_cache([3, 3])
    for _ in range(3):
        runs.decode(np.array([1, 2]), [0, 1])
    before = len(runs.clock._names), len(runs.clock._times)
    runs.decode(np.array([1, 2]), [0, 1])
    assert (len(runs.clock._names), len(runs.clock._times)) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.decode(np.array([31]), [0]), "tokens from 31 to 31 -- 0 to 30"),
        (lambda r: r.decode(np.array([1]), [4]), r"requests \[4\] -- distinct, from 0 to 3"),
        (lambda r: r.decode(np.array([1, 1]), [0, 0]), "distinct"),
        (lambda r: r.decode(np.array([1, 1]), [0]), "tokens of 2 requests, 1 rows"),
        (lambda r: r.prefill([np.zeros(25, int)], [0]), "has 0 tokens and gets 25"),
        (lambda r: r.prefill([np.zeros(0, int)], [0]), "gets 0 -- at least 1"),
        (lambda r: r.decode(np.array([1]), [0], np.zeros((2, 1, 3), int)), r"\[2, 1, 2\]"),
        (lambda r: r.decode(np.array([1]), [0], np.full((2, 1, 2), 5)), "slot ids from 5 to 5"),
        (lambda r: r.warm_cache([25]), "at most 4 of 0 to 24"),
    ],
)
def test_bad_steps_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(decoder(geometry()))


def test_a_router_needs_every_expert():
    model, partial = geometry(), np.array([[0, 1], [1, 2]])
    runs = decoder(model, slot_map=partial)
    with pytest.raises(ValueError, match="expert 0 of some MoE layer has no slot"):
        runs.decode(np.array([1]), [0])
    runs.decode(np.array([1]), [0], np.array([[[0, 1]], [[1, 0]]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gated": False, "expert_bias": True}, "plain .* networks, expert biases"),
        ({"attention": {"sinks": True, "bias": "qkv"}}, "attention bias qkv, attention sinks"),
        ({"attention": {"head_dim": 5, "v_head_dim": 5}}, "odd head of 5"),
        ({"comm_size": 10}, "comm_size 10 beside hidden_size 20"),
    ],
)
def test_geometries_that_do_not_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Weights.random(geometry(**changes), dtype=torch.float32)


@pytest.mark.parametrize(
    ("slot_map", "message"),
    [
        (np.zeros((3, 4), int), r"slot map of shape \[3, 4\] -- \[2 MoE layers, slots\]"),
        (np.full((2, 4), 5), "experts 5 to 5"),
    ],
)
def test_slot_maps_that_do_not_fit_are_refused(slot_map, message):
    with pytest.raises(ValueError, match=message):
        expert_slots(geometry(), slot_map, dtype=torch.float32)


def test_weights_are_random_and_repeat():
    model = geometry()
    one, same = (expert_record(model, 0, 1, torch.float32, seed=5) for _ in range(2))
    assert torch.equal(one, same)
    for layer, expert, seed in ((0, 2, 5), (1, 1, 5), (0, 1, 6)):
        assert not torch.equal(one, expert_record(model, layer, expert, torch.float32, seed))
    big = geometry(hidden_size=200, comm_size=200, expert_width=100)
    record = expert_record(big, 0, 0, torch.float32)
    up = 2 * 200 * 100
    assert record[:up].std().item() == pytest.approx(200**-0.5, rel=0.02)
    assert record[up:].std().item() == pytest.approx(100**-0.5, rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    model = geometry()
    slot_map = np.tile(np.arange(5), (2, 1))
    forced = choices(model, 6)
    logits = []
    for device in ("cpu", "cuda"):
        options = {"dtype": torch.float32, "seed": 3, "device": device}
        experts = ResidentExperts(model, slot_map, expert_slots(model, slot_map, **options))
        weights = Weights.random(model, **options)
        runs = Decoder(model, weights, experts, requests=2, context=9, laps=True)
        runs.prefill(prompts(model, [4, 2]), [0, 1], forced)
        logits.append(runs.decode(np.array([1, 2]), [0, 1], forced[:, :2]).cpu())
        seconds = runs.clock.seconds()
        assert 0 < sum(seconds.kernel_s.values()) <= seconds.total_s * (1 + 1e-3)
    assert distance(logits[1], wide(logits[0])) < 1e-4
