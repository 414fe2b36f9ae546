"""Fetches really move an expert into a slot, sizes and tiers are what they say; no times."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_ref import tier_sweep
from kernels_ref.expert_cache import ExpertCache, recorded_policy
from kernels_ref.tier_sweep import sweep_fetches, sweep_near_uses, time_lookup
from traces.caches import replay
from traces.caches_scores import score_keys
from traces.model_spec import ModelSpec


def geometry(layers, experts, top_k=1):
    attention = {"kind": "gqa", "num_heads": 1, "num_kv_heads": 1, "head_dim": 4, "v_head_dim": 4}
    return ModelSpec.model_validate(
        {
            "name": "tiny",
            "family": "test",
            "num_layers": layers,
            "hidden_size": 4,
            "vocab_size": 8,
            "tie_embeddings": True,
            "moe_layer_ids": tuple(range(layers)),
            "num_experts": experts,
            "top_k": top_k,
            "expert_width": 2,
            "attention": attention,
            "weight_dtype": "fp32",
            "expert_dtype": "fp32",
            "activation_dtype": "fp32",
            "kv_dtype": "fp32",
            "comm_size": 4,
        }
    )


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tier_sweep, "last_level_cache", lambda: 0)
    monkeypatch.setattr(tier_sweep, "_LEAST_POOL", 2**18)
    monkeypatch.setattr(tier_sweep, "_FILE", 2**16)


def test_every_size_is_fetched_from_both_tiers(tmp_path, small):
    fetches = sweep_fetches(tmp_path, [4096, 20_000, 65_536], rounds=5)
    assert [f.bytes for f in fetches] == [4096, 4096, 20_000, 20_000, 65_536, 65_536]
    assert [f.tier for f in fetches[::2]] == ["pages"] * 3
    files = {f.tier for f in fetches[1::2]}
    assert len(files) == 1
    assert files < {"disk", "page cache"}
    assert all(f.timing.repeats == 5 and (f.timing.samples > 0).all() for f in fetches)
    assert not list(tmp_path.iterdir())  # the files are gone


def test_a_fetch_brings_records_into_many_slots():
    home_RN = torch.arange(6.0)[:, None].expand(6, 3).contiguous()
    slots_PN = torch.full((5, 3), -1.0)
    asked = []

    def read(record):
        asked.append(record)
        return home_RN[record]

    call = tier_sweep._fetch(read, 6, slots_PN, np.random.default_rng(0))
    for _ in range(100):
        call()
        assert (slots_PN == float(asked[-1])).all(dim=1).any()
    assert set(asked) == set(range(6))
    assert (slots_PN >= 0).all()


def test_experts_are_timed_with_and_without_their_use(small):
    uses = sweep_near_uses([(8, 12), (16, 4)], rounds=5)
    assert [(u.hidden, u.width) for u in uses] == [(8, 12), (16, 4)]
    assert all(np.isfinite(u.seconds) and u.floor >= 0 for u in uses)


def test_the_expert_that_is_used_is_the_one_that_was_copied():
    home_RN, slots_PN = torch.randn(4, 3 * 8 * 5), torch.zeros(3, 3 * 8 * 5)
    call = tier_sweep._copy_and_use(home_RN, slots_PN, 8, 5, np.random.default_rng(0), used=True)
    each = []
    for record_N in home_RN.double():
        w1_FD, w3_FD = record_N[:80].view(2, 5, 8)
        up_F = w1_FD.sum(dim=1)
        each.append(record_N[80:].view(8, 5) @ (up_F * torch.sigmoid(up_F) * w3_FD.sum(dim=1)))
    for _ in range(10):
        found_D = call()[0].double()
        assert min((found_D - y_D).norm() / y_D.norm() for y_D in each) < 1e-5


@pytest.mark.parametrize("size", [0, -4, 4098])
def test_a_size_that_is_no_number_of_floats_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"fetch of {size} bytes -- a positive multiple of 4"):
        sweep_fetches(tmp_path, [4096, size])


@pytest.mark.parametrize(("slots", "batch"), [(1, 1), (4, 3), (9, 2)])
def test_the_lookup_of_every_layer_is_timed(slots, batch):
    timing = time_lookup(geometry(3, 8, 2), slots=slots, batch=batch, steps=6)
    assert timing.repeats == 6
    assert timing.calls == 3
    assert (timing.samples > 0).all()


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**20),
    slots=st.integers(1, 6),
    score=st.sampled_from(["lru", "lfu"]),
)
def test_a_cache_that_experts_only_pass_by_ends_as_the_replay(seed, slots, score):
    active = np.random.default_rng(seed).random((7, 2, 5)) < 0.5
    policy = recorded_policy(score_keys(score, active), 2)
    came = []

    def load(layer, expert, slot_N):
        came.append((layer, expert))

    cache = ExpertCache(geometry(2, 5), slots=slots, policy=policy, load=load, dtype=torch.float32)
    for step in active:
        for layer, row in enumerate(step):
            cache.pass_by(layer, np.flatnonzero(row).tolist())
    expected = replay(active, slots=slots, score=score)
    assert [cache.residents(layer) for layer in range(2)] == [
        np.flatnonzero(row).tolist() for row in expected.final
    ]
    assert came == [
        (layer, expert)
        for step in expected.fetched
        for layer, row in enumerate(step)
        for expert in np.flatnonzero(row).tolist()
    ]
