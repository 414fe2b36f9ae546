"""Load devices and clusters from the catalog or from a user's own YAML, and check them.

Three steps, none half done: read and validate the file, resolve the names in it (the cluster's
device, the memories of its node, the ``xN`` suffix), refuse what the guards of `hwmodels.check`
call an error.
"""

import difflib
import re
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

from basis import InputError, read_data, validate
from hwmodels.check import Finding, check_cluster, check_device, check_part
from hwmodels.device import Device, Memory, Processor
from hwmodels.link import Link
from hwmodels.topology import Cluster, Node

__all__ = [
    "Cluster",
    "Device",
    "Link",
    "Memory",
    "Node",
    "Processor",
    "catalog_names",
    "check_catalog",
    "check_hardware",
    "load_cluster",
    "load_device",
    "load_hardware",
    "load_memory",
]

_Kind = Literal["devices", "memories", "clusters"]
_SINGULAR: dict[_Kind, str] = {"devices": "device", "memories": "memory", "clusters": "cluster"}
_SUFFIX = re.compile(r"(?P<base>.+)x(?P<nodes>[1-9]\d*)")


def catalog_names() -> dict[str, list[str]]:
    """Names in the catalog: ``{"devices": [...], "memories": [...], "clusters": [...]}``.

    A cluster with a network also answers to its name with a suffix (``hgx-h100-8x4``).
    """
    return {kind: _names(kind) for kind in _SINGULAR}


def load_device(name_or_path: str | Path) -> Device:
    """Load a device by catalog name, or from the path of a YAML file.

    Raises
    ------
    InputError
        Unknown name, unreadable file, invalid content, or a figure that a guard refuses.
    """
    device, where = _device(name_or_path)
    _refuse(check_device(device), where)
    return device


def load_memory(name_or_path: str | Path) -> Memory:
    """Load a memory part (a drive, a CXL module) by catalog name, or from a YAML file.

    Raises
    ------
    InputError
        As `load_device`.
    """
    memory, where = _memory(name_or_path)
    _refuse(check_part(memory), where)
    return memory


def load_cluster(name_or_path: str | Path, gpus: int | None = None) -> Cluster:
    """Load a cluster by catalog name (also ``NAMExN`` for N nodes), or from a YAML file.

    Parameters
    ----------
    name_or_path : str or Path
        A catalog name, or the path of a file (ending in .yaml, .yml or .json).
    gpus : int, optional
        Use only the first so many ranks; the last node may be used in part.

    Raises
    ------
    InputError
        Unknown name, unreadable file, invalid content, a refused figure, or wrong ``gpus``.
    """
    cluster, where = _cluster(name_or_path)
    _refuse(check_cluster(cluster), where)
    return cluster if gpus is None else _first(cluster, gpus)


def load_hardware(name_or_path: str | Path) -> Device | Memory | Cluster:
    """Load whatever the name or the file describes: a device, a memory or a cluster.

    Raises
    ------
    InputError
        As `load_device` and `load_cluster`.
    """
    match _kind(name_or_path):
        case "devices":
            return load_device(name_or_path)
        case "memories":
            return load_memory(name_or_path)
        case "clusters":
            return load_cluster(name_or_path)


def check_hardware(name_or_path: str | Path) -> list[Finding]:
    """Return what the guards find in a catalog entry or a file, errors and warnings alike.

    Raises
    ------
    InputError
        Unknown name, unreadable file, or content that does not fit the schema.
    """
    match _kind(name_or_path):
        case "devices":
            return check_device(_device(name_or_path)[0])
        case "memories":
            return check_part(_memory(name_or_path)[0])
        case "clusters":
            return check_cluster(_cluster(name_or_path)[0])


def check_catalog() -> list[Finding]:
    """Run every check on every catalog entry; an empty list means that all is well."""
    return [f for names in catalog_names().values() for n in names for f in check_hardware(n)]


def _kind(name_or_path: str | Path) -> _Kind:
    """Tell what a name or a file describes.

    Raises
    ------
    InputError
        A name that the catalog lacks, or an unreadable file.
    """
    if _is_name(name_or_path):
        name = str(name_or_path)
        match = _SUFFIX.fullmatch(name)
        kinds = {n: kind for kind in _SINGULAR for n in _names(kind)}
        kind = kinds.get(name) or (kinds.get(match["base"]) if match else None)
        if kind is None:
            raise _unknown("hardware", name, list(kinds))
        return kind
    data = read_data(Path(name_or_path))
    if not isinstance(data, dict) or "device" in data or "node" in data:
        return "clusters"
    return "memories" if "capacity" in data else "devices"


