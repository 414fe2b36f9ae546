"""Rings of NCCL and the engines' own all-reduce: what a tensor summed or gathered takes.

A ring of r ranks takes r - 1 steps there (and r - 1 back), each of a launch-free hop and a piece
of the tensor; sums may instead be made in the switch. An engine's own all-reduce reads its peers'
memory directly, in one step or two, up to a size above which it leaves the work to a ring.
"""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from basis import Bytes, Seconds
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
)
from hwmodels.ops import Floats

LAUNCH = Parameter(name="launch", low=1e-7, high=2e-4, start=5e-6)
HOP = Parameter(name="hop", low=1e-9, high=2e-5, start=1e-6)
SHARE = Parameter(name="share", low=0.005, high=1.0, start=0.8)
OWN = Parameter(name="own", low=0.05, high=20.0, start=2.0)
FILL = Parameter(name="fill", low=1e-9, high=5e-5, start=1e-6)
NARROW = Parameter(name="narrow", low=0.1, high=1.0, start=0.9, scale="linear")


class RingCost(CollectiveCost):
    """All-reduce, all-gather or reduce-scatter of a library, around a ring.

    ``t = launch + hops hop + T + 2 sqrt(fill T)``, T the seconds of the bytes: sent to the
    neighbour at ``share`` of the link, one piece copied at home at ``own`` times it.
    """

    model: Literal["ring"] = "ring"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        LAUNCH,
        HOP,
        SHARE,
        OWN,
        FILL,
        NARROW,
        Parameter(name="multicast", low=0.05, high=1.0, start=0.5),
    )
    FIXED: ClassVar[tuple[str, ...]] = ("launch", "hop", "fill")
    launch: Seconds
    """Fixed time of a call, s."""
    hop: Seconds
    """Time of one step to the neighbour without bytes, s; r - 1 steps, twice for an all-reduce."""
    share: float = Field(gt=0, le=1)
    """Share of the link's one-way rate that long pieces reach."""
    own: float = Field(gt=0)
    """Rate of the piece that a rank copies or adds at home, over the link's rate."""
    fill: Seconds
    """Time to fill the pipeline with one chunk, s."""
    narrow: float = Field(default=1.0, gt=0, le=1)
    """What each doubling of the group leaves of a port's share where ports meet in a tree (PCIe
    switches, sockets); 1 on a full crossbar."""
    multicast: float = Field(default=0.0, ge=0, le=1)
    """Share of the link at which the switch adds up and multicasts (NVLink SHARP): the whole
    tensor once through each port; 0: the switch cannot."""

    def features(self, op: Load | CommOp, limits: Limits) -> Features:
        """Return hops, doublings of the group beyond two, and seconds at the link's full rate."""
        load = _ring(op)
        return {
            "work": load.tensor,
            "hops": load.passes * (load.ranks - 1),
            "doublings": np.maximum(np.log2(load.ranks) - 1, 0.0),
            "wire": load.port / limits.bandwidth,
            "piece": load.tensor / load.ranks / limits.bandwidth,
            "tensor": load.tensor / limits.bandwidth,
        }

    @staticmethod
    def split(numbers: Numbers, features: Features) -> tuple[Floats, Floats]:
        """Return launch and hops, and the bytes' seconds in the faster of the two ways."""
        f = features
        moving = f["wire"] / numbers["share"] + f["piece"] / numbers["own"]
        moving = moving / numbers["narrow"] ** f["doublings"]
        if numbers["multicast"] > 0:
            moving = np.minimum(moving, f["tensor"] / numbers["multicast"])
        return numbers["launch"] + f["hops"] * numbers["hop"], filled(moving, numbers["fill"])

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        fixed, moving = RingCost.split(numbers, features)
        return np.asarray(fixed + moving)


