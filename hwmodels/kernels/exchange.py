"""All-to-all: NCCL's peers, and the dispatch and combine kernels of expert parallelism.

All send what the traffic matrix says, and the busiest port decides; they differ in what is paid
beside the bytes: per peer, per expert, per token, per row. Seconds.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import Field

from basis import BytesPerSecond, Seconds
from hwmodels.kernels.base import Features, Limits, Numbers, Parameter
from hwmodels.kernels.collective import (
    CollectiveCost,
    CommOp,
    ExchangeLoad,
    Load,
    RingLoad,
    either,
    filled,
    load_of,
    overlapped,
)
from hwmodels.kernels.rings import FILL, HOP, LAUNCH, NARROW, OWN, SHARE
from hwmodels.ops import Floats

T = TypeVar("T")


class PeersCost(CollectiveCost):
    """All-to-all of a library: a message to each peer, short ones by a slow protocol at once.

    ``t = launch + peers hop + S / (share W) + p / (own W) + min(p / (slow W), setup)`` for S bytes
    through the busiest port, p of them per peer (NCCL's LL against its Simple protocol).
    """

    model: Literal["peers"] = "peers"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        LAUNCH,
        HOP,
        SHARE,
        OWN,
        Parameter(name="slow", low=0.001, high=1.0, start=0.05),
        Parameter(name="setup", low=1e-8, high=6e-5, start=5e-6),
        NARROW,
    )
    FIXED: ClassVar[tuple[str, ...]] = ("launch", "hop", "setup")
    launch: Seconds
    """Fixed time of a call, s."""
    hop: Seconds
    """Further time for each peer, s."""
    share: float = Field(gt=0, le=1)
    """Share of the link's one-way rate that long messages reach."""
    own: float = Field(gt=0)
    """Rate at which a rank copies its own part at home, over the link's rate."""
    slow: float = Field(gt=0, le=1)
    """Share of the link by which short messages are slower than long ones: flags sent with them."""
    setup: Seconds
    """What a long message pays instead, s."""
    narrow: float = Field(default=1.0, gt=0, le=1)
    """What each doubling of the group leaves of a port's share in a tree; 1 on a crossbar."""

    def features(self, op: Load | CommOp, limits: Limits) -> Features:
        """Return peers, doublings beyond two, and seconds at the link's full rate."""
        load = _exchange(op)
        peers = np.maximum(load.ranks - 1, 1.0)
        return {
            "work": load.port,
            "peers": peers,
            "doublings": np.maximum(np.log2(np.maximum(load.ranks, 2.0)) - 1, 0.0),
            "wire": load.port / limits.bandwidth,
            "message": load.port / peers / limits.bandwidth,
        }

    @staticmethod
    def split(numbers: Numbers, features: Features) -> tuple[Floats, Floats]:
        """Return launch and peers, and the seconds of the bytes."""
        f = features
        moving = f["wire"] / numbers["share"] + f["message"] / numbers["own"]
        moving = moving / numbers["narrow"] ** f["doublings"]
        short = f["message"] / numbers["slow"]
        moving = moving + either(short, np.full_like(short, numbers["setup"]))
        return numbers["launch"] + f["peers"] * numbers["hop"], moving

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        fixed, moving = PeersCost.split(numbers, features)
        return np.asarray(fixed + moving)


class TokenExchange(CollectiveCost):
    """Dispatch or combine by a kernel that works through tokens while bytes travel.

    ``t = max(host, launch + experts expert + ranks peer + max(tokens token / u, S / (share W)))``,
    both maxima smooth. DeepEP's low-latency kernels flag every expert and spread the tokens over
    as many units u as they start blocks for experts; others use the same units for any load.
    """

    model: Literal["tokens"] = "tokens"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        LAUNCH,
        SHARE,
        Parameter(name="token", low=1e-11, high=1e-4, start=1e-6),
        Parameter(name="expert", low=1e-12, high=1e-6, start=1e-8),
        Parameter(name="peer", low=1e-10, high=2e-5, start=1e-7),
        Parameter(name="host", low=1e-6, high=2e-3, start=5e-5),
    )
    FIXED: ClassVar[tuple[str, ...]] = ("launch", "token", "expert", "peer", "host")
    launch: Seconds
    """Fixed time of a call on the processor, s."""
    share: float = Field(gt=0, le=1)
    """Share of the link's one-way rate that many rows reach."""
    token: Seconds = 0.0
    """Time that one unit works on one of the rank's tokens, s."""
    expert: Seconds = 0.0
    """Time for each expert of the layer (its counts and flags), s."""
    peer: Seconds = 0.0
    """Time for each member of the link, s."""
    host: Seconds = 0.0
    """Time of the host's own work, which hides the processor's while longer, s."""
    spread: Literal["experts", "fixed"] = "fixed"
    """Whether tokens are spread over the units started for the experts, or over a fixed set that
    ``token`` holds already."""
    sent_per: Literal["rank", "expert"] = "rank"
    """Whether a token is sent once to each rank that it visits, or once for each expert there."""

    def features(self, op: Load | CommOp, limits: Limits) -> Features:
        """Return tokens per unit, experts, ranks, and seconds at the link's full rate."""
        load = _exchange(op)
        units = np.ones_like(load.port)
        if self.spread == "experts":
            units = low_latency_units(load.experts, limits.units)
        port = load.port * load.copies if self.sent_per == "expert" else load.port
        return {
            "work": load.port,
            "tokens": load.tokens / units,
            "experts": load.experts,
            "ranks": load.ranks,
            "wire": port / limits.bandwidth,
        }

    @staticmethod
    def split(numbers: Numbers, features: Features) -> tuple[Floats, Floats]:
        """Return the fixed seconds, and those of tokens and bytes with the host's excess."""
        f = features
        fixed = numbers["launch"] + f["experts"] * numbers["expert"] + f["ranks"] * numbers["peer"]
        moving = overlapped(f["tokens"] * numbers["token"], f["wire"] / numbers["share"])
        whole = overlapped(np.full_like(moving, numbers["host"]), fixed + moving)
        return fixed, np.maximum(whole - fixed, moving)

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        fixed, moving = TokenExchange.split(numbers, features)
        return np.asarray(fixed + moving)


