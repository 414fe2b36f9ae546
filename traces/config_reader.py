"""A Hugging Face configuration as its readers ask for it: aliases, nested text models, problems.

Every missing or wrong key is gathered before anything is refused, so that one message names all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from basis.errors import InputError

Fields = dict[str, Any]
"""Fields of a `ModelSpec`, or of a part of it."""

MOST_LAYERS = 4096
_TEXT_MODELS = (
    ("text_config",),
    ("llm_config",),
    ("language_config",),
    ("thinker_config", "text_config"),
)
_SHARED = (
    "quantization_config", "torch_dtype", "dtype", "tie_word_embeddings", "expert_dtype", "name",
    "_name_or_path",
)  # fmt: skip


def text_model(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[object]]:
    """Return the configuration of the language model, and the model types that name it.

    A multimodal configuration nests it; what concerns the whole checkpoint may stand outside.
    """
    for path in _TEXT_MODELS:
        inner: Any = data
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            outer = {key: data[key] for key in _SHARED if data.get(key) is not None}
            own = {key: value for key, value in inner.items() if value is not None}
            return outer | own, [inner.get("model_type"), data.get("model_type")]
    return dict(data), [data.get("model_type")]


class Config:
    """A configuration with aliases; gathers every missing or wrong key before it complains."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where
        self.problems: list[str] = []
        self._prefix = ""

    def get(self, *aliases: str) -> Any:
        """Return the first alias that is present and not null, else None."""
        return next((self.data[a] for a in aliases if self.data.get(a) is not None), None)

    def inner(self, key: str) -> "Config":
        """Return a mapping inside this one, empty without it; its problems are told here."""
        given = self.get(key)
        if given is not None and not isinstance(given, Mapping):
            self.problem(f"{key}: {given!r} -- a mapping")
        found = Config(given if isinstance(given, Mapping) else {}, self.where)
        found.problems, found._prefix = self.problems, f"{self._prefix}{key}."
        return found

    def flag(self, *aliases: str, default: bool = False) -> bool:
        """Return whether the first alias that is present is true."""
        value = self.get(*aliases)
        return default if value is None else bool(value)

    def count(
        self, *aliases: str, default: int | None = None, least: int = 1, lists: bool = False
    ) -> int:
        """Return a whole number; without ``default`` the key is required.

        With ``lists``, the largest of a list that has one number for each layer.
        """
        value = self.get(*aliases)
        if value is None:
            if default is None:
                self.problem(f"{' or '.join(aliases)}: missing -- this key is required")
            return least if default is None else default
        if lists and isinstance(value, list) and value and all(_whole(v, least) for v in value):
            return int(max(value))
        if not _whole(value, least):
            key = next(a for a in aliases if self.data.get(a) is not None)
            self.problem(f"{key}: {value!r} -- a whole number of at least {least}")
            return least
        return int(value)

    def layers(self, *aliases: str, default: int | None = None) -> int:
        """Return a number of layers, of which lists are made: at most `MOST_LAYERS`."""
        found = self.count(*aliases, default=default)
        if found > MOST_LAYERS:
            self.problem(f"{aliases[0]}: {found} layers -- at most {MOST_LAYERS}")
        return min(found, MOST_LAYERS)

    def per_layer(self, key: str, layers: int) -> list[Any] | None:
        """Return a list's entries of the model's layers, None without it.

        Entries after the last layer are those of multi-token prediction.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Sequence) or len(value) < layers:
            self.problem(f"{key}: must name all {layers} layers")
            return None
        return list(value[:layers])

    def indices(self, key: str, layers: int, first: int = 0) -> list[int]:
        """Return a list of layer indices as they count from 0; empty without it."""
        value = self.get(key)
        wrong = not isinstance(value, list) or not all(_whole(v, first) for v in value)
        if value is not None and wrong:
            self.problem(f"{key}: {value!r} -- a list of layer indices")
        return [] if value is None or wrong else [v - first for v in value if v - first < layers]

    def problem(self, text: str) -> None:
        """Remember that something is missing or wrong."""
        self.problems.append(self._prefix + text)

    def refuse(self, key: str, why: str) -> None:
        """Remember a problem where a key is present and neither null, false nor 0."""
        if self.get(key):
            self.problem(f"{key}: {self.get(key)!r} -- {why}")

    def finish(self) -> None:
        """Raise one `InputError` with all problems, if there are any."""
        if self.problems:
            head = f"{self.where}: cannot read the geometry"
            raise InputError("\n  ".join([head, *dict.fromkeys(self.problems)]))


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