def _device(name_or_path: str | Path) -> tuple[Device, str]:
    data, where = _read("devices", name_or_path)
    return validate(data, Device, where), where


def _memory(name_or_path: str | Path) -> tuple[Memory, str]:
    data, where = _read("memories", name_or_path)
    return validate(data, Memory, where), where


def _cluster(name_or_path: str | Path) -> tuple[Cluster, str]:
    nodes = None
    if _is_name(name_or_path) and str(name_or_path) not in _names("clusters"):
        match = _SUFFIX.fullmatch(str(name_or_path))
        if match is not None and match["base"] in _names("clusters"):
            name_or_path, nodes = match["base"], int(match["nodes"])
    data, where = _read("clusters", name_or_path)
    cluster = validate(
        _with_memories(_with_device(data, name_or_path), name_or_path), Cluster, where
    )
    return (cluster if nodes is None else _with_nodes(cluster, nodes)), where


def _names(kind: _Kind) -> list[str]:
    entries = files("hwmodels").joinpath("catalog", kind).iterdir()
    return sorted(e.name.removesuffix(".yaml") for e in entries if e.name.endswith(".yaml"))


def _is_name(name_or_path: str | Path) -> bool:
    return not str(name_or_path).endswith((".yaml", ".yml", ".json"))


def _read(kind: _Kind, name_or_path: str | Path) -> tuple[Any, str]:
    if not _is_name(name_or_path):
        return read_data(Path(name_or_path)), str(name_or_path)
    name = str(name_or_path)
    known = _names(kind)
    if name not in known:
        raise _unknown(_SINGULAR[kind], name, known)
    with as_file(files("hwmodels").joinpath("catalog", kind, f"{name}.yaml")) as path:
        return read_data(path), f"catalog/{kind}/{name}.yaml"


def _unknown(what: str, name: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return InputError(f"unknown {what} {name!r} -- {hint} -- or give the path of a .yaml file")


def _with_device(data: Any, cluster_file: str | Path) -> Any:
    """Replace a device named in a cluster's data by the device; paths are relative to the file."""
    if not isinstance(data, dict) or not isinstance(data.get("device"), str):
        return data
    device: str | Path = data["device"]
    if not _is_name(device):
        device = Path(cluster_file).parent / device
    return data | {"device": load_device(device)}


def _with_memories(data: Any, cluster_file: str | Path) -> Any:
    """Replace memories of the node that a cluster's data names; paths are relative to the file."""
    node: Any = data.get("node") if isinstance(data, dict) else None
    memories = node.get("memories") if isinstance(node, dict) else None
    if not isinstance(memories, dict):
        return data
    parts = dict(memories)
    for name, part in memories.items():
        if isinstance(part, str):
            near = part if _is_name(part) else Path(cluster_file).parent / part
            parts[name] = load_memory(near)
    return data | {"node": node | {"memories": parts}}


def _with_nodes(cluster: Cluster, nodes: int) -> Cluster:
    if nodes > 1 and cluster.network is None:
        raise InputError(
            f"{cluster.name}x{nodes}: {cluster.name} has no network between nodes -- "
            "choose a cluster with one, or write a YAML with a network section"
        )
    name = f"{cluster.name}x{nodes}"
    return cluster.model_copy(update={"name": name, "nodes": nodes * cluster.nodes})


def _first(cluster: Cluster, gpus: int) -> Cluster:
    if not 1 <= gpus <= cluster.num_ranks:
        more = f", or {cluster.name}xN for N nodes" if cluster.network is not None else ""
        raise InputError(
            f"{cluster.name}: {gpus} gpus -- it has {cluster.num_ranks}; "
            f"ask for 1 to {cluster.num_ranks}{more}"
        )
    return cluster.model_copy(update={"gpus": gpus})


def _refuse(findings: list[Finding], where: str) -> None:
    errors = [f for f in findings if f.level == "error"]
    if errors:
        head = f"{where}: {len(errors)} error{'s' if len(errors) > 1 else ''}"
        raise InputError("\n  ".join([head, *(f"{f.where}: {f.message}" for f in errors)]))
