"""The memories with units of the catalog (catalog/pim/*.yaml), and those of a user's own files.

A file is read, validated and checked as a whole; names and citations are looked up here.
"""

from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path

from basis import InputError, load
from hwmodels.figures import Figure
from hwmodels.pim.description import PimMemory, Sourced


def load_pim(name_or_path: str | Path) -> PimMemory:
    """Load a memory by catalog name, or from the path of a YAML file.

    Raises
    ------
    InputError
        Unknown name, unreadable file or invalid content.
    """
    if str(name_or_path).endswith((".yaml", ".yml", ".json")):
        return load(Path(name_or_path), PimMemory)
    known = pim_names()
    if name_or_path not in known:
        raise InputError(
            f"unknown memory {str(name_or_path)!r} -- known are {', '.join(known)} -- or give the "
            "path of a .yaml file"
        )
    with as_file(files("hwmodels").joinpath("catalog", "pim", f"{name_or_path}.yaml")) as path:
        return load(path, PimMemory)


def pim_names() -> list[str]:
    """Names of the memories in the catalog."""
    entries = files("hwmodels").joinpath("catalog", "pim").iterdir()
    return sorted(e.name.removesuffix(".yaml") for e in entries if e.name.endswith(".yaml"))


def uncited(memory: PimMemory) -> Mapping[str, str]:
    """Return the blocks whose source key the file does not explain; a citation has blanks."""
    blocks: dict[str, Sourced | Figure[float]] = {
        "organisation": memory.organisation,
        "timings": memory.timings,
        "energies": memory.energies,
        **{f"units.{name}": units for name, units in memory.units.items()},
        **{f"units.{name}.launch": units.launch for name, units in memory.units.items()},
    }
    if memory.power_limit is not None:
        blocks["power_limit"] = memory.power_limit
    return {
        name: block.source
        for name, block in blocks.items()
        if " " not in block.source and block.source not in memory.sources
    }
