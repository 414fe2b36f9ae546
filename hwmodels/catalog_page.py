"""The reference page of the catalog, written from the catalog and the schema, so it cannot drift.

``python -m hwmodels.catalog_page`` prints docs/reference/hardware-catalog.md; quantities are
shown with decimal prefixes, times in microseconds, errors in per cent.
"""

import sys

from pydantic import BaseModel

from basis import format_quantity
from hwmodels.cluster import catalog_names, load_cluster, load_device
from hwmodels.device import DEFAULT_KERNELS, Device, Memory, Processor
from hwmodels.figures import Figure, HeldOut, KernelCost, TransferCost
from hwmodels.link import Link
from hwmodels.topology import Cluster, Node

_HEAD = """\
# Hardware catalog

<!-- written by `python -m hwmodels.catalog_page`; a test compares the two -->

Every figure of the catalog's YAML files (`hwmodels/catalog/`) with what it rests on. FLOP/s are
dense; link bandwidths count one direction of one GPU. Evidence: *measured*, *fitted* (on measured
tables, scored on held-out shapes), *transfer* (fitted on other hardware), *datasheet*, *assumed*.
A cluster with a network also answers to `NAMExN` for N nodes (`hgx-h100-8x4`). How the
parameters become seconds: [cost model](cost-model.md).
"""
_FORMATS = ("tf32", "bf16", "fp8", "fp4", "int8")
_MODELS: tuple[type[BaseModel], ...] = (
    Device,
    Memory,
    Processor,
    KernelCost,
    Cluster,
    Node,
    Link,
    TransferCost,
    Figure,
    HeldOut,
)


def render() -> str:
    """Return the page as Markdown."""
    names = catalog_names()
    devices = [load_device(name) for name in names["devices"]]
    clusters = [load_cluster(name) for name in names["clusters"]]
    parts = [
        _HEAD,
        "## Devices\n",
        _device_table(devices),
        "## Memories of a node\n",
        "Figures are the share of one device. A second processor of a device and those of a node "
        "follow.\n",
        _memory_table(clusters),
        "## Processors beside the first of a device\n",
        "*Reads*: what it draws from its memory, the memory's own bandwidth unless the file says "
        "otherwise.\n",
        _processor_table(devices, clusters),
        "## Kernel parameters\n",
        "Held out: median and mean of |predicted / measured - 1| on shapes that the fit did not "
        "see.\nInterval: ratio of the true time to the predicted one. Kernels that a file leaves "
        "out have the assumed\nround figures of the [cost model](cost-model.md).\n",
        *(_kernel_table(title, processor) for title, processor in _kernels(devices, clusters)),
        "## Clusters\n",
        _cluster_table(clusters),
        "## Transfer parameters\n",
        _transfer_table(clusters),
        "## Sources\n",
        *(_sources(device.name, device.sources) for device in devices),
        *(_sources(cluster.name, cluster.sources) for cluster in clusters),
        "## Keys of the files\n",
        "Quantities are written with their unit (`3.35 TB/s`). A figure is a bare quantity (then "
        "it counts\nas assumed) or `{value, evidence, source}`.\n",
        *(_schema(model) for model in _MODELS),
    ]
    return "\n".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _figure(figure: Figure[float] | None, unit: str) -> str:
    if figure is None:
        return "-"
    mark = "" if figure.evidence == "datasheet" else f" ({figure.evidence})"
    return format_quantity(figure.value, unit, 5) + mark


def _device_table(devices: list[Device]) -> str:
    head = ["name", "product", *_FORMATS, "memory", "bandwidth", "power"]
    rows = []
    for device in devices:
        flops = [_figure(device.processor.flops.get(f), "FLOP/s") for f in _FORMATS]  # type: ignore[call-overload]
        memory = f"{device.memory.capacity.value / 2**30:.1f} GiB {device.memory.kind}"
        bandwidth = _figure(device.memory.bandwidth, "B/s")
        power = _figure(device.power, "W")
        rows.append([f"`{device.name}`", device.title, *flops, memory, bandwidth, power])
    return _table(head, rows)


def _interval(cost: KernelCost | TransferCost) -> list[str]:
    held = cost.held_out
    errors = "-" if held is None else f"{held.median:.1%} / {held.mean:.1%} of {held.rows}"
    return [f"{cost.low:.2f} - {cost.high:.2f}", cost.evidence, errors]


def _memory_table(clusters: list[Cluster]) -> str:
    head = ["cluster", "memory", "kind", "capacity", "bandwidth"]
    rows = [
        [
            f"`{cluster.name}`",
            f"`{name}`",
            memory.kind,
            f"{memory.capacity.value / 2**30:.0f} GiB",
            _figure(memory.bandwidth, "B/s"),
        ]
        for cluster in clusters
        for name, memory in cluster.node.memories.items()
    ]
    return _table(head, rows)


