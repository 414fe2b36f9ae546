"""Routing that vLLM returns with its answers (``enable_return_routed_experts``), three layouts.

A source is a JSON or JSONL file of saved answers: of the HTTP server (``choices``), or of the
offline API written field by field (``outputs``: request_id, prompt_token_ids,
outputs[].token_ids, outputs[].routed_experts). Ids are logical; every layout needs the model.

``vllm-0.14``
    ``outputs[].routed_experts`` ``[T - 1, all layers, K]``, dense layers 0. Also one npy (that
    array alone) or npz (arrays routed_experts and, where known, prompt_token_ids and
    output_token_ids) per request, or a folder of them in the order of their names.
``vllm-0.21``
    ``prompt_routed_experts`` ``[prompt, MoE layers, K]`` of the answer, and routed_experts of each
    choice for what it generated, nested lists.
``vllm-0.33``
    routed_experts of each choice: base64 of an npy ``[T - 1 - start, all layers, K]`` of uint8 or
    uint16. A start (``routed_experts_prompt_start`` of the request) other than 0 must be saved in
    the answer under that name.

T counts prompt and generated tokens. Prompt lengths come from prompt_token_ids, or usage. Rows of
zeros in all layers were never captured and are dropped; so are the prompt rows of all choices but
the first, which the engine computed once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.importers.base import Asked, Format, Tokens
from traces.importers.files import npy_kind, npz_names, open_npy, parse_npy, read_npz
from traces.importers.layers import Axis
from traces.importers.responses import (
    Answer,
    Parse,
    answer_sequences,
    decoded,
    first_answer,
    whole_number,
)
from traces.importers.rows import Sequence, sequence_tokens

_NPY_IN_BASE64 = "k05VTVBZ"
_MOST_ARRAY = 2**30


class Vllm014:
    """All hidden layers, plain arrays of the offline API."""

    name = "vllm-0.14"
    title = "vLLM 0.14 routed_experts: npy or npz per request, or outputs as JSON(L)"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether it is an array file of ids, a folder of them, or JSON with one list per output.

        An npz with a request_id is left to the format of that layout; name this one to read it.
        """
        if source.is_dir():
            files = _array_files(source)
            return bool(files) and len(files) == len(_visible(source)) and _is_array(files[0])
        if head.startswith((b"\x93NUMPY", b"PK")):
            return _is_array(source)
        answer = first_answer(source, head) or {}
        outputs = answer.get("outputs")
        return "prompt_routed_experts" not in answer and isinstance(_routing(outputs), list)

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read the arrays, or the saved outputs."""
        if source.is_dir() or source.suffix in (".npy", ".npz"):
            files = _array_files(source) if source.is_dir() else [source]
            if not files:
                raise InputError(f"{source}: no npy or npz in it -- give the folder of the arrays")
            arrays = map(_of_array, files)
            return sequence_tokens(arrays, source, asked, "all", self.name)
        return _answered(source, asked, "all", self.name, _listed)


class Vllm021:
    """MoE layers only, nested lists, prompt and generated tokens apart."""

    name = "vllm-0.21"
    title = "vLLM 0.21 answers: prompt_routed_experts and choices[].routed_experts, JSON(L)"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the first answer has nested lists, the prompt's apart."""
        answer = first_answer(source, head) or {}
        apart = isinstance(answer.get("prompt_routed_experts"), list)
        return apart or isinstance(_routing(answer.get("choices")), list)

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read the saved answers."""
        return _answered(source, asked, "moe", self.name, _split)


class Vllm033:
    """All hidden layers (or the MoE layers, as the documentation has it), base64 of npy."""

    name = "vllm-0.33"
    title = "vLLM 0.33 answers: choices[].routed_experts as base64 of npy, JSON(L)"

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the first answer has an npy in base64."""
        text = _routing((first_answer(source, head) or {}).get("choices"))
        return isinstance(text, str) and text.startswith(_NPY_IN_BASE64)

    def read(self, source: Path, asked: Asked) -> Tokens:
        """Read the saved answers."""
        return _answered(source, asked, "either", self.name, _encoded)


FORMATS_VLLM: tuple[Format, ...] = (Vllm014(), Vllm021(), Vllm033())


def _answered(source: Path, asked: Asked, axis: Axis, name: str, parse: Parse) -> Tokens:
    notes: list[str] = []
    sequences = answer_sequences(source, parse, notes)
    return sequence_tokens(sequences, source, asked, axis, name, notes)


def _routing(answers: Any) -> Any:
    """Return the routing of the first of an answer's choices or outputs, if there is one."""
    if isinstance(answers, list) and answers and isinstance(answers[0], dict):
        return answers[0].get("routed_experts")
    return None


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _array_files(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.suffix in (".npy", ".npz")]


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(2**14)
    if head.startswith(b"\x93NUMPY"):
        return npy_kind(head) in ((3, "i"), (3, "u"))
    names = npz_names(path)
    return "routed_experts" in names and "request_id" not in names


