"""Expert parallel over two processes against one process with the same tokens.

And the order of kernels against what the simulator lowers, for one rank and for two.
"""

import numpy as np
import pytest
import torch

from hwmodels.ops import Stage
from kernels_ref.decoder import Decoder
from kernels_ref.decoder_experts import ParallelExperts, ResidentExperts
from kernels_ref.decoder_weights import Weights, expert_slots
from kernels_ref.processes import run_processes
from kernels_ref.stage_clock import StageClock
from simulator.loads import StepLoads
from simulator.lowering import lower
from traces.model_spec import ModelSpec

RANKS, EXPERTS, TOP_K, LAYERS = 2, 6, 3, 2
SLOTS = np.array([[3, 1, 0, 5, 4, 2, 3, 1], [0, 1, 2, 3, 4, 5, 0, 1]])
"""Slots of both ranks, some experts twice."""
MODEL = {
    "name": "tiny",
    "family": "test",
    "num_layers": 3,
    "hidden_size": 14,
    "vocab_size": 23,
    "tie_embeddings": True,
    "moe_layer_ids": (0, 2),
    "num_experts": EXPERTS,
    "top_k": TOP_K,
    "expert_width": 5,
    "shared_expert_width": 3,
    "dense_width": 8,
    "attention": {
        "kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "v_head_dim": 4,
    },
    "weight_dtype": "fp32",
    "expert_dtype": "fp32",
    "activation_dtype": "fp32",
    "kv_dtype": "fp32",
    "comm_size": 14,
}  # fmt: skip
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Recorder(StageClock):
    """A clock that remembers the order of the kernels."""

    def __init__(self):
        super().__init__()
        self.order = []

    def start(self):
        self.order = []
        super().start()

    def lap(self, stage, kernel):
        self.order.append((stage, kernel))
        super().lap(stage, kernel)


def built(experts_of, dtype, slot_map):
    """A decoder whose routed experts hold the given slots."""
    model = ModelSpec.model_validate(MODEL)
    weights = Weights.random(model, dtype=dtype, seed=5)
    slots = expert_slots(model, slot_map, dtype=dtype, seed=5)
    experts = experts_of(model, SLOTS, slots)
    runs = Decoder(model, weights, experts, requests=4, context=10)
    runs.clock = Recorder()
    return runs


def steps(seed, home, forced):
    """Prefill of four prompts and two decode steps: for each, every rank's tokens and slots."""
    rng = np.random.default_rng(seed)
    lengths = [3, 1, 4, 2]
    prompts = [rng.integers(23, size=n + 2) for n in lengths]
    made = []
    for step in range(3):
        part = [slice(0, n) if step == 0 else slice(n + step - 1, n + step) for n in lengths]
        tokens = [prompt[span] for prompt, span in zip(prompts, part, strict=True)]
        ids = [distinct(rng, len(each)) if forced else None for each in tokens]
        made.append([
            [(at, tokens[at], ids[at]) for at in range(4) if home[at] == rank]
            for rank in range(RANKS)
        ])  # fmt: skip
    return made


def distinct(rng, tokens):
    """Slots of distinct experts, ``[L, T, K]``; of an expert's two slots either."""
    ids = np.zeros((LAYERS, tokens, TOP_K), dtype=np.int64)
    for layer in range(LAYERS):
        for token in range(tokens):
            for k, expert in enumerate(rng.permutation(EXPERTS)[:TOP_K]):
                ids[layer, token, k] = rng.choice(np.nonzero(SLOTS[layer] == expert)[0])
    return ids


def merged(ids):
    """Slots of a rank's tokens in one array; None where the router chooses."""
    if any(i is None for i in ids):
        return None
    return np.concatenate([np.zeros((LAYERS, 0, TOP_K), np.int64), *ids], axis=1)


