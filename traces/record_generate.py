"""What a call of Hugging Face's ``generate`` does to the rows of a batch, known before it runs.

Sampling and greedy decoding keep each row a request from its prompt to its end. Beam search
reorders rows, assisted decoding and guidance run passes that are no part of a request: they are
refused. A row whose text has ended is fed padding while others go on, so the tokens that end a text
must be known.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from basis.errors import InputError

if TYPE_CHECKING:
    from torch import nn

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "beams reorder the rows of a batch"),
    "assistant_model": ((None,), "a draft's passes hold tokens that are thrown away"),
    "prompt_lookup_num_tokens": ((None,), "a draft's passes hold tokens that are thrown away"),
    "assistant_early_exit": ((None,), "a draft's passes hold tokens that are thrown away"),
    "use_mtp": ((None, False), "a draft's passes hold tokens that are thrown away"),
    "guidance_scale": ((None, 1, 1.0), "guidance runs each text a second time"),
    "custom_generate": ((None,), "it may run what it likes"),
    "use_cache": ((None, True), "each pass would hold the whole text again"),
    "cache_implementation": (
        (None, "dynamic", "offloaded", "quantized"),
        "its masks do not tell padding",
    ),
}
"""Options of ``generate``: values that can be recorded, and why others cannot."""
_ENDINGS = ("stop_strings", "stopping_criteria")


@dataclass(kw_only=True, eq=False)
class Generating:
    """One call of ``generate``."""

    prompt_columns: int
    """Tokens of a row of the prompts, padding included."""
    end_tokens: frozenset[int]
    """Ids that end a text."""
    begun: bool = False
    """Whether its first pass was seen."""


@contextmanager
def watch_generate(model: "nn.Module", tell: Callable[[Generating | None], None]) -> Iterator[None]:
    """Look at each call of ``model.generate`` while the block runs.

    Parameters
    ----------
    model
        A model; without ``generate``, nothing happens.
    tell
        Called before each call, and with None after it, whether it went well or not.
    """
    generate = getattr(model, "generate", None)
    if generate is None:
        yield
        return

    def watched(*args: Any, **kwargs: Any) -> Any:
        tell(_described(model, args, kwargs))
        try:
            return generate(*args, **kwargs)
        finally:
            tell(None)

    own = vars(model)
    before = own.get("generate")
    own["generate"] = watched
    try:
        yield
    finally:
        del own["generate"]  # the class's shows again
        if before is not None:
            own["generate"] = before


def _described(model: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generating:
    """Return what matters of a call.

    Raises
    ------
    InputError
        When its passes cannot be attributed to requests; names all reasons.
    """
    call = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
    own = getattr(model, "generation_config", None)
    asked = call.get("generation_config") or own

    def option(name: str) -> Any:
        value = call.get(name, getattr(asked, name, None))
        return getattr(own, name, None) if value is None else value

    problems = [
        f"{name}={_short(option(name))}: {why}"
        for name, (fine, why) in _REFUSED.items()
        if option(name) not in fine
    ]
    given = (call.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    prompt = next((tensor for tensor in given if tensor is not None), None)
    if prompt is not None and prompt.shape[0] * (option("num_return_sequences") or 1) > 1:
        problems += [
            f"{name}: of several rows, which have ended is not seen"
            for name in _ENDINGS
            if option(name)
        ]
    if problems:
        raise InputError(
            f"generate() with {'; '.join(problems)} -- allowed are sampling and greedy decoding "
            "with a dynamic cache -- leave this out to record"
        )
    ends = option("eos_token_id")
    if hasattr(ends, "tolist"):
        ends = ends.tolist()
    return Generating(
        prompt_columns=0 if prompt is None else prompt.shape[1],
        end_tokens=frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends),
    )


def _short(value: object) -> str:
    return repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
