"""Collectives of two and three processes against sums and loops in float64.

The cases are drawn here, all of them run in one start of processes (it costs seconds), and the
answers are checked here. The two are a group within the three, which tests the group argument.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kernels_ref.collectives import (
    all_gather,
    all_reduce,
    all_to_all_rows,
    combine_ranks,
    dispatch,
    plan_exchange,
    plan_known_exchange,
    reduce_scatter,
)
from kernels_ref.experts import experts_loop, grouped_ffn
from kernels_ref.permute import combine, permute
from kernels_ref.processes import run_processes

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
EXPERTS, D, F, K = 6, 8, 5, 2  # of the model in `real_experts`


def numbers(seed, *shape):
    """Positive, so that nothing cancels and a relative error means something."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 1.5, shape))


def wide(tensors):
    return [tensor.double().numpy() for tensor in tensors]


def near(found, expected, dtype):
    assert found.dtype == dtype
    assert found.shape == expected.shape
    gap = np.linalg.norm(found.double().numpy() - expected)
    assert gap <= TOLERANCE[dtype] * np.linalg.norm(expected)


dtypes = st.sampled_from(list(TOLERANCE))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def exchanges(draw, n):
    """Slots of each rank's tokens: distinct in a token, some choices dropped (-1)."""
    slots_per_rank, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    slots = st.one_of(st.just(-1), st.integers(0, n * slots_per_rank - 1))
    unique = st.lists(
        slots, min_size=top_k, max_size=top_k, unique_by=lambda s: object() if s < 0 else s
    )
    ids = [draw(st.lists(unique, max_size=6)) for _ in range(n)]
    return ids, top_k, slots_per_rank, draw(seeds), draw(dtypes)


def drawn(strategy, count):
    """Cases that hypothesis makes of a strategy, the same in every run."""
    cases = []

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(case):
        cases.append(case)

    collect()
    return cases


def drawn_for(n):
    counts = st.lists(st.integers(0, 4), min_size=n, max_size=n)
    return {
        "ring": drawn(st.tuples(st.integers(0, 5), st.integers(1, 9), seeds, dtypes), 30),
        "rows": drawn(st.lists(counts, min_size=n, max_size=n), 30),
        "exchange": drawn(exchanges(n), 40),
    }


def ring_inputs(case, n):
    """Tensor of each rank, [n * rows, width]."""
    rows, width, seed, dtype = case
    return [numbers([seed, rank], n * rows, width).to(dtype) for rank in range(n)]


def exchange_inputs(case):
    """Hidden states, weights and slots of each rank's tokens."""
    ids, top_k, _, seed, dtype = case
    slots = [torch.tensor(own, dtype=torch.int64).reshape(-1, top_k) for own in ids]
    x = [numbers([seed, rank], len(own), 3).to(dtype) for rank, own in enumerate(ids)]
    weights = [numbers([seed, 9, rank], len(own), top_k).to(dtype) for rank, own in enumerate(ids)]
    return x, weights, slots


# what runs in the processes -----------------------------------------------------------------


def work(rank, n, cases_of):
    pair = dist.new_group([0, 1])
    return {
        2: on_group(rank, 2, cases_of[2], pair) if rank < 2 else None,
        3: on_group(rank, 3, cases_of[3], None),
    }


def on_group(rank, n, cases, group):
    return {
        "ring": [on_ring(rank, n, case, group) for case in cases["ring"]],
        "rows": [on_rows(rank, n, sent, group) for sent in cases["rows"]],
        "exchange": [on_exchange(rank, case, group) for case in cases["exchange"]],
        "experts": real_experts(rank, n, group),
        "refused": refused(n, group),
    }


def on_ring(rank, n, case, group):
    x = ring_inputs(case, n)[rank]
    scattered, gathered = reduce_scatter(x, group), all_gather(x, group)
    reduced = all_reduce(x, group)
    assert reduced is x
    return reduced, gathered, scattered


