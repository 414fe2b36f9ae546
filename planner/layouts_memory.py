"""Which layouts fit into memory at which batch size, and what would make one fit where none does.

Bytes of the fullest rank by `simulator.memory.memory_of`: tokens and requests spread evenly, all at
the mean context.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from basis.errors import InfeasibleError
from basis.units import format_quantity
from hwmodels.cluster import Cluster
from planner.layouts import Candidate, enumerate_layouts
from planner.layouts_question import Question
from simulator.memory import USABLE, MemoryNeed, memory_of
from traces.model_spec import ModelSpec

_MOST_NODES = 64  # nodes that the levers try


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A layout that was not considered further."""

    name: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The layouts that fit at the smallest batch size, and how far each can go."""

    candidates: tuple[Candidate, ...]
    sizes: tuple[int, ...]
    """Batch sizes that each of them holds: so many of the question's, from the smallest."""
    rejected: tuple[Rejected, ...]


def usable(cluster: Cluster) -> float:
    """Bytes that a rank may fill."""
    return USABLE * cluster.device.memory.capacity.value


def need_of(model: ModelSpec, candidate: Candidate, size: int, mean_context: float) -> MemoryNeed:
    """Bytes of a layout with so many running requests."""
    return memory_of(
        model,
        candidate.parallelism,
        model.num_experts + candidate.redundant_experts,
        tokens=size,
        mean_context=mean_context,
        sequences=size,
    )


def fitting(
    model: ModelSpec, cluster: Cluster, candidates: Sequence[Candidate], question: Question
) -> Fitting:
    """Keep the layouts that fit.

    Raises
    ------
    InfeasibleError
        If none fits at the smallest batch size, with what would make one fit.
    """
    limit = usable(cluster)
    kept, counts, rejected = [], [], []
    for candidate in candidates:

        def too_much(size: int, candidate: Candidate = candidate) -> bool:
            need = need_of(model, candidate, size, question.mean_context)
            return bool(need.total.max() > limit)

        count = bisect_left(question.sizes, True, key=too_much)
        if count:
            kept.append(candidate)
            counts.append(count)
            continue
        least = need_of(model, candidate, question.sizes[0], question.mean_context)
        rejected.append(Rejected(name=candidate.name, why=_terms(least, limit)))
    if not kept:
        raise _nothing_fits(model, cluster, candidates, question)
    return Fitting(candidates=tuple(kept), sizes=tuple(counts), rejected=tuple(rejected))


def by_rank(need: MemoryNeed, cluster: Cluster) -> dict[str, float]:
    """Terms of the fullest rank, bytes, and what it may fill."""
    fullest = int(need.total.argmax())
    names = ("weights", "experts", "kv_cache", "activations", "communication", "total")
    terms = {name: float(getattr(need, name)[fullest]) for name in names}
    return {"rank": float(fullest), **terms, "usable": usable(cluster)}


def _terms(need: MemoryNeed, limit: float) -> str:
    fullest = int(need.total.argmax())
    parts = ", ".join(
        f"{name.replace('_', ' ')} {_gb(getattr(need, name)[fullest])}"
        for name in ("weights", "experts", "kv_cache", "buffers")
    )
    return (
        f"needs {_gb(need.total[fullest])} on its fullest rank, {_gb(limit)} are usable ({parts})"
    )


def _nothing_fits(
    model: ModelSpec, cluster: Cluster, candidates: Sequence[Candidate], question: Question
) -> InfeasibleError:
    """Name the layout that needs least, and each lever by itself."""
    size, limit = question.sizes[0], usable(cluster)
    needs = [need_of(model, c, size, question.mean_context) for c in candidates]
    least = min(range(len(needs)), key=lambda i: float(needs[i].total.max()))
    return InfeasibleError(
        f"{model.name} fits on {cluster.num_ranks} x {cluster.device.name} in none of "
        f"{len(candidates)} layouts: with {size} running requests of {question.mean_context:.0f} "
        f"tokens, {candidates[least].name} {_terms(needs[least], limit)}",
        levers=tuple(_levers(model, cluster, needs[least], question)),
    )


def _levers(
    model: ModelSpec, cluster: Cluster, need: MemoryNeed, question: Question
) -> Iterator[str]:
    limit = usable(cluster)
    ranks = _ranks_that_fit(model, cluster, question)
    if ranks is not None:
        yield f"at least {ranks} GPUs of this kind"
    yield f"a GPU with at least {_gb(float(need.total.max()) / USABLE)} of memory"
    fullest = int(need.total.argmax())
    fixed = float((need.weights + need.experts)[fullest])
    moving = float(need.total[fullest]) - fixed
    if fixed < limit:
        batch = int(question.sizes[0] * (limit - fixed) / moving)
        if batch:
            yield f"at most about {batch} running requests"
        context = question.mean_context * (limit - fixed) / moving
        yield f"contexts of at most about {context:.0f} tokens"
    else:
        share = 1 - (fixed - limit + moving) / float(need.experts[fullest])
        if share > 0:
            yield f"experts in a format of at most {share:.0%} of the bytes of {model.expert_dtype}"
        yield "experts in host memory (plan: offload)"


def _ranks_that_fit(model: ModelSpec, cluster: Cluster, question: Question) -> int | None:
    """Next doubling of the ranks on which some layout fits; None where there is none."""
    ranks = cluster.num_ranks
    while ranks < _MOST_NODES * cluster.node.devices:
        ranks *= 2
        nodes = -(-ranks // cluster.node.devices)
        if nodes > 1 and cluster.network is None:
            return None
        more = cluster.model_copy(update={"nodes": max(nodes, cluster.nodes), "gpus": ranks})
        for candidate in enumerate_layouts(model, more):
            need = need_of(model, candidate, question.sizes[0], question.mean_context)
            if need.total.max() <= usable(cluster):
                return ranks
    return None


def _gb(value: float) -> str:
    return format_quantity(float(value), "B")
