"""Which part of the model each rank works on: a parallel layout resolved on its ranks.

Attention and experts factorise the R = G / pp ranks of a pipeline stage independently, as MoE
Parallel Folding does (Liu et al. 2025): dp x tp for attention, edp x ep x etp for experts. Rank
g = stage * R + lane; a lane has tp index lane % tp and dp index lane // tp, and etp index
lane % etp, ep index (lane // etp) % ep, edp index lane // (ep etp).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import slice_width
from basis.errors import InputError
from simulator.parallelism import AttentionLayout, ExpertLayout, Parallelism
from simulator.placement import Placement
from simulator.unpriced import refuse_unpriced
from traces.model_spec import Attention, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A parallel layout on G ranks."""

    dp: int
    """Groups of ranks that work on requests of their own."""
    tp: int
    """Ranks that share the attention, the dense layers and the head of one dp group."""
    pp: int
    """Pipeline stages: contiguous layers."""
    edp: int
    """Blocks of ranks that hold all experts; tokens stay in their block."""
    ep: int
    """Ranks over which a block's slots are divided."""
    etp: int
    """Ranks that share the inner width of one expert."""
    exchange: Literal["all_to_all", "all_gather"]
    """How tokens come to the ranks of their experts."""

    @classmethod
    def of(cls, parallelism: Parallelism, num_ranks: int) -> Self:
        """Resolve a layout on a number of ranks.

        Raises
        ------
        InputError
            If the factors do not multiply to the ranks; all that is wrong is said at once, each
            with the factors that are allowed.
        """
        attention, experts = parallelism.attention, parallelism.experts
        dp, tp, pp = attention.dp, attention.tp, attention.pp
        ep, etp = experts.ep, experts.tp
        wrong = []
        if dp * tp * pp != num_ranks:
            wrong.append(
                f"attention dp {dp} x tp {tp} x pp {pp} = {dp * tp * pp} on {num_ranks} ranks -- "
                f"the product must be {num_ranks}{_instead('dp', num_ranks, tp * pp)}"
            )
        lanes = dp * tp
        if lanes % (ep * etp):
            wrong.append(
                f"experts ep {ep} x tp {etp} = {ep * etp} do not divide the {lanes} ranks of a "
                f"stage -- ep x tp must be one of {_listed(_divisors(lanes))}"
            )
        _refuse(wrong, f"layout on {num_ranks} ranks")
        edp = lanes // (ep * etp)
        return cls(dp=dp, tp=tp, pp=pp, edp=edp, ep=ep, etp=etp, exchange=experts.exchange)

    @classmethod
    def data_parallel(cls, num_ranks: int) -> Self:
        """Attention DP = EP, see `Parallelism.dp_ep`."""
        return cls.of(Parallelism.dp_ep(num_ranks), num_ranks)

    @property
    def parallelism(self) -> Parallelism:
        """The layout as plain data."""
        return Parallelism(
            attention=AttentionLayout(dp=self.dp, tp=self.tp, pp=self.pp),
            experts=ExpertLayout(ep=self.ep, tp=self.etp, exchange=self.exchange),
        )

    @property
    def lanes(self) -> int:
        """R: ranks of one pipeline stage."""
        return self.dp * self.tp

    @property
    def num_ranks(self) -> int:
        """G."""
        return self.lanes * self.pp

    @property
    def block(self) -> int:
        """Ranks that together hold all experts once (besides redundant slots)."""
        return self.ep * self.etp

    @property
    def fused(self) -> bool:
        """Whether a tp group is a block and its ranks all see all of its tokens.

        Then a reduce-scatter before the experts and the gather that follows it are one all-reduce,
        there is no all-to-all, and shared experts are cut over the group like a dense layer: plain
        tensor (or expert) parallelism inside it.
        """
        return self.block == self.tp and (self.ep == 1 or self.exchange == "all_gather")

    @property
    def gathered(self) -> int:
        """Ranks that gather each other's tokens before the experts (1: none do)."""
        return self.block if self.exchange == "all_gather" else self.etp

    @property
    def exchanged(self) -> int:
        """Ranks between which tokens go by all-to-all (1: none do)."""
        return 1 if self.exchange == "all_gather" else self.ep

    @cached_property
    def tp_index(self) -> NDArray[np.int64]:
        """[G]."""
        return self._lane % self.tp

    @cached_property
    def dp_index(self) -> NDArray[np.int64]:
        """[G]."""
        return self._lane // self.tp

    @cached_property
    def etp_index(self) -> NDArray[np.int64]:
        """[G]."""
        return self._lane % self.etp

    @cached_property
    def ep_index(self) -> NDArray[np.int64]:
        """[G]."""
        return self._lane // self.etp % self.ep

    @cached_property
    def edp_index(self) -> NDArray[np.int64]:
        """[G]."""
        return self._lane // self.block

    @cached_property
    def stage(self) -> NDArray[np.int64]:
        """Pipeline stage, [G]."""
        return np.arange(self.num_ranks) // self.lanes

    @property
    def _lane(self) -> NDArray[np.int64]:
        return np.arange(self.num_ranks) % self.lanes

    def stage_layers(self, num_layers: int) -> tuple[tuple[int, ...], ...]:
        """Layers of each stage: contiguous, the first ones take what does not divide."""
        parts = np.array_split(np.arange(num_layers), self.pp)
        return tuple(tuple(part.tolist()) for part in parts)

    def groups(self, size: int) -> NDArray[np.int64]:
        """Lanes in runs of ``size`` (tp, etp or block ranks), [groups, size]."""
        return np.arange(self.lanes).reshape(-1, size)

    @property
    def exchange_groups(self) -> NDArray[np.int64]:
        """Lanes of one block with equal etp index, ordered by ep index, [edp * etp, ep]."""
        lanes = np.arange(self.lanes).reshape(self.edp, self.ep, self.etp)
        return lanes.swapaxes(1, 2).reshape(-1, self.ep)

    def kv_heads(self, model: ModelSpec) -> int:
        """Key/value heads of one rank: at least one, so replicated when tp is larger."""
        return max(1, model.attention.num_kv_heads // self.tp)

    def attention(self, model: ModelSpec) -> Attention:
        """Heads of one rank; an MLA latent is on all of them."""
        a, own = model.attention, {"num_kv_heads": self.kv_heads(model)}
        return a.model_copy(update=own | {"num_heads": a.num_heads // self.tp})

    def slice_width(self, model: ModelSpec) -> int:
        """Inner width of one expert on one rank, padded to whole blocks of the format."""
        return slice_width(model.expert_dtype, model.expert_width, self.etp)

    def vocabulary(self, model: ModelSpec) -> int:
        """Rows of the embedding and of the head on one rank; the last is padded."""
        return -(-model.vocab_size // self.tp)

    def shared_width(self, model: ModelSpec) -> int:
        """Inner width of the shared experts on one rank."""
        return model.shared_expert_width // (self.tp if self.fused else 1)

    def check(self, model: ModelSpec, num_slots: int | None = None) -> None:
        """Check that the layout divides the model.

        Raises
        ------
        InputError
            If the model does something that has no price; else all that does not divide, each with
            the factors that are allowed.
        """
        refuse_unpriced(model)
        a, wrong = model.attention, []

        def need(what: str, size: int, name: str, factor: int) -> None:
            if size % factor:
                allowed = _listed(_divisors(size, 2 * self.num_ranks))
                wrong.append(
                    f"{name} {factor} does not divide {what} ({size}) -- {name} must be one of "
                    f"{allowed}"
                )

        need("the attention heads", a.num_heads, "attention tp", self.tp)
        if a.kind == "gqa" and a.num_kv_heads % self.tp and self.tp % a.num_kv_heads:
            wrong.append(
                f"attention tp {self.tp} and {a.num_kv_heads} KV heads -- tp must divide them, or "
                "be a multiple (then several ranks hold each)"
            )
        if model.dense_width:
            need("the width of dense layers", model.dense_width, "attention tp", self.tp)
        need("the width of an expert", model.expert_width, "experts tp", self.etp)
        if self.fused and model.shared_expert_width:
            need("the width of shared experts", model.shared_expert_width, "attention tp", self.tp)
        if num_slots is not None:
            need("the slots of a layer", num_slots, "experts ep", self.ep)
        if self.pp > model.num_layers:
            wrong.append(
                f"attention pp {self.pp} stages for {model.num_layers} layers -- pp must be at "
                f"most {model.num_layers}"
            )
        _refuse(wrong, f"layout of {model.name}")

    def hosts(self, placement: Placement) -> NDArray[np.int64]:
        """Slots (of a layer) that each rank holds, [G, slots / ep]."""
        return np.arange(placement.num_slots).reshape(self.ep, -1)[self.ep_index]

    def __str__(self) -> str:
        """One line for people."""
        names = {"DP": self.dp, "TP": self.tp, "PP": self.pp}
        experts = {"EP": self.ep, "TP": self.etp, "DP": self.edp}
        how = ", all-gather" if self.exchange == "all_gather" and self.ep > 1 else ""
        return f"attention {_factors(names)}, experts {_factors(experts)}{how}"


def _factors(names: dict[str, int]) -> str:
    return " x ".join(f"{name}{n}" for name, n in names.items() if n > 1) or "on one rank"


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


def _instead(name: str, ranks: int, rest: int) -> str:
    return f", so {name} {ranks // rest}" if ranks % rest == 0 else ""


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _refuse(wrong: list[str], where: str) -> None:
    if wrong:
        raise InputError(f"{where}: " + "; ".join(wrong))
