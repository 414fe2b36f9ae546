"""Ranks in nodes, nodes in a cluster: who reaches whom over which link.

A *node* is the set of ranks joined by the fast interconnect (an HGX board, an NVL72 rack); the
``network`` joins nodes. Ranks are numbered node by node; a cluster may use only its first ones.
Memories of a device and of its node (host DRAM, NVMe, CXL) are joined by the node's ``links``
into a graph, and processors stand at memories. Bytes per second, one way.
"""

from collections import deque
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from basis import BytesPerSecond, InputError, Strict, Watts
from hwmodels.device import Device, Memory, Processor
from hwmodels.figures import Figure
from hwmodels.link import Link


class Node(Strict):
    """The devices that share the fast interconnect, and what else stands beside them."""

    devices: int = Field(gt=0)
    """Devices (ranks) of one node."""
    interconnect: Link | None = None
    """Each device's port to the others of its node; none where a node has one device."""
    memories: dict[str, Memory] = Field(default_factory=dict)
    """Memories of the node by name (``host``, ``nvme``, ``cxl``), figures per device."""
    processors: dict[str, Processor] = Field(default_factory=dict)
    """Processors at these memories by name (``cpu``, ``ndp``), figures per device."""
    links: dict[str, Link] = Field(default_factory=dict)
    """Edges of the memory graph by name, each with its two ``ends``."""
    power: Figure[Watts] | None = None
    """Power of one whole node (server or rack) with hosts, switches and fans, W."""

    @model_validator(mode="after")
    def _joined(self) -> Self:
        if self.devices > 1 and self.interconnect is None:
            raise ValueError(
                f"{self.devices} devices without an interconnect -- describe the link between them"
            )
        for name, link in self.links.items():
            if link.ends is None:
                raise ValueError(f"links.{name}: ends is missing -- name the two memories it joins")
        for name, processor in self.processors.items():
            if processor.memory not in self.memories:
                raise ValueError(
                    f"processors.{name}.memory: {processor.memory!r} is not a memory of the node "
                    f"-- memories are {', '.join(self.memories) or 'none'}"
                )
        return self

    def scaled(self, links: dict[str, float], *, rates: float, fixed: float) -> Self:
        """Return a copy with links scaled by ``links`` and all else by ``rates``, ``fixed``."""
        port = self.interconnect
        parts: dict[str, Any] = {
            "interconnect": None if port is None else port.scaled(**links),
            "memories": {n: m.scaled(rates) for n, m in self.memories.items()},
            "processors": {
                n: p.scaled(rates=rates, fixed=fixed) for n, p in self.processors.items()
            },
            "links": {n: link.scaled(**links) for n, link in self.links.items()},
        }
        return self.model_copy(update=parts)


