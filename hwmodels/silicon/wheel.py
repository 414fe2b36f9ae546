"""Find the measured tables of the wheel ``aiconfigurator-core`` and say where each comes from.

A table lies at ``systems/data/<gpu>/<folder>/<engine>/<version>/<name>.parquet``; of several
versions the newest is used. The wheel is the extra ``silicon``; nothing else needs it.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pandas as pd

from basis import InputError

Engine = Literal["trtllm", "sglang", "vllm"]
ENGINES: tuple[Engine, ...] = ("trtllm", "sglang", "vllm")
GPUS = {
    "a100": "a100_sxm",
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "l40s": "l40s",
    "rtxpro6000-server": "rtx_pro_6000_server",
    "b60": "b60",
}
"""Catalog device of each GPU with tables, and its folder."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where measured rows come from."""

    device: str
    """Catalog name of the device."""
    engine: str
    """Engine or library whose kernels were timed."""
    version: str
    """Its version, as the table states it."""
    path: str
    """The table inside the wheel, or the file of one's own measurements."""
    sha256: str
    package: str
    """Package and version, or who measured."""


def root() -> Path:
    """Return the folder ``systems`` of the installed wheel.

    Raises
    ------
    InputError
        If the wheel is not installed.
    """
    spec = find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        raise InputError(
            "measured tables: the package aiconfigurator-core is not installed -- "
            "pip install 'moeplan[silicon]' -- or price with fitted parameters"
        )
    return Path(spec.origin).parent / "systems"


def versions(device: str, folder: str, engine: str, name: str) -> list[Path]:
    """Return the tables of all versions of one name, oldest first; none where there is none.

    Raises
    ------
    InputError
        If the wheel is not installed or has no tables of the device.
    """
    if device not in GPUS:
        raise InputError(
            f"measured tables: none for device {device!r} -- there are some for {', '.join(GPUS)}"
        )
    found = (root() / "data" / GPUS[device] / folder / engine).glob(f"*/{name}.parquet")
    return sorted(found, key=lambda path: _number(path.parent.name))


def newest(device: str, folder: str, engine: str, name: str) -> Path | None:
    """Return the newest version's table, or None."""
    return next(iter(reversed(versions(device, folder, engine, name))), None)


def read(path: Path) -> pd.DataFrame:
    """Return the rows of a table, strings as plain objects."""
    return pd.read_parquet(path)


def source(device: str, engine: str, path: Path) -> Source:
    """Return the provenance of a table."""
    return Source(
        device=device,
        engine=engine,
        version=path.parent.name,
        path=path.relative_to(root()).as_posix(),
        sha256=_sha256(path),
        package=f"aiconfigurator-core {installed_version('aiconfigurator-core')}",
    )


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _number(text: str) -> list[int]:
    """Order versions: digits as numbers, a release behind its candidates."""
    digits = "".join(c if c.isdigit() else " " for c in text)
    return [int(d) for d in digits.split()]