class ChannelExchange(CollectiveCost):
    """Dispatch or combine by DeepEP's normal kernels, on a chosen number of units.

    ``t = launch + ranks peer + row / row_rate + T + 2 sqrt(fill T)``, T the smooth maximum of the
    units' work, ``(tokens token + A / unit_rate) / units`` for all rows A that a rank sends, its
    own included, and of the busiest port's bytes at ``share`` of the link.
    """

    model: Literal["channels"] = "channels"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        LAUNCH,
        SHARE,
        Parameter(name="token", low=1e-10, high=1e-4, start=5e-7),
        Parameter(name="unit_rate", low=1e9, high=2e11, start=2e10),
        FILL,
        Parameter(name="row_rate", low=1e8, high=1e12, start=1e10),
        Parameter(name="peer", low=1e-9, high=1e-4, start=1e-6),
    )
    FIXED: ClassVar[tuple[str, ...]] = ("launch", "token", "fill", "peer")
    RATES: ClassVar[tuple[str, ...]] = ("unit_rate", "row_rate")
    launch: Seconds
    """Fixed time of a call, s."""
    share: float = Field(gt=0, le=1)
    """Share of the link's one-way rate that many rows reach."""
    token: Seconds
    """Time that one unit works on one of the rank's tokens, wherever it goes, s."""
    unit_rate: BytesPerSecond
    """Bytes per second of rows that one unit passes on."""
    fill: Seconds
    """Time to fill the channels with one chunk, s."""
    row_rate: BytesPerSecond = 1e12
    """Bytes per second at which one row passes through one warp."""
    peer: Seconds = 0.0
    """Further time for each member of the link, s."""
    units: int = Field(default=20, gt=0)
    """Units (SMs) that the engine gives to the exchange."""

    def features(self, op: Load | CommOp, limits: Limits) -> Features:
        """Return tokens and bytes per unit, and seconds at the link's full rate."""
        load = _exchange(op)
        units = np.where(load.units > 0, load.units, float(self.units))
        home = np.divide(load.ranks, np.maximum(load.ranks - 1, 1.0))
        return {
            "work": load.port,
            "tokens": load.tokens / units,
            "rows": load.port * home / units,
            "row": load.row,
            "ranks": load.ranks,
            "wire": load.port / limits.bandwidth,
        }

    @staticmethod
    def split(numbers: Numbers, features: Features) -> tuple[Floats, Floats]:
        """Return the fixed seconds, and those of tokens and bytes."""
        f = features
        work = f["tokens"] * numbers["token"] + f["rows"] / numbers["unit_rate"]
        moving = filled(overlapped(work, f["wire"] / numbers["share"], 2.0), numbers["fill"])
        fixed = numbers["launch"] + f["ranks"] * numbers["peer"]
        return fixed + f["row"] / numbers["row_rate"], moving

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        fixed, moving = ChannelExchange.split(numbers, features)
        return np.asarray(fixed + moving)


