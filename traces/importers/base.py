"""What an importer is: it recognises a file, and reads it into a routing trace or into loads.

Sources are not trusted: sizes are compared with what is there before anything is allocated, and
nothing is unpickled. Rows that are no real tokens (warm-up, padding) are dropped and counted by
reason; what looks odd but can be used is a note. Counts are rows, one per token, unless stated.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from traces.counts_trace import CountsTrace
from traces.meta import TraceMeta
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace

LFS_HEAD = b"version https://git-lfs.github.com/spec/"
MOST_BYTES = 8 * 2**30
"""Bytes that one array or document of a source may take in memory."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user says of the source besides its path."""

    model: ModelSpec | None = None
    """Geometry: which layers are MoE, experts, top-k. Formats that state none of it need it."""
    domain: str = "imported"
    """Kind of text of all rows, where the source names none."""
    licence: str = "not stated"


@dataclass(kw_only=True)
class Tokens:
    """A routing trace on its way: chunks to be written, and what was left out so far."""

    meta: TraceMeta
    domains: tuple[str, ...]
    weights: bool
    """Whether the chunks carry router weights."""
    chunks: Iterator[RoutingTrace]
    """Rows with unique (request, position), positions of a request ascending."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out so far, by reason; complete once ``chunks`` is used up."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of the result; complete once ``chunks`` is used up."""


@dataclass(kw_only=True)
class Loads:
    """Loads without tokens."""

    counts: CountsTrace
    dropped: Counter[str] = field(default_factory=Counter)
    """Steps or rows left out, by reason."""
    notes: list[str] = field(default_factory=list)


class Format(Protocol):
    """One layout of one tool; modules of this package have one instance of each."""

    @property
    def name(self) -> str:
        """As ``--format`` takes it: ``vllm-0.33``, ``sglang-per-token``, ``imatrix``."""

    @property
    def title(self) -> str:
        """One line for people."""

    def matches(self, source: Path, head: bytes) -> bool:
        """Whether the source is surely of this format.

        Parameters
        ----------
        source
            A file or a folder.
        head
            First 64 KiB of the file; empty for a folder.
        """

    def read(self, source: Path, asked: Asked) -> Tokens | Loads:
        """Read it.

        Raises
        ------
        InputError
            If it is not of this format, damaged, larger than it should be, or does not fit the
            model; the message says what was found, what is allowed, and what to do.
        """
