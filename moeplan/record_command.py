"""`moeplan trace record`: run prompts through a Hugging Face model and record its routing.

The model is a local folder or a name on the hub; its own code is never run. Prompts are padded on
the left and continued greedily, so that the same prompts give the same trace.
"""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basis.errors import InputError
from basis.files import check_target, refuse_same
from moeplan import console
from traces.parquet_columns import TraceFile
from traces.record_model import TraceOrigin
from traces.record_model import record as record_model

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Number formats that a model can be loaded in; auto is that of its files."""
_NO_DOMAIN = "text"
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "use_cache": True,
    "cache_implementation": "dynamic",
}
"""Whatever the model's own settings are."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and the kind of text it is."""

    text: str
    domain: str


def record(options: argparse.Namespace) -> dict[str, Any]:
    """Record prompts and write the trace.

    Parameters
    ----------
    options
        ``model``, ``prompts``, ``out``, ``max_new_tokens``, ``batch``, ``candidates``,
        ``domain_key``, ``device``, ``dtype`` and ``json`` of the command line.

    Raises
    ------
    InputError
        When an input is bad, a library is missing, or the model cannot be recorded.
    """
    for name in ("batch", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} -- at least 1")
    check_target(options.out)
    prompts = read_prompts(options.prompts, options.domain_key)
    refuse_same([options.out], [options.prompts])
    screen = console.of(options)
    with console.progress(screen) as tell:
        tell(f"load {options.model}")
        model, encode = _load(options.model, options.device, options.dtype)
        _run(model, encode, prompts, options, tell)
    with TraceFile(options.out, weights=False, candidates=False) as file:
        rows, meta = file.num_rows, file.meta
    screen.print(
        f"wrote {options.out}: {rows:,} tokens of {len(prompts):,} requests, "
        f"{meta.num_layers} MoE layers x {meta.num_experts} experts, top-{meta.top_k}"
    )
    return {
        "out": str(options.out),
        "model": meta.model,
        "requests": len(prompts),
        "tokens": rows,
        "moe_layers": meta.num_layers,
        "num_experts": meta.num_experts,
        "top_k": meta.top_k,
        "candidates": options.candidates,
    }


def read_prompts(path: Path, domain_key: str) -> list[Prompt]:
    """Read prompts: JSON objects with a ``prompt`` where the name ends in .jsonl, else lines.

    Parameters
    ----------
    path
        UTF-8 text; empty lines are left out.
    domain_key
        Key of the kind of text in the JSON objects; those without it are all one kind.

    Raises
    ------
    InputError
        When the file is missing, empty or not UTF-8, or lines are bad; names all of them.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: not readable as UTF-8 text ({why}) -- give a file with one prompt a line"
        ) from error
    read = _from_json if path.suffix == ".jsonl" else _from_text
    found: list[Prompt] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt = read(line, domain_key)
            if isinstance(prompt, Prompt):
                found.append(prompt)
            else:
                problems.append(f"line {number}: {prompt}")
    if problems:
        raise InputError(
            f"{path}: {'; '.join(problems[:8])}{'; ...' if len(problems) > 8 else ''} -- "
            f'{len(problems)} of {len(lines)} lines are bad; each is {{"prompt": text}}, with '
            f'"{domain_key}": text if it is known'
        )
    if not found:
        raise InputError(f"{path}: no prompts (0 lines with text) -- at least one is needed")
    return found


def _from_text(line: str, _: str) -> Prompt | str:
    return Prompt(text=line, domain=_NO_DOMAIN)


def _from_json(line: str, domain_key: str) -> Prompt | str:
    """Return the prompt, or what is wrong with the line."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(data, dict):
        return f"{type(data).__name__}, not an object"
    text, domain = data.get("prompt"), data.get(domain_key, _NO_DOMAIN)
    if not isinstance(text, str) or not text.strip():
        return f"prompt is {text!r:.40}, not a text"
    if not isinstance(domain, str) or not domain:
        return f"{domain_key} is {domain!r:.40}, not a text"
    return Prompt(text=text, domain=domain)


Encode = Callable[[str], list[int]]
"""From a text to the ids of its tokens."""


def _load(name: str, device: str, dtype: str) -> tuple[Any, Encode]:
    """Load model and tokenizer.

    Raises
    ------
    InputError
        When a library is missing, there is no such device, or nothing of this name can be loaded,
        whatever a damaged file makes the libraries raise.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise InputError(
            f"recording needs torch and transformers ({error}) -- pip install 'moeplan[record]'"
        ) from error
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda -- torch sees no GPU here -- use cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        model = model.to(device).eval()
    except Exception as error:
        raise InputError(
            f"{name}: not loaded ({_short(error)}) -- give a folder with a whole causal "
            "language model and its tokenizer that fit in memory, or its name on the hub"
        ) from error
    return model, lambda text: tokenizer(text)["input_ids"]


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error) or repr(error), 200, placeholder=" ...")


def _run(
    model: Any,
    encode: Encode,
    prompts: list[Prompt],
    options: argparse.Namespace,
    tell: Callable[[str], None],
) -> None:
    """Run the prompts, a batch at a time.

    Raises
    ------
    InputError
        When the model cannot be recorded, or does not run: damaged, or out of memory.
    """
    origin = TraceOrigin(
        source=f"prompts of {options.prompts.name}, continued greedily by at most "
        f"{options.max_new_tokens} tokens"
    )
    domains = list(dict.fromkeys(prompt.domain for prompt in prompts))
    with record_model(
        model, options.out, domain=domains, candidates=options.candidates, origin=origin
    ) as recording:
        for group in _groups(prompts, options.batch):
            tell(
                f"{recording.num_requests} of {len(prompts)} prompts, "
                f"{recording.num_tokens:,} tokens"
            )
            recording.next_domains = [prompt.domain for prompt in group]
            ids, mask = _padded([encode(prompt.text) for prompt in group], model.device)
            try:
                model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=options.max_new_tokens,
                    **_GREEDY,
                )
            except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"{options.model}: does not run ({_short(error)}) -- give a whole model; "
                    "where memory ran out, a smaller --batch"
                ) from error


def _groups(prompts: list[Prompt], batch: int) -> Iterator[list[Prompt]]:
    for first in range(0, len(prompts), batch):
        yield prompts[first : first + batch]


def _padded(texts: list[list[int]], device: Any) -> tuple[Any, Any]:
    """Return ids and mask ``[B, S]``, padded on the left; what pads is masked, so any id does."""
    import torch

    if not all(texts):
        raise InputError("a prompt of 0 tokens -- each needs one at least -- look at the tokenizer")
    width = max(map(len, texts))
    ids = [[0] * (width - len(text)) + text for text in texts]
    mask = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
