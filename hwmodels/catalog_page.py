"""The reference page of the catalog, written from the catalog and the schema, so it cannot drift.

``python -m hwmodels.catalog_page`` prints docs/reference/hardware-catalog.md; quantities are
shown with decimal prefixes, times in microseconds, errors in per cent.
"""

import sys

from pydantic import BaseModel

from basis import format_quantity
from hwmodels.cluster import catalog_names, load_cluster, load_device, load_memory
from hwmodels.device import DEFAULT_KERNELS, Device, Memory, Processor
from hwmodels.figures import CostModel, Figure, HeldOut, KernelCost, TransferCost
from hwmodels.link import FULL_LANES, ONE_WAY_RATE, RATE_SOURCE, Link
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
        "Units: streaming multiprocessors, compute units or cores. Cache: the last level. USD/h: "
        "rent of one\ndevice with its share of the host, at the date of its source.\n",
        _device_table(devices),
        "## Memory parts\n",
        "`node.memories` may name one of these instead of describing it.\n",
        _part_table(names["memories"]),
        "## Links\n",
        "What a full port of each standard carries one way; fewer lanes carry proportionally "
        "less.\n",
        _standard_table(),
        "## Memories of a node\n",
        "Figures are the share of one device. NUMA: domains that share the channels. A second "
        "processor of a\ndevice and those of a node follow.\n",
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
    head = ["name", "product", *_FORMATS, "units", "cache", "memory", "bandwidth", "power", "USD/h"]
    rows = []
    for device in devices:
        flops = [_figure(device.processor.flops.get(f), "FLOP/s") for f in _FORMATS]  # type: ignore[call-overload]
        units, cache = device.processor.compute_units, device.processor.cache
        memory = f"{device.memory.capacity.value / 2**30:.1f} GiB {device.memory.kind}"
        parts = [
            "-" if units is None else str(units.value),
            "-" if cache is None else f"{cache.value / 2**20:.4g} MiB",
            memory,
            _figure(device.memory.bandwidth, "B/s"),
            _figure(device.power, "W"),
            "-" if device.price is None else f"{device.price.value:.2f}",
        ]
        rows.append([f"`{device.name}`", device.title, *flops, *parts])
    return _table(head, rows)


def _part_table(names: list[str]) -> str:
    head = ["name", "kind", "capacity", "bandwidth", "source"]
    rows = []
    for name in names:
        part = load_memory(name)
        size = f"{part.capacity.value / 2**30:.0f} GiB"
        rate = _figure(part.bandwidth, "B/s")
        rows.append([f"`{name}`", part.kind, size, rate, part.bandwidth.source])
    return _table(head, rows)


def _standard_table() -> str:
    rows = [
        [
            f"`{name}`",
            format_quantity(rate, "B/s", 4),
            str(FULL_LANES.get(name, "-")),
            RATE_SOURCE[name],
        ]
        for name, rate in ONE_WAY_RATE.items()
    ]
    return _table(["standard", "one way", "lanes or links", "source"], rows)


def _interval(cost: CostModel) -> list[str]:
    held = cost.held_out
    errors = "-" if held is None else f"{held.median:.1%} / {held.mean:.1%} of {held.rows}"
    return [f"{cost.low:.2f} - {cost.high:.2f}", cost.evidence, errors]


def _memories(cluster: Cluster) -> dict[str, Memory]:
    """Memories of the node, and the channels of a device that is a CPU socket."""
    home = {n: m for n, m in cluster.device.memories.items() if n == "host"}
    return home | cluster.node.memories


def _memory_table(clusters: list[Cluster]) -> str:
    head = ["cluster", "memory", "kind", "capacity", "bandwidth", "NUMA"]
    rows = [
        [
            f"`{cluster.name}`",
            f"`{name}`",
            memory.kind,
            f"{memory.capacity.value / 2**30:.0f} GiB",
            _figure(memory.bandwidth, "B/s"),
            str(memory.numa or "-"),
        ]
        for cluster in clusters
        for name, memory in _memories(cluster).items()
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
        if isinstance(cost, KernelCost) and by_dtype is not DEFAULT_KERNELS.get(kernel)
    ]
    return f"### {title}\n\n" + _table([*head, "interval", "evidence", "held out"], rows)


def _links(cluster: Cluster) -> dict[str, Link]:
    links = dict(cluster.node.links)
    if cluster.node.interconnect is not None:
        links = {"interconnect": cluster.node.interconnect} | links
    return links | ({} if cluster.network is None else {"network": cluster.network})


def _cluster_table(clusters: list[Cluster]) -> str:
    head = ["name", "what", "device", "devices a node", "links, one way per device", "node power"]
    rows = []
    for cluster in clusters:
        links = [
            f"{name} {link.standard} {_figure(link.bandwidth, 'B/s')}"
            for name, link in _links(cluster).items()
        ]
        ranks = str(cluster.node.devices)
        device = f"`{cluster.device.name}`"
        power = _figure(cluster.node.power, "W")
        rows.append([f"`{cluster.name}`", cluster.title, device, ranks, "; ".join(links), power])
    return _table(head, rows)


def _parameters(cost: CostModel) -> str:
    """List the parameters of any cost model: fixed times with their unit, the rest as numbers."""
    own = [n for n in type(cost).model_fields if n not in {*CostModel.model_fields, "model"}]
    times = {"latency", *cost.FIXED}
    words = []
    for name in own:
        value = getattr(cost, name)
        if value != type(cost).model_fields[name].default:
            told = format_quantity(value, "s") if name in times else f"{value:.3g}"
            words.append(f"{name} {told}")
    return ", ".join(words)


def _transfer_table(clusters: list[Cluster]) -> str:
    head = ["cluster", "link", "transfer", "model", "parameters"]
    rows = [
        [
            f"`{cluster.name}`",
            name,
            transfer,
            getattr(cost, "model", "transfer"),
            _parameters(cost),
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
