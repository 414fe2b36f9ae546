"""Write fitted cost models as plain data for YAML: four digits, quantities with their unit."""

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from basis import Bytes, BytesPerSecond, Seconds, format_quantity

_DIGITS = 4
_UNITS = {
    id(get_args(kind)[1]): unit
    for kind, unit in ((Seconds, "s"), (Bytes, "B"), (BytesPerSecond, "B/s"))
}


def plain(value: Any) -> Any:
    """Return a fitted model as mappings, lists, numbers and text; defaults are left out."""
    if isinstance(value, BaseModel):
        kept = {}
        for name, field in type(value).model_fields.items():
            entry = getattr(value, name)
            if entry == field.default and name != "model":
                continue
            unit = next((_UNITS[id(m)] for m in field.metadata if id(m) in _UNITS), None)
            kept[name] = plain(entry) if unit is None else format_quantity(entry, unit, _DIGITS)
        return kept
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return value


def write_yaml(data: BaseModel, path: Path, head: str) -> None:
    """Write a model as YAML under a comment that says what made it."""
    text = yaml.safe_dump(plain(data), sort_keys=False, width=110, default_flow_style=None)
    path.write_text(f"# {head}\n{text}", encoding="utf-8")
