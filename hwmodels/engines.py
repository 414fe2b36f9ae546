"""Put the kernels and collectives of one serving engine into a cluster.

Kernels of different engines differ by tens of percent on the same GPU, so fitted parameters
belong to an engine. A fitted file holds them for one device; `priced_by` returns the cluster
with them in the place of the engine-neutral ones, and everything that prices stays as it is.
"""

from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from pydantic import Field

from basis import InputError, Strict, read_data, validate
from hwmodels.device import Kernel, Processor
from hwmodels.kernels.models import KernelModel
from hwmodels.kernels.transfers import TransferModel
from hwmodels.link import Link, Standard, Transfer
from hwmodels.topology import Cluster

PriceMode = Literal["fitted", "measured", "transfer", "auto"]
ENGINES = ("trtllm", "sglang", "vllm")
TRANSFER = "transfer"
"""Name of the fitted file that holds parameters of all devices together."""


class EngineFits(Strict):
    """What was fitted for one engine on one device."""

    version: str
    """Version of the engine whose kernels were measured."""
    kernels: dict[Kernel, dict[str, KernelModel]]
    """Cost models by kernel and format."""
    interconnect: dict[Transfer, TransferModel] = Field(default_factory=dict)
    """Collectives and exchanges inside a node."""
    network: dict[Transfer, TransferModel] = Field(default_factory=dict)
    """The same across nodes."""
    by_link: dict[Standard, dict[Transfer, TransferModel]] = Field(default_factory=dict)
    """Inside a node, by the standard of its links; where fits are for any device."""


class FittedFile(Strict):
    """Fitted parameters of one device, written by ``moeplan calibrate --from silicon``."""

    device: str
    """Catalog name of the device."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Tables by the short key that the models use."""
    engines: dict[str, EngineFits]
    """Fits by engine."""


def priced_by(cluster: Cluster, engine: str | None, mode: PriceMode = "fitted") -> Cluster:
    """Return the cluster with the kernels and collectives of an engine.

    Without an engine the cluster's own, engine-neutral parameters stay.

    Parameters
    ----------
    cluster : Cluster
        As loaded.
    engine : str, optional
        trtllm, sglang or vllm.
    mode : {"fitted", "measured", "transfer", "auto"}
        What prices its kernels; see docs/design/0004-engine-fits.md.

    Raises
    ------
    InputError
        If nothing is known of this engine on this device in that mode, or a mode without engine.
    """
    if engine is None:
        if mode != "fitted":
            raise InputError(
                f"prices: {mode!r} without an engine -- tables and transfers belong to an engine "
                f"-- add engine: {' or '.join(ENGINES)}"
            )
        return cluster
    name = cluster.device.name
    known = engine in engines_of(name)
    if mode == "transfer" or (mode == "auto" and not known):
        return _with_fits(cluster, TRANSFER, engine)
    if known or mode == "fitted":
        cluster = _with_fits(cluster, name, engine)
    if mode == "fitted":
        return cluster
    return _with_tables(cluster, engine, strict=mode == "measured")


def _with_tables(cluster: Cluster, engine: str, *, strict: bool) -> Cluster:
    """Put measured tables in front of the first processor's cost models."""
    from hwmodels.silicon.mode import measured_processor  # readers and the wheel only on demand

    (first, on), *others = cluster.device.processors.items()
    tabled = measured_processor(on, cluster.device.name, engine, strict=strict)
    device = cluster.device.model_copy(update={"processors": {first: tabled, **dict(others)}})
    return cluster.model_copy(update={"device": device})


def fitted_path(device: str) -> Path | None:
    """Return the fitted file of a catalog device, or None."""
    entry = files("hwmodels").joinpath("catalog", "fitted", f"{device}.yaml")
    with as_file(entry) as path:
        return path if path.is_file() else None


@cache
def load_fitted(path: Path) -> FittedFile:
    """Read and check a fitted file.

    Raises
    ------
    InputError
        Unreadable file or wrong content.
    """
    return validate(read_data(path), FittedFile, str(path))


def engines_of(device: str) -> dict[str, EngineFits]:
    """Return the engines fitted for a catalog device; none if nobody has fitted it."""
    return _fits_of(device).engines


def _fits_of(device: str) -> FittedFile:
    path = fitted_path(device)
    return FittedFile(device=device, engines={}) if path is None else load_fitted(path)


def _with_fits(cluster: Cluster, fitted: str, engine: str) -> Cluster:
    """Put an engine's fits, of one device or of all, in the place of what the cluster has."""
    file = _fits_of(fitted)
    known = file.engines
    if engine not in known:
        have = f"fitted are {', '.join(known)}" if known else "no engine is fitted for it"
        raise InputError(
            f"engine: {engine!r} on device {fitted} -- {have} -- leave the engine out to take "
            "engine-neutral parameters, or set prices: transfer"
        )
    fits = known[engine]
    first, *others = cluster.device.processors.items()
    processors = {first[0]: _with_kernels(first[1], fits), **dict(others)}
    sources = cluster.device.sources | file.sources
    device = cluster.device.model_copy(update={"processors": processors, "sources": sources})
    port = cluster.node.interconnect
    inside = fits.interconnect if port is None else fits.by_link.get(port.standard, {})
    port = _with_costs(port, inside | fits.interconnect)
    return cluster.model_copy(
        update={
            "device": device,
            "node": cluster.node.model_copy(update={"interconnect": port}),
            "network": _with_costs(cluster.network, fits.network),
        }
    )


def _with_kernels(processor: Processor, fits: EngineFits) -> Processor:
    kernels = dict(processor.kernels)
    for name, by_dtype in fits.kernels.items():
        served = {dtype: cost.in_service() for dtype, cost in by_dtype.items()}
        kernels[name] = kernels.get(name, {}) | served
    return processor.model_copy(update={"kernels": kernels})


def _with_costs(link: Link | None, costs: dict[Transfer, TransferModel]) -> Link | None:
    return None if link is None else link.model_copy(update={"costs": {**link.costs, **costs}})