def on_rows(rank, n, sent, group):
    rows = [(rank, to, i) for to in range(n) for i in range(sent[rank][to])]
    x = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    return all_to_all_rows(x, sent[rank], [sent[source][rank] for source in range(n)], group)


def on_exchange(rank, case, group):
    """The expert of slot s multiplies by s + 1."""
    slots_per_rank = case[2]
    x, weights, slots = exchange_inputs(case)
    plan = plan_exchange(slots[rank], slots_per_rank, group)
    known = plan_known_exchange(slots, rank, slots_per_rank)
    rows, factors = dispatch(x[rank], plan, group), dispatch(weights[rank], known, group)
    own = permute(rows, plan.permutation)
    local = torch.repeat_interleave(torch.arange(slots_per_rank), plan.permutation.counts_E)
    out = own * (rank * slots_per_rank + local + 1).to(own.dtype).unsqueeze(1)
    y = combine_ranks(combine(out, factors, plan.permutation), plan, group)
    return plan, known, own, y


def model_inputs(n):
    """Tokens and experts of a whole model; the tokens are cut over the ranks."""
    tokens = 5 * n
    ids = np.argsort(np.random.default_rng(1).random((tokens, EXPERTS)), axis=1)[:, :K]
    w13 = numbers(2, EXPERTS, 2 * F, D) - 1
    w2 = numbers(3, EXPERTS, D, F) - 1
    return numbers(4, tokens, D) - 1, torch.from_numpy(ids), numbers(5, tokens, K), w13, w2


def real_experts(rank, n, group):
    x, ids, weights, w13, w2 = model_inputs(n)
    mine = slice(5 * rank, 5 * (rank + 1))
    per_rank = EXPERTS // n
    held = slice(per_rank * rank, per_rank * (rank + 1))
    plan = plan_exchange(ids[mine], per_rank, group)
    rows, factors = dispatch(x[mine], plan, group), dispatch(weights[mine], plan, group)
    own = permute(rows, plan.permutation)
    out = grouped_ffn(own, plan.permutation.counts_E.tolist(), w13[held], w2[held])
    return combine_ranks(combine(out, factors, plan.permutation), plan, group)


def refused(n, group):
    """What each bad call says; it is refused before anything is sent."""
    calls = (
        lambda: reduce_scatter(torch.ones(n + 1, 2), group),
        lambda: all_to_all_rows(torch.ones(n + 1, 2), [1] * n, [1] * n, group),
        lambda: all_to_all_rows(torch.ones(n, 2), [n], [n], group),
        lambda: plan_exchange(torch.tensor([[0, 2 * n]]), 2, group),
    )
    messages = []
    for call in calls:
        with pytest.raises(ValueError, match=" -- ") as caught:
            call()
        messages.append(str(caught.value))
    return messages


# what is checked ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    cases_of = {n: drawn_for(n) for n in (2, 3)}
    return cases_of, run_processes(3, work, cases_of, crowded=True)


@pytest.fixture(params=[2, 3])
def ran(request, run):
    """Ranks of a group, its cases, and each rank's answers."""
    n, (cases_of, answers) = request.param, run
    return n, cases_of[n], [answer[n] for answer in answers[:n]]


def test_ring_collectives_equal_float64_sums(ran):
    n, cases, answers = ran
    for i, case in enumerate(cases["ring"]):
        x = wide(ring_inputs(case, n))
        total, rows, dtype = sum(x), case[0], case[3]
        for rank, answer in enumerate(answers):
            reduced, gathered, scattered = answer["ring"][i]
            near(reduced, total, dtype)
            near(scattered, total[rank * rows : (rank + 1) * rows], dtype)
            assert gathered.dtype == dtype
            np.testing.assert_array_equal(gathered.double().numpy(), np.concatenate(x))


def test_rows_arrive_by_rank_in_their_order(ran):
    n, cases, answers = ran
    for i, sent in enumerate(cases["rows"]):
        for rank, answer in enumerate(answers):
            expected = [(s, rank, j) for s in range(n) for j in range(sent[s][rank])]
            assert [tuple(row) for row in answer["rows"][i].tolist()] == expected