class Cluster(Strict):
    """Equal nodes of equal devices."""

    name: str
    """Short name; a catalog cluster with a network takes a suffix: ``hgx-h100-8x4``."""
    title: str = ""
    """For people."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Citations by the short key that the figures use."""
    device: Device
    """The device of every rank; in a file also a catalog name or the path of a device file."""
    node: Node
    """One node; all are alike."""
    nodes: int = Field(default=1, gt=0)
    """Nodes that the cluster has."""
    network: Link | None = None
    """Each rank's own port to other nodes."""
    gpus: int | None = Field(default=None, gt=0)
    """Use only the first so many ranks."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nodes > 1 and self.network is None:
            raise ValueError(f"{self.nodes} nodes without a network -- describe the link of a rank")
        for kind in ("memories", "processors"):
            ours, theirs = getattr(self.node, kind), getattr(self.device, kind)
            if both := sorted(set(ours) & set(theirs)):
                raise ValueError(
                    f"node.{kind}.{both[0]}: the device has one of that name too -- names are "
                    "unique in a cluster -- rename one"
                )
        known = {*self.device.memories, *self.node.memories}
        for name, link in self.node.links.items():
            if strangers := [end for end in link.ends or () if end not in known]:
                raise ValueError(
                    f"node.links.{name}.ends: {strangers[0]!r} is not a memory -- "
                    f"memories are {', '.join(sorted(known))}"
                )
        if self.gpus is not None and self.gpus > self.nodes * self.node.devices:
            raise ValueError(
                f"gpus: {self.gpus} -- the cluster has {self.nodes * self.node.devices}"
            )
        return self

    @property
    def num_ranks(self) -> int:
        """G: ranks in use."""
        return self.gpus or self.nodes * self.node.devices

    @property
    def num_nodes(self) -> int:
        """Nodes in use; the last may be in use in part."""
        return -(-self.num_ranks // self.node.devices)

    @property
    def ranks_per_node(self) -> int:
        """Ranks in use on a full node (on the only node, if there is one)."""
        return min(self.node.devices, self.num_ranks)

    @property
    def node_of(self) -> NDArray[np.int64]:
        """[G] node of each rank."""
        return np.arange(self.num_ranks) // self.node.devices

    @property
    def intra(self) -> Link:
        """A rank's port to its own node.

        Raises
        ------
        InputError
            If nodes have one device each.
        """
        if self.node.interconnect is None:
            raise InputError(f"{self.name}: no interconnect -- a node has one device")
        return self.node.interconnect

    def memory(self, name: str) -> Memory:
        """Return a memory of the device or the node by name.

        Raises
        ------
        InputError
            If no memory has that name.
        """
        known = self.node.memories | self.device.memories
        if name not in known:
            raise InputError(
                f"{self.name}: no memory {name!r} -- memories are {', '.join(sorted(known))}"
            )
        return known[name]

    def processor(self, name: str | None = None) -> Processor:
        """Return a processor of the device or the node by name; without one, the device's first.

        Raises
        ------
        InputError
            If no processor has that name.
        """
        if name is None:
            return self.device.processor
        known = self.device.processors | self.node.processors
        if name not in known:
            raise InputError(
                f"{self.name}: no processor {name!r} -- processors are {', '.join(known)}"
            )
        return known[name]

    def bandwidth(self, name: str | None = None) -> Figure[BytesPerSecond]:
        """Bytes per second that a processor reads from its memory.

        Raises
        ------
        InputError
            If no processor has that name.
        """
        processor = self.processor(name)
        return processor.bandwidth or self.memory(processor.memory).bandwidth

    def route(self, source: str, target: str) -> tuple[str, ...]:
        """Names of the node's links from one memory to another, in order; fewest hops.

        Of equally short ways the one over links named earlier in the file; none within a memory.

        Raises
        ------
        InputError
            If a memory is unknown, or no way joins the two.
        """
        for name in (source, target):
            self.memory(name)
        ways: dict[str, tuple[str, ...]] = {source: ()}
        ahead = deque([source])
        while ahead and target not in ways:
            here = ahead.popleft()
            for name, link in self.node.links.items():
                for near, far in (link.ends or ("", ""), (link.ends or ("", ""))[::-1]):
                    if near == here and far not in ways:
                        ways[far] = (*ways[here], name)
                        ahead.append(far)
        if target not in ways:
            edges = ", ".join("-".join(k.ends or ()) for k in self.node.links.values()) or "none"
            raise InputError(
                f"{self.name}: no path from {source!r} to {target!r} -- edges: {edges} -- "
                "add a link with these ends under node.links"
            )
        return ways[target]

    def path(self, source: str, target: str) -> tuple[Link, ...]:
        """Links of `route`, in order.

        Raises
        ------
        InputError
            As `route`.
        """
        return tuple(self.node.links[name] for name in self.route(source, target))

    def scaled(
        self, *, rates: float = 1.0, communication: float | None = None, fixed: float = 1.0
    ) -> Self:
        """Return an imagined copy, for bounds and tests.

        Parameters
        ----------
        rates : float
            Multiplies every bandwidth and FLOP/s.
        communication : float, optional
            Multiplies the bandwidth of links in addition; infinity makes bytes free (a copy is
            then as slow as its memories).
        fixed : float
            Multiplies launches and startup times; 0 removes them.
        """
        links = {"rates": rates * (communication or 1.0), "fixed": fixed}

        return self.model_copy(
            update={
                "device": self.device.scaled(rates=rates, fixed=fixed),
                "node": self.node.scaled(links, rates=rates, fixed=fixed),
                "network": None if self.network is None else self.network.scaled(**links),
            }
        )
