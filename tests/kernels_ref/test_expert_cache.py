"""The running expert cache against the replay, access by access, and offloaded against resident."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from basis import InputError
from hwmodels.ops import Stage
from kernels_ref.decoder import Decoder
from kernels_ref.decoder_experts import CachedExperts, ResidentExperts
from kernels_ref.decoder_weights import Weights, expert_record, expert_records, expert_slots
from kernels_ref.expert_cache import ExpertCache, recorded_policy
from kernels_ref.expert_file import ExpertFile, write_expert_file
from kernels_ref.expert_homes import FileHome, MemoryHome
from traces.caches import replay
from traces.caches_scores import score_keys
from traces.model_spec import ModelSpec

LAYERS, EXPERTS, TOP_K = 3, 6, 2


def geometry(layers=LAYERS, experts=EXPERTS, top_k=TOP_K, **changes):
    fields = {
        "name": "tiny",
        "family": "test",
        "num_layers": layers,
        "hidden_size": 12,
        "vocab_size": 17,
        "tie_embeddings": True,
        "moe_layer_ids": tuple(range(layers)),
        "num_experts": experts,
        "top_k": top_k,
        "expert_width": 5,
        "attention": {
            "kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "v_head_dim": 4,
        },
        "weight_dtype": "fp32",
        "expert_dtype": "fp32",
        "activation_dtype": "fp32",
        "kv_dtype": "fp32",
        "comm_size": 12,
    }  # fmt: skip
    return ModelSpec.model_validate(fields | changes)


def fill(layer, expert, slot_N):
    slot_N.fill_(100 * layer + expert)


def least_recent(layers):
    """LRU written anew: worth is the number of the access."""

    def policy(step, layer, used):
        return used, [float(step * layers + layer)] * len(used)

    return policy


def least_frequent(layers, accesses):
    """LFU likewise, of equal counts the one used longer ago goes."""
    counts = {}

    def policy(step, layer, used):
        for expert in used:
            counts[layer, expert] = counts.get((layer, expert), 0) + 1
        now = (step * layers + layer) / accesses
        return used, [counts[layer, expert] + now for expert in used]

    return policy


def play(model, active, policy, *, slots, scope, beside=False):
    """Run accesses as a decoder does, checking that every expert is whole when it runs."""
    options = {"policy": policy, "load": fill, "dtype": torch.float32}
    with ExpertCache(model, slots=slots, scope=scope, beside=beside, **options) as cache:
        residents = []
        for step in active:
            for layer, row in enumerate(step):
                residents.append(cache.residents(layer))
                access = cache.access(layer, np.nonzero(row)[0].tolist())
                waiting = [lambda: None] * len(access.hits)
                for expert in access.hits:
                    whole(cache, layer, expert)
                cache.release(layer, access.hits)
                if access.misses:
                    waiting = [cache.fetch(layer, access.misses[0])]
                for at, expert in enumerate(access.misses):
                    waiting.pop()()
                    if at + 1 < len(access.misses):
                        waiting.append(cache.fetch(layer, access.misses[at + 1]))
                    whole(cache, layer, expert)
                    cache.release(layer, [expert])
        final = [cache.residents(layer) for layer in range(model.num_moe_layers)]
        return cache.take_log(), residents, final


def whole(cache, layer, expert):
    for matrix in cache.weights(layer, expert):
        assert (matrix == 100 * layer + expert).all()


@st.composite
def accesses(draw):
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    steps = draw(st.integers(1, 12))
    seed, share = draw(st.integers(0, 2**20)), draw(st.floats(0.1, 0.9))
    rng = np.random.default_rng(seed)
    return rng.random((steps, layers, experts)) < share * rng.random(experts)


@settings(deadline=None, max_examples=40)
@given(
    active=accesses(),
    slots=st.integers(1, 7),
    scope=st.sampled_from(["layer", "global"]),
    score=st.sampled_from(["lru", "lfu", "belady"]),
    written_anew=st.booleans(),
    beside=st.booleans(),
)
def test_equals_the_replay_access_by_access(active, slots, scope, score, written_anew, beside):
    steps, layers, experts = active.shape
    model = geometry(layers, experts, 1)
    policy = recorded_policy(score_keys(score, active), layers)
    if written_anew and score == "lru":
        policy = least_recent(layers)
    if written_anew and score == "lfu":
        policy = least_frequent(layers, steps * layers)
    log, residents, final = play(model, active, policy, slots=slots, scope=scope, beside=beside)

    expected = replay(active, slots=slots, score=score, scope=scope)
    cells = [(step, layer) for step in range(steps) for layer in range(layers)]
    assert [(a.step, a.layer) for a in log] == cells
    for (step, layer), access, there in zip(cells, log, residents, strict=True):
        assert there == np.nonzero(expected.resident[step, layer])[0].tolist()
        assert list(access.hits) == np.nonzero(expected.hit[step, layer])[0].tolist()
        assert list(access.misses) == np.nonzero(expected.fetched[step, layer])[0].tolist()
    assert sum(len(access.evicted) for access in log) == expected.evictions
    assert final == [np.nonzero(row)[0].tolist() for row in expected.final]


def test_evicted_names_who_leaves():
    model = geometry(1, 4, 1)
    active = np.zeros((3, 1, 4), bool)
    active[0, 0, [0, 1]] = active[1, 0, [2]] = active[2, 0, [0, 1, 3]] = True
    log, _, _ = play(model, active, least_recent(1), slots=2, scope="layer")
    # 0 goes for 2; then 2 goes and, of three in use for two slots, the one with the smallest id
    assert [access.evicted for access in log] == [(), ((0, 0),), ((0, 2), (0, 0))]
    assert [access.misses for access in log] == [(0, 1), (2,), (0, 3)]


def test_the_log_is_handed_over_once():
    model = geometry(1, 2, 1)
    cache = ExpertCache(model, slots=1, policy=least_recent(1), load=fill, dtype=torch.float32)
    cache.access(0, [1])
    assert len(cache.take_log()) == 1
    assert cache.take_log() == []


def forced(steps, tokens, model, seed=0):
    rng = np.random.default_rng(seed)
    shape = (steps, model.num_moe_layers, tokens, model.num_experts)
    return rng.random(shape).argsort(axis=3)[..., : model.top_k]


def used(ids):
    """``[S, L, E]`` accesses of forced ids ``[S, L, T, K]``."""
    return np.stack([[np.bincount(i.ravel(), minlength=EXPERTS) > 0 for i in s] for s in ids])


def offloaded(model, ids, load, dtype, **options):
    """Run a prefill and then decode steps behind a cache; logits of each step, log and clock."""
    score = options.pop("score", "lru")
    policy = recorded_policy(score_keys(score, used(ids)), model.num_moe_layers)
    with ExpertCache(model, policy=policy, load=load, dtype=dtype, **options) as cache:
        runs = decoder(model, CachedExperts(model, cache), dtype)
        return steps_of(runs, ids), cache.take_log(), runs.clock


def decoder(model, experts, dtype):
    weights = Weights.random(model, dtype=dtype, seed=1)
    return Decoder(model, weights, experts, requests=4, context=12, laps=True)


def resident(model, ids, dtype):
    slot_map = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    slots = expert_slots(model, slot_map, dtype=dtype, seed=1)
    return steps_of(decoder(model, ResidentExperts(model, slot_map, slots), dtype), ids)


def steps_of(runs, ids):
    runs.warm_cache([3, 5, 1, 2])
    return torch.stack([runs.decode(np.array([1, 2, 3, 4]), range(4), each) for each in ids])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("slots", "scope", "score"),
    [(1, "layer", "lru"), (3, "layer", "lfu"), (6, "layer", "lru"), (7, "global", "lfu")],
)
def test_offloaded_equals_resident(slots, scope, score, beside, dtype):
    model = geometry()
    ids = forced(5, 4, model)
    home = MemoryHome(model, dtype=dtype, seed=1)
    options = {"slots": slots, "scope": scope, "score": score, "beside": beside}
    found, log, clock = offloaded(model, ids, home, dtype, **options)
    # rows may be added in another order
    torch.testing.assert_close(found, resident(model, ids, dtype))

    expected = replay(used(ids), slots=slots, score=score, scope=scope)
    misses = [np.nonzero(row)[0].tolist() for step in expected.fetched for row in step]
    assert [list(access.misses) for access in log] == misses
    seconds = clock.seconds()
    assert seconds.stage_s[Stage.FETCH] > 0
    assert {"fetch", "experts", "unpermute"} <= seconds.kernel_s.keys()
    assert ("fetched expert" in seconds.kernel_s) == expected.fetched[-1].any()


def test_experts_from_a_file_equal_resident(tmp_path):
    model, dtype = geometry(), torch.float32
    ids = forced(4, 4, model, seed=2)
    write_expert_file(tmp_path / "experts", expert_records(model, dtype, seed=1))
    with ExpertFile(tmp_path / "experts") as file:
        found, log, _ = offloaded(model, ids, FileHome(model, file), dtype, slots=2, beside=True)
    torch.testing.assert_close(found, resident(model, ids, dtype))
    assert sum(len(access.misses) for access in log) > LAYERS * EXPERTS
    with (
        ExpertFile(tmp_path / "experts") as file,
        pytest.raises(ValueError, match=r"18 records .* has 12 experts"),
    ):
        FileHome(geometry(2), file)


def test_a_step_of_the_routers_own_choice_runs_behind_a_cache():
    model, dtype = geometry(), torch.float64
    home = MemoryHome(model, dtype=dtype, seed=1)
    policy = least_recent(LAYERS)
    cache = ExpertCache(model, slots=2, policy=policy, load=home, dtype=dtype)
    found = steps_of(decoder(model, CachedExperts(model, cache), dtype), [None] * 3)
    torch.testing.assert_close(found, resident(model, [None] * 3, dtype))


def test_memory_home_copies_the_record():
    model = geometry()
    slot_N = torch.empty(model.expert_matrix_params)
    MemoryHome(model, dtype=torch.float32, seed=4)(2, 5, slot_N)
    assert torch.equal(slot_N, expert_record(model, 2, 5, torch.float32, seed=4))


def test_a_failing_copy_is_raised_where_it_is_waited_for():
    def broken(layer, expert, slot_N):
        raise OSError("no such disk")

    model = geometry()
    options = {"policy": least_recent(LAYERS), "load": broken, "dtype": torch.float32}
    with ExpertCache(model, slots=2, beside=True, **options) as cache:
        cache.access(0, [1])
        arrival = cache.fetch(0, 1)
        with pytest.raises(OSError, match="no such disk"):
            arrival()


def test_bad_use_is_refused():
    model = geometry()
    active = used(forced(2, 1, model))
    policy = recorded_policy(score_keys("lru", active), LAYERS)
    options = {"policy": policy, "load": fill, "dtype": torch.float32}
    with pytest.raises(ValueError, match="0 slots -- at least 1"):
        ExpertCache(model, slots=0, **options)
    with pytest.raises(InputError, match="unknown eviction score"):
        score_keys("mru", active)
    cache = ExpertCache(model, slots=2, **options)
    with pytest.raises(ValueError, match="layer 1 -- layer 0 is due"):
        cache.access(1, [0])
    stray = int(np.nonzero(~active[0, 0])[0][0])
    with pytest.raises(ValueError, match=f"MoE layer 0 uses expert {stray}, which"):
        cache.access(0, [stray])
    with pytest.raises(ValueError, match=r"step 2 of a cache .* 2 steps"):
        policy(2, 0, [0])