def _of_array(path: Path) -> Sequence:
    if path.suffix == ".npy":
        return Sequence(where=str(path), ids=_three(open_npy(path), str(path)))
    names = {"routed_experts", "prompt_token_ids", "output_token_ids"}
    arrays = read_npz(path, names, _MOST_ARRAY)
    if "routed_experts" not in arrays:
        raise InputError(f"{path}: no array routed_experts in it -- save it under that name")
    prompt, output = arrays.get("prompt_token_ids"), arrays.get("output_token_ids")
    return Sequence(
        where=str(path),
        ids=_three(arrays["routed_experts"], str(path)),
        prompt=None if prompt is None else prompt.size,
        output=None if output is None else output.size,
    )


def _listed(where: str, answer: Answer) -> Iterator[Sequence | None]:
    prompt = _prompt_length(answer, {}, where)
    for place, output in _choices(answer, where):
        ids = output.get("routed_experts")
        if ids is None:
            yield None
            continue
        yield Sequence(
            where=where,
            ids=_three(ids, where),
            prompt=prompt,
            output=_output_length(answer, output, where),
            again=place > 0,
        )


def _split(where: str, answer: Answer) -> Iterator[Sequence | None]:
    prompt_rows: Any = answer.get("prompt_routed_experts")
    for place, choice in _choices(answer, where):
        prompt = _prompt_length(answer, choice, where)
        parts = [prompt_rows if place == 0 else None, choice.get("routed_experts")]
        arrays = [_three(part, where) for part in parts if part]  # neither null nor empty
        if not arrays:
            yield None
            continue
        _check_alike(arrays, where)
        if prompt is None and not prompt_rows:
            raise InputError(
                f"{where}: neither the prompt's rows nor its length -- save usage or "
                "prompt_token_ids with the answer"
            )
        prompt = len(prompt_rows) if prompt is None else prompt
        yield Sequence(
            where=where,
            ids=np.concatenate(arrays),
            start=0 if parts[0] else prompt,
            prompt=prompt,
            output=_output_length(answer, choice, where),
        )


def _check_alike(arrays: list[NDArray[Any]], where: str) -> None:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        raise InputError(
            f"{where}: the prompt's rows are {list(arrays[0].shape[1:])}, those of the answer "
            f"{list(arrays[1].shape[1:])} -- the same layers and experts per token in both"
        )


def _encoded(where: str, answer: Answer) -> Iterator[Sequence | None]:
    for place, choice in _choices(answer, where):
        text = choice.get("routed_experts")
        if text is None:
            yield None
            continue
        start = choice.get(
            "routed_experts_prompt_start", answer.get("routed_experts_prompt_start", 0)
        )
        here = f"{where}: routed_experts"
        yield Sequence(
            where=where,
            ids=_three(parse_npy(decoded(text, here), here), where),
            start=whole_number(start, f"{where}: routed_experts_prompt_start"),
            prompt=_prompt_length(answer, choice, where),
            output=_output_length(answer, choice, where),
            again=place > 0,
        )


def _choices(answer: Answer, where: str) -> Iterator[tuple[int, Answer]]:
    found = answer.get("choices", answer.get("outputs"))
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InputError(
            f"{where}: neither choices nor outputs in it -- save each answer whole, as the server "
            "sent it"
        )
    return iter(enumerate(found))


def _prompt_length(answer: Answer, choice: Answer, where: str) -> int | None:
    ids = answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
    if isinstance(ids, list):
        return len(ids)
    return _used(answer, "prompt_tokens", where)


def _output_length(answer: Answer, choice: Answer, where: str) -> int | None:
    if isinstance(choice.get("token_ids"), list):
        return len(choice["token_ids"])
    choices: Any = answer.get("choices", answer.get("outputs"))
    alone = len(choices) == 1  # else usage is their sum
    return _used(answer, "completion_tokens", where) if alone else None


def _used(answer: Answer, name: str, where: str) -> int | None:
    usage = answer.get("usage")
    value = usage.get(name) if isinstance(usage, dict) else None
    return None if value is None else whole_number(value, f"{where}: usage.{name}")


def _three(value: Any, where: str) -> NDArray[Any]:
    """Return nested lists or an array as ``[T, layers, K]`` integers."""
    if isinstance(value, str):
        raise InputError(
            f"{where}: routed_experts is text -- nested lists in this layout; name another format"
        )
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):
        ids = np.empty(0, object)
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise InputError(
            f"{where}: routed_experts is {ids.dtype}{list(ids.shape)} -- integers [tokens, layers, "
            "top_k], every token with all layers and every layer with all experts -- cut off? save "
            "it again"
        )
    return ids
