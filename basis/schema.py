"""The strict base of every declarative model, and the one way to read a YAML or JSON file.

A misspelt key is an error with the nearest valid key; all errors of a file are reported
at once, each with its path in the file and its value.
"""

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from basis.errors import InputError


class Strict(BaseModel):
    """Frozen, refuses unknown keys; the docstring under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


T = TypeVar("T", bound=BaseModel)
_MAX_TEXT_BYTES = 64 * 2**20


def read_data(path: Path) -> Any:
    """Read a YAML or JSON file of at most 64 MiB with a safe loader.

    Raises
    ------
    InputError
        If the file is missing, too large, or not valid YAML or JSON.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file -- give the path of a YAML or JSON file")
    if path.stat().st_size > _MAX_TEXT_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes -- at most {_MAX_TEXT_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not valid YAML or JSON -- {error}") from error


def validate(data: object, model: type[T], where: str) -> T:
    """Build ``model`` from plain data.

    Raises
    ------
    InputError
        Lists every error of ``data`` with path, value and the nearest valid key.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a mapping, got {type(data).__name__}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(e, model) for e in error.errors()]
        head = f"{where}: {len(lines)} error{'s' if len(lines) > 1 else ''}"
        raise InputError("\n  ".join([head, *lines])) from None


def load(path: Path, model: type[T]) -> T:
    """Read and validate one file. See `read_data` and `validate` for the errors."""
    return validate(read_data(path), model, str(path))


def _explain(error: Any, model: type[BaseModel]) -> str:
    fields, steps = _fields_at(model, error["loc"])
    path = ".".join(str(p) for p in steps) or "(top)"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(fields))}"
        return f"{path}: unknown key -- {hint}"
    if error["type"] == "missing":
        return f"{path}: missing -- this key is required"
    if error["type"] == "union_tag_invalid":
        return f"{path}: no kind {error['ctx']['tag']!r} -- known: {error['ctx']['expected_tags']}"
    if "value_error" in error["type"]:
        return f"{path}: {message}"
    return f"{path}: {message} (got {error['input']!r})"


def _fields_at(
    model: type[BaseModel], path: tuple[int | str, ...]
) -> tuple[list[str], list[int | str]]:
    """Return the valid keys beside the last step of ``path``, and the path as the file has it.

    Where one of several models may stand, pydantic puts the kind that was chosen into the path.
    """
    choices: list[type[BaseModel]] = []
    steps: list[int | str] = []
    keys = 0  # steps into the mappings and lists of a field, before the model that it holds
    for step in path[:-1]:
        if keys:
            keys -= 1
        elif isinstance(step, str) and step in model.model_fields:
            annotation = model.model_fields[step].annotation
            choices, keys = _models_in(annotation), _depth(annotation)
            if len(choices) == 1:
                model = choices[0]
        elif kind := [m for m in choices if any(f.default == step for f in _fields(m))]:
            model, choices = kind[0], []
            continue
        steps.append(step)
    return list(model.model_fields), [*steps, *path[-1:]]


def _fields(model: type[BaseModel]) -> list[FieldInfo]:
    return list(model.model_fields.values())


def _depth(annotation: Any) -> int:
    """Count the mappings and lists around what an annotation holds."""
    inner = max((_depth(part) for part in get_args(annotation)), default=0)
    return inner + (get_origin(annotation) in (dict, list, tuple))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in _models_in(part)]