class ByTokens(CollectiveCost):
    """Two kernels for one exchange: one for few tokens a rank (decode), one for many (prefill).

    Where the tokens are not stated, the faster of the two (a bound on either).
    """

    model: Literal["by_tokens"] = "by_tokens"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = ()
    FIXED: ClassVar[tuple[str, ...]] = ()
    few: TokenExchange
    """Up to ``most_tokens``."""
    many: TokenExchange | ChannelExchange = Field(discriminator="model")
    """Beyond."""
    most_tokens: int = Field(gt=0)
    """Tokens of a rank up to which the engine takes the first (its buffers hold no more)."""

    def numbers(self) -> dict[str, float]:
        """Return both kernels' fitted fields, each under its own name."""
        return {
            f"{part} {name}": value
            for part, cost in (("few", self.few), ("many", self.many))
            for name, value in cost.numbers().items()
        } | {"many channels": float(isinstance(self.many, ChannelExchange))}

    def features(self, op: Load | CommOp, limits: Limits) -> Features:
        """Return both kernels' features and which of them runs."""
        load = _exchange(op)
        both = {
            f"{part} {name}": column
            for part, cost in (("few", self.few), ("many", self.many))
            for name, column in cost.features(load, limits).items()
        }
        beyond = (load.tokens > self.most_tokens).astype(float)
        unstated = (load.tokens == 0).astype(float)
        return both | {"work": load.port, "beyond": beyond, "unstated": unstated}

    @staticmethod
    def split(numbers: Numbers, features: Features) -> tuple[Floats, Floats]:
        """Return the parts of the kernel that runs."""
        large = ChannelExchange if numbers["many channels"] else TokenExchange
        few = TokenExchange.split(_part(numbers, "few "), _part(features, "few "))
        many = large.split(_part(numbers, "many "), _part(features, "many "))
        faster = many[0] + many[1] < few[0] + few[1]
        second = (features["beyond"] > 0) | ((features["unstated"] > 0) & faster)
        return np.where(second, many[0], few[0]), np.where(second, many[1], few[1])

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        fixed, moving = ByTokens.split(numbers, features)
        return np.asarray(fixed + moving)

    def with_fixed(self, factor: float) -> Self:
        """Return a copy with both kernels' fixed times multiplied."""
        both = {"few": self.few.with_fixed(factor), "many": self.many.with_fixed(factor)}
        return self.model_copy(update=both)

    def with_rates(self, factor: float) -> Self:
        """Return a copy with both kernels' own rates multiplied."""
        both = {"few": self.few.with_rates(factor), "many": self.many.with_rates(factor)}
        return self.model_copy(update=both)


def _part(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}


def low_latency_units(experts: Floats, units: float) -> Floats:
    """Return the blocks that DeepEP's low-latency kernels start, one unit each.

    Every expert has a group of warps; as many groups share a block as it takes for all experts to
    fit on the processor (csrc/kernels/internode_ll.cu of DeepEP: ``num_warp_groups =
    ceil(experts / SMs)``, ``num_sms = ceil(experts / num_warp_groups)``). A processor that states
    no units has one for every expert.
    """
    groups = np.maximum(np.ceil(experts / units), 1.0) if units > 0 else np.ones_like(experts)
    return np.maximum(np.ceil(experts / groups), 1.0)


def _exchange(op: Load | CommOp) -> ExchangeLoad:
    load = op if isinstance(op, (RingLoad, ExchangeLoad)) else load_of(op)
    if not isinstance(load, ExchangeLoad):
        raise TypeError("an exchange prices a traffic matrix, not a tensor")
    return load