def _others(
    devices: list[Device], clusters: list[Cluster]
) -> list[tuple[str, str, Processor, Memory]]:
    """List processors that are not the first of a device: owner, name, itself, its memory."""
    inside = [
        (device.name, name, processor, device.memories[processor.memory])
        for device in devices
        for name, processor in list(device.processors.items())[1:]
    ]
    beside = [
        (cluster.name, name, processor, cluster.memory(processor.memory))
        for cluster in clusters
        for name, processor in cluster.node.processors.items()
    ]
    return inside + beside


def _processor_table(devices: list[Device], clusters: list[Cluster]) -> str:
    head = ["device or cluster", "processor", "memory", "reads", "units", "clock", "bf16", "int8"]
    rows = []
    for owner, name, processor, memory in _others(devices, clusters):
        units = "-" if processor.compute_units is None else str(processor.compute_units.value)
        rows.append(
            [
                f"`{owner}`",
                f"`{name}`",
                f"`{processor.memory}`",
                _figure(processor.bandwidth or memory.bandwidth, "B/s"),
                units,
                _figure(processor.clock, "Hz"),
                _figure(processor.flops["bf16"], "FLOP/s"),
                _figure(processor.flops.get("int8"), "FLOP/s"),
            ]
        )
    return _table(head, rows)


def _kernels(devices: list[Device], clusters: list[Cluster]) -> list[tuple[str, Processor]]:
    """List every processor with the title of its table of kernels."""
    first = [(device.name, device.processor) for device in devices]
    others = [(f"{owner}, {name}", p) for owner, name, p, _ in _others(devices, clusters)]
    return first + others


def _kernel_table(title: str, processor: Processor) -> str:
    head = ["kernel", "format", "launch", "compute", "memory", "tile rows", "ramp"]
    rows = [
        [
            kernel,
            dtype,
            format_quantity(cost.launch, "s"),
            f"{cost.compute_efficiency:.2f}",
            f"{cost.memory_efficiency:.2f}",
            str(cost.tile_rows),
            format_quantity(cost.ramp_bytes, "B"),
            *_interval(cost),
        ]
        for kernel, by_dtype in processor.kernels.items()
        for dtype, cost in by_dtype.items()
        if by_dtype is not DEFAULT_KERNELS[kernel]
    ]
    return f"### {title}\n\n" + _table([*head, "interval", "evidence", "held out"], rows)


def _links(cluster: Cluster) -> dict[str, Link]:
    links = dict(cluster.node.links)
    if cluster.node.interconnect is not None:
        links = {"interconnect": cluster.node.interconnect} | links
    return links | ({} if cluster.network is None else {"network": cluster.network})


def _cluster_table(clusters: list[Cluster]) -> str:
    head = ["name", "what", "device", "GPUs a node", "links, one way per GPU"]
    rows = []
    for cluster in clusters:
        links = [
            f"{name} {link.standard} {_figure(link.bandwidth, 'B/s')}"
            for name, link in _links(cluster).items()
        ]
        ranks = str(cluster.node.devices)
        device = f"`{cluster.device.name}`"
        rows.append([f"`{cluster.name}`", cluster.title, device, ranks, "; ".join(links)])
    return _table(head, rows)


def _transfer_table(clusters: list[Cluster]) -> str:
    head = ["cluster", "link", "transfer", "startup", "efficiency"]
    rows = [
        [
            f"`{cluster.name}`",
            name,
            transfer,
            format_quantity(cost.startup, "s"),
            f"{cost.efficiency:.2f}",
            *_interval(cost),
        ]
        for cluster in clusters
        for name, link in _links(cluster).items()
        for transfer, cost in link.costs.items()
    ]
    return _table([*head, "interval", "evidence", "held out"], rows)


def _sources(name: str, sources: dict[str, str]) -> str:
    return "\n".join(f"- `{name}` *{key}*: {text}" for key, text in sources.items())


def _schema(model: type[BaseModel]) -> str:
    rows = []
    for name, field in model.model_fields.items():
        need = "required" if field.is_required() else "optional"
        rows.append([f"`{name}`", need, " ".join((field.description or "").split())])
    intro = (model.__doc__ or "").splitlines()[0]
    title = model.__name__
    return f"\n### {title}\n\n{intro}\n\n" + _table(["key", "", "meaning and unit"], rows)


if __name__ == "__main__":
    sys.stdout.write(render())