class DirectCost(CollectiveCost):
    """An engine's own all-reduce, which reads its peers' memory, and the ring beyond its limit.

    One-shot: every rank reads the whole tensor of all others. Two-shot: each sums a share and
    gathers the others' after a ``second`` barrier. The faster of the two up to ``limit`` bytes.
    """

    model: Literal["direct"] = "direct"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        LAUNCH,
        Parameter(name="hop", low=1e-10, high=2e-5, start=1e-7),
        Parameter(name="one_shot", low=0.02, high=1.0, start=0.6),
        Parameter(name="two_shot", low=0.02, high=1.0, start=0.6),
        Parameter(name="second", low=1e-8, high=5e-5, start=3e-6),
        Parameter(name="ring_launch", low=1e-7, high=2e-4, start=1e-5),
        SHARE,
        OWN,
        FILL,
        NARROW,
    )
    FIXED: ClassVar[tuple[str, ...]] = ("launch", "hop", "second", "ring_launch", "fill")
    launch: Seconds
    """Fixed time of a call of the engine's kernel, its barrier included, s."""
    hop: Seconds
    """Further time for each peer, s."""
    one_shot: float = Field(gt=0, le=1)
    """Share of the link at which whole tensors are read."""
    two_shot: float = Field(gt=0, le=1)
    """Share of the link at which pieces are read and gathered."""
    second: Seconds
    """Time of the barrier between the two steps, s."""
    ring_launch: Seconds
    """Fixed time of a call beyond the limit, s."""
    share: float = Field(gt=0, le=1)
    """Share of the link that long pieces reach in the ring."""
    own: float = Field(gt=0)
    """Rate of the ring's piece at home, over the link's rate."""
    fill: Seconds
    """Time to fill the ring's pipeline, s."""
    narrow: float = Field(default=1.0, gt=0, le=1)
    """What each doubling of the group leaves of a port's share in a tree; 1 on a crossbar."""
    limit: Bytes
    """Bytes up to which the engine's own kernel is used."""
    most_ranks: int = Field(default=8, gt=1)
    """Ranks up to which the engine's own kernel is used."""

    def features(self, op: Load | CommOp, limits: Limits) -> Features:
        """Return peers, seconds at the link's full rate, and which rows go to the ring."""
        load = _ring(op)
        return {
            "work": load.tensor,
            "peers": load.ranks - 1,
            "doublings": np.maximum(np.log2(load.ranks) - 1, 0.0),
            "whole": (load.ranks - 1) * load.tensor / limits.bandwidth,
            "wire": load.port / limits.bandwidth,
            "piece": load.tensor / load.ranks / limits.bandwidth,
            "ring": ((load.tensor > self.limit) | (load.ranks > self.most_ranks)).astype(float),
        }

    @staticmethod
    def split(numbers: Numbers, features: Features) -> tuple[Floats, Floats]:
        """Return the fixed and the bytes' seconds of the engine's kernel, or of the ring."""
        f = features
        left = numbers["narrow"] ** f["doublings"]
        two = numbers["second"] + f["wire"] / numbers["two_shot"] / left
        own = either(f["whole"] / numbers["one_shot"] / left, two)
        ring = (f["wire"] / numbers["share"] + f["piece"] / numbers["own"]) / left
        ring = filled(ring, numbers["fill"])
        fixed = numbers["launch"] + f["peers"] * numbers["hop"]
        beyond = f["ring"] > 0
        return np.where(beyond, numbers["ring_launch"], fixed), np.where(beyond, ring, own)

    @staticmethod
    def time(numbers: Numbers, features: Features) -> Floats:
        """Return seconds [n]."""
        fixed, moving = DirectCost.split(numbers, features)
        return np.asarray(fixed + moving)


def _ring(op: Load | CommOp) -> RingLoad:
    load = op if isinstance(op, (RingLoad, ExchangeLoad)) else load_of(op)
    if not isinstance(load, RingLoad):
        raise TypeError("a ring prices a tensor, not a traffic matrix")
    return load
