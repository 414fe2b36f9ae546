"""Guards against the mistakes that data sheets invite.

Sparse FLOP/s taken for dense (twice too fast), both directions of a link added up, GB for GiB,
a bandwidth that the pins cannot carry, a drive faster than its lanes, watts for kilowatts. Each
check compares a figure with what its parts give and answers with findings; an ``error`` stops the
loading of a file, a ``warning`` is only told.
"""

from collections.abc import Iterator

from pydantic import BaseModel

from basis import format_quantity
from hwmodels.check_parts import check_link, check_memory
from hwmodels.check_rates import check_power, check_processor, check_reading
from hwmodels.device import Device, Memory
from hwmodels.figures import CostModel, Figure
from hwmodels.finding import Finding, error, warning
from hwmodels.topology import Cluster, Node

__all__ = ["Finding", "check_cluster", "check_device", "check_link", "check_part"]

_PRICE = (0.01, 50.0)
_HOSTS = {"cpu"}
"""Processors by name that have no sparse rate to mistake for a dense one."""


def check_device(device: Device) -> list[Finding]:
    """Check one device: dense rates, memory sizes and bandwidths, power, price, sources."""
    found = [f for n, m in device.memories.items() for f in check_memory(f"memories.{n}.", m)]
    for name, processor in device.processors.items():
        where = f"processors.{name}"
        found += check_processor(where, processor, accelerator=name not in _HOSTS)
        found += check_reading(where, processor, device.memories[processor.memory])
    found += check_power(device)
    found += _price(device)
    return found + _cited("", device, device.sources)


def check_part(memory: Memory) -> list[Finding]:
    """Check a memory that stands in a file of its own; its figures cite in full."""
    return list(check_memory("", memory)) + _cited("", memory, {})


def check_cluster(cluster: Cluster) -> list[Finding]:
    """Check a cluster: its device, its links, the memories and processors of its node."""
    found = check_device(cluster.device)
    node = cluster.node
    links = {f"node.links.{n}": link for n, link in node.links.items()}
    if node.interconnect is not None:
        links["node.interconnect"] = node.interconnect
    if cluster.network is not None:
        links["network"] = cluster.network
    found += [f for where, link in links.items() for f in check_link(link, where)]
    for name, memory in node.memories.items():
        found += check_memory(f"node.memories.{name}.", memory)
        found += _reached(name, memory, node)
    for name, processor in node.processors.items():
        where = f"node.processors.{name}"
        found += check_processor(where, processor, accelerator=False)
        found += check_reading(where, processor, node.memories[processor.memory])
    found += _node_power(cluster)
    return (
        found
        + _cited("node", cluster.node, cluster.sources)
        + _cited("network", cluster.network, cluster.sources)
    )


def _price(device: Device) -> Iterator[Finding]:
    if device.price is not None and not _PRICE[0] <= device.price.value <= _PRICE[1]:
        yield warning(
            "price",
            f"{device.price.value:g} USD/h for one device -- {_PRICE[0]:g} to {_PRICE[1]:g} is "
            "usual -- give the rent of one device, not of a node and not its purchase",
        )


def _node_power(cluster: Cluster) -> Iterator[Finding]:
    """Compare with the devices: a node draws at least what they may."""
    node, device = cluster.node.power, cluster.device.power
    if node is None or device is None:
        return
    least = cluster.node.devices * device.value
    if not least <= node.value <= 4 * least:
        yield error(
            "node.power",
            f"{format_quantity(node.value, 'W', 4)} -- its {cluster.node.devices} devices may draw "
            f"{format_quantity(least, 'W', 4)}, a node one to four times that -- give the power "
            "of the whole node",
        )


def _reached(name: str, memory: Memory, node: Node) -> Iterator[Finding]:
    """Each memory of a node has a link, and a drive is no faster than its lanes."""
    rates = [k.bandwidth.value for k in node.links.values() if name in (k.ends or ())]
    if not rates:
        yield warning(
            f"node.memories.{name}",
            "no link reaches it -- nothing can be copied from or to it -- add a link "
            "with it among its ends under node.links",
        )
    elif memory.kind.lower().startswith("nvme") and memory.bandwidth.value > 1.05 * sum(rates):
        yield error(
            f"node.memories.{name}.bandwidth",
            f"{format_quantity(memory.bandwidth.value, 'B/s', 4)} -- its lanes carry "
            f"{format_quantity(sum(rates), 'B/s', 4)} -- give the drive's sequential read, and "
            "the lanes that it has",
        )


def _cited(where: str, part: object, sources: dict[str, str]) -> list[Finding]:
    """Warn of claims without a source, of keys without a text, and of fits without an error."""
    return [f for path, stated in _stated(where, part) for f in _claim(path, stated, sources)]


def _claim(
    where: str, stated: Figure[float] | CostModel, known: dict[str, str]
) -> Iterator[Finding]:
    """Check one figure; a source with blanks in it is a citation, one without is a key."""
    if isinstance(stated, CostModel) and stated.evidence == "fitted" and stated.held_out is None:
        yield warning(
            where,
            "fitted without its error -- a fit is scored on shapes that it did not see -- add "
            "held_out, or write evidence: assumed",
        )
    if stated.source == "not stated":
        if stated.evidence != "assumed":
            yield warning(
                where,
                f"evidence {stated.evidence} without a source -- every figure that is not "
                "assumed names one -- add source, or write evidence: assumed",
            )
    elif " " not in stated.source and stated.source not in known:
        yield warning(
            where,
            f"source {stated.source!r} is not in sources -- there are: "
            f"{', '.join(known) or 'none'} -- add it, or cite in full",
        )


def _stated(where: str, value: object) -> Iterator[tuple[str, Figure[float] | CostModel]]:
    """Walk through a part of a file and yield every figure and cost model with its path."""
    at = f"{where}." if where else ""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _stated(f"{at}{key}", item)
    elif isinstance(value, BaseModel):
        if isinstance(value, Figure | CostModel):
            yield where, value
        for name in type(value).model_fields:
            yield from _stated(f"{at}{name}", getattr(value, name))
