"""Placements that take turns on two processes: the same function under each, and a sample for all.

No time is asserted.
"""

import numpy as np
import pytest
import torch

from kernels_ref.decoder import Decoder
from kernels_ref.decoder_experts import ResidentExperts
from kernels_ref.decoder_weights import Weights, expert_slots
from kernels_ref.parallel_steps import MovableExperts, PlacedSteps, _run_rank, time_parallel_steps
from kernels_ref.processes import run_processes
from traces.model_spec import ModelSpec

RANKS, EXPERTS, TOP_K, LAYERS, COUNTS = 2, 6, 3, 2, (3, 2)
MAPS = np.array([
    [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
    [[5, 0, 3, 1, 2, 4], [2, 4, 0, 5, 3, 1]],
])  # fmt: skip
MODEL = {
    "name": "tiny",
    "family": "test",
    "num_layers": LAYERS,
    "hidden_size": 12,
    "vocab_size": 23,
    "tie_embeddings": True,
    "moe_layer_ids": (0, 1),
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "expert_width": 5,
    "attention": {
        "kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "v_head_dim": 4,
    },
    "weight_dtype": "fp32",
    "expert_dtype": "fp32",
    "activation_dtype": "fp32",
    "kv_dtype": "fp32",
    "comm_size": 12,
}  # fmt: skip
LENGTHS = [[4, 2, 7], [1, 3]]


def chosen():
    """Logical experts of every rank's tokens, ``[L, T, K]`` each."""
    rng = np.random.default_rng(3)
    return [
        np.stack([[rng.permutation(EXPERTS)[:TOP_K] for _ in range(n)] for _ in range(LAYERS)])
        for n in COUNTS
    ]


def slots(slot_map):
    """One step as slots of a placement without replicas."""
    place = np.argsort(slot_map, axis=1)  # slot of each expert
    return tuple(
        np.stack([place[layer][ids_LTK[layer]] for layer in range(LAYERS)]) for ids_LTK in chosen()
    )


def decoder(experts, lengths):
    model = ModelSpec.model_validate(MODEL)
    runs = Decoder(
        model, Weights.random(model, dtype=torch.float32), experts,
        requests=len(lengths), context=9,
    )  # fmt: skip
    runs.warm_cache(lengths, seed=1)
    return runs


def on_a_rank(rank, ranks):
    """Logits of this rank under each placement, moved from one to the next; then timed steps."""
    model = ModelSpec.model_validate(MODEL)
    experts = MovableExperts(model, MAPS[0])
    runs = decoder(experts, LENGTHS[rank])
    logits = []
    for slot_map in MAPS[[0, 1, 0]]:
        experts.place(slot_map)
        logits.append(runs.decode(np.arange(COUNTS[rank]), range(COUNTS[rank]), slots(slot_map)))
        runs.rewind(LENGTHS[rank])
    with pytest.raises(ValueError, match=r"shape \[2, 8\] -- \[2, 6\], as the first one"):
        experts.place(np.zeros((2, 8), dtype=np.int64))
    placed = [PlacedSteps(slot_map_LS=m, steps=(slots(m),) * (2 + at)) for at, m in enumerate(MAPS)]
    return logits, _run_rank(rank, ranks, model, placed, LENGTHS, 5, 0)


@pytest.fixture(scope="module")
def answers():
    return run_processes(RANKS, on_a_rank, crowded=True)


def test_every_placement_computes_what_one_process_does(answers):
    model = ModelSpec.model_validate(MODEL)
    everyone = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    for rank in range(RANKS):
        experts = ResidentExperts(
            model, everyone, expert_slots(model, everyone, dtype=torch.float32)
        )
        wanted = decoder(experts, LENGTHS[rank]).decode(
            np.arange(COUNTS[rank]), range(COUNTS[rank]), chosen()[rank]
        )
        for found in answers[rank][0]:
            gap = torch.linalg.vector_norm(found - wanted)
            assert gap <= 1e-5 * torch.linalg.vector_norm(wanted)


def test_every_step_has_its_begin_and_end_in_every_round(answers):
    for _, marks in answers:
        assert [each.shape for each in marks] == [(6, 2, 2), (6, 3, 2)]
        assert all((each[..., 1] > each[..., 0]).all() for each in marks)


def test_a_step_lasts_from_the_last_begin_to_the_last_end(monkeypatch):
    def fake(n, function, *task, **options):
        assert (n, function, task[3:]) == (2, _run_rank, (5, 7))
        late = np.zeros((6, 1, 2), dtype=np.int64)
        late[..., 0], late[..., 1] = 300, 800
        return [[late], [late + np.array([-200, 200])]]

    monkeypatch.setattr("kernels_ref.parallel_steps.run_processes", fake)
    placed = [PlacedSteps(slot_map_LS=MAPS[0], steps=(slots(MAPS[0]),))]
    model = ModelSpec.model_validate(MODEL)
    (found,) = time_parallel_steps(model, placed, LENGTHS, rounds=5, seed=7)
    assert found == pytest.approx(np.full((5, 1), 700e-9))


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds is 4 -- allowed is 5 or more"):
        time_parallel_steps(ModelSpec.model_validate(MODEL), [], LENGTHS, rounds=4)