def play(runs, made, rank, ahead):
    """Logits of this rank's requests in every step."""
    logits = []
    for step, ranks in enumerate(made):
        tokens = [tokens for _, tokens, _ in ranks[rank]]
        rows = range(len(tokens))
        slots = [merged([i for _, _, i in each]) for each in ranks]
        if any(i is None for each in ranks for _, _, i in each):
            given = None
        else:
            given = slots if ahead else slots[rank]
        if step == 0:
            found = runs.prefill(tokens, rows, given)
        else:
            found = runs.decode(np.concatenate([np.zeros(0, int), *tokens]), rows, given)
        logits.append(found)
    return logits


CASES = [
    (torch.float64, (0, 1, 1, 0), True, False),
    (torch.float64, (0, 1, 1, 0), True, True),
    (torch.float32, (0, 0, 0, 1), True, True),
    (torch.bfloat16, (1, 0, 1, 1), True, False),
    (torch.float64, (1, 1, 1, 1), True, True),
    (torch.float64, (0, 1, 0, 0), False, False),
]
"""Dtype, rank of each request, forced slots, all ranks' slots known ahead."""


def parallel(rank, ranks, cases):
    local = SLOTS.shape[1] // ranks
    mine = SLOTS[:, rank * local : (rank + 1) * local]
    results = []
    for seed, (dtype, home, forced, ahead) in enumerate(cases):
        runs = built(ParallelExperts, dtype, mine)
        logits = play(runs, steps(seed, home, forced), rank, ahead)
        results.append((logits, runs.clock.order, runs.clock.seconds()))
    with pytest.raises(ValueError, match="8 slots in the map, 8 on this rank of 2"):
        built(ParallelExperts, torch.float32, SLOTS)
    return results


@pytest.fixture(scope="module")
def answers():
    return run_processes(RANKS, parallel, CASES, crowded=True)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_ranks_compute_what_one_does(answers, case):
    dtype, home, forced, _ = CASES[case]
    alone = built(ResidentExperts, dtype, SLOTS)
    expected = play(alone, steps(case, (0, 0, 0, 0), forced), 0, False)
    for step, whole in enumerate(expected):
        for rank in range(RANKS):
            found = answers[rank][case][0][step].double()
            wanted = whole[[at for at in range(4) if home[at] == rank]].double()
            assert found.shape == wanted.shape
            gap = torch.linalg.vector_norm(found - wanted)
            assert gap <= TOLERANCE[dtype] * torch.linalg.vector_norm(wanted)


def test_ranks_take_their_time(answers):
    for rank in range(RANKS):
        _, _, seconds = answers[rank][0]
        assert seconds.stage_s[Stage.DISPATCH] > 0
        assert seconds.stage_s[Stage.COMBINE] > 0


def lowered(ranks):
    """Stages and names of the simulator's works in a decode step, in order of execution."""
    model = ModelSpec.model_validate(MODEL)
    ones = np.ones((1, ranks), dtype=np.int64)
    loads = StepLoads(
        decode=True,
        tokens=ones,
        sequences=ones,
        context=np.ones((1, model.num_layers, ranks), dtype=np.int64),
        per_slot=np.ones((1, LAYERS, 8), dtype=np.int64),
        sent=np.ones((1, LAYERS, ranks, ranks)),
        cross_node=np.zeros((1, LAYERS), dtype=np.int64),
        cross_rank=np.ones((1, LAYERS), dtype=np.int64),
    )
    works = lower(model, loads)
    layers = range(-1, model.num_layers + 1)
    return [(w.stage, w.name) for layer in layers for w in works if layer in w.layers]


def test_one_rank_runs_the_kernels_of_the_lowering():
    runs = built(ResidentExperts, torch.float32, SLOTS)
    runs.warm_cache([4])
    runs.decode(np.array([1]), [0])
    assert runs.clock.order == lowered(1)


def test_two_ranks_run_the_kernels_of_the_lowering(answers):
    for rank in range(RANKS):
        for _, order, _ in answers[rank]:
            assert order == lowered(RANKS)