def test_exchange_equals_a_loop_over_tokens(ran):
    _, cases, answers = ran
    for i, case in enumerate(cases["exchange"]):
        dtype = case[4]
        x, weights, slots = exchange_inputs(case)
        for rank, (x_, w_, s_) in enumerate(zip(wide(x), wide(weights), slots, strict=True)):
            expected = np.zeros_like(x_)
            for t, chosen in enumerate(s_.tolist()):
                for k, slot in enumerate(chosen):
                    if slot >= 0:
                        expected[t] += w_[t, k] * (slot + 1) * x_[t]
            near(answers[rank]["exchange"][i][3], expected, dtype)


def test_rows_on_a_rank_are_those_of_its_slots_in_turn(ran):
    _, cases, answers = ran
    for i, case in enumerate(cases["exchange"]):
        x, _, slots = exchange_inputs(case)
        for rank, answer in enumerate(answers):
            plan, _, own, _ = answer["exchange"][i]
            expected, counts = [], []
            for slot in range(rank * case[2], (rank + 1) * case[2]):
                visits = [(r, t) for r, s in enumerate(slots) for t in (s == slot).any(1).nonzero()]
                counts.append(len(visits))
                expected += [x[r][t.item()].tolist() for r, t in visits]
            assert plan.permutation.counts_E.tolist() == counts
            assert own.tolist() == expected


def test_a_token_goes_once_to_each_rank_of_its_experts(ran):
    n, cases, answers = ran
    for i, (ids, _, slots_per_rank, *_) in enumerate(cases["exchange"]):
        sent = np.zeros((n, n), dtype=int)
        for source, tokens in enumerate(ids):
            for chosen in tokens:
                for target in {slot // slots_per_rank for slot in chosen if slot >= 0}:
                    sent[source, target] += 1
        for rank, answer in enumerate(answers):
            plan = answer["exchange"][i][0]
            assert plan.send_counts == sent[rank].tolist()
            assert plan.receive_counts == sent[:, rank].tolist()


def test_known_routing_gives_the_same_plan_without_messages(ran):
    _, cases, answers = ran
    for i in range(len(cases["exchange"])):
        for answer in answers:
            plan, known, *_ = answer["exchange"][i]
            assert known.tokens == plan.tokens
            assert known.token_S.tolist() == plan.token_S.tolist()
            assert known.send_counts == plan.send_counts
            assert known.receive_counts == plan.receive_counts
            for mine, theirs in zip(known.permutation, plan.permutation, strict=True):
                assert mine.tolist() == theirs.tolist()


def test_experts_over_ranks_equal_all_experts_in_one_place(ran):
    n, _, answers = ran
    found = torch.cat([answer["experts"] for answer in answers])
    torch.testing.assert_close(found, experts_loop(*model_inputs(n)), rtol=1e-12, atol=1e-12)


def test_bad_calls_are_refused_with_the_number(ran):
    n, _, answers = ran
    for answer in answers:
        shares, rows, counts, slot = answer["refused"]
        assert f"{n + 1} rows over {n} ranks" in shares
        assert f"{n + 1} rows with {n} send counts (sum {n})" in rows
        assert f"1 send counts (sum {n}) and 1 receive counts" in counts
        assert f"slot ids from 0 to {2 * n}" in slot


def test_a_row_for_each_choice_is_each_choice_as_a_token():
    slots = torch.tensor([[0, 1], [3, 2], [1, 2]])
    plan = plan_known_exchange([slots.reshape(-1, 1), torch.empty(0, 1, dtype=torch.int64)], 0, 2)
    assert plan.tokens == 6
    assert plan.send_counts == [3, 3]  # pairs; a row per (token, rank) would be 2 and 2
    assert (plan.token_S // 2).tolist() == [0, 0, 2, 1, 1, 2]


def test_unknown_slots_are_refused():
    with pytest.raises(ValueError, match=r"slot ids from -2 to 1 -- allowed are 0 to 3"):
        plan_known_exchange([torch.tensor([[-2, 1]])] * 2, 0, 2)
