"""Requests as they arrive: times in seconds, lengths in tokens, and the prompt blocks they share.

A block is a fixed number of prompt tokens; two requests with the same block id have the same text
up to and with that block, so that its keys and values could be used again. N requests.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.arrivals.checks import MOST_TOKENS, Problems, check_count, check_rate

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
MOONCAKE_BLOCK = 512
"""Tokens of a block in Mooncake's traces (https://github.com/kvcache-ai/Mooncake)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lengths:
    """Pairs of input and output tokens that requests are given, one pair or many.

    Raises
    ------
    InputError
        If there is no pair, or a number is not a whole one from 1 on.
    """

    inputs: Ints
    """Prompt tokens, [M]."""
    outputs: Ints
    """Generated tokens, [M]."""
    source: str = ""
    """Where they come from, in a few words; empty where the caller made them."""

    def __post_init__(self) -> None:
        _settle(self, "lengths", inputs=np.int64, outputs=np.int64)
        problems = Problems(where="lengths", unit="row")
        for index in np.flatnonzero(_bad_tokens(self.inputs, self.outputs)).tolist():
            problems.add(index, _tokens_of(self, index))
        problems.refuse()

    @classmethod
    def fixed(cls, inputs: int, outputs: int) -> Self:
        """Return the one pair that every request gets."""
        return cls(inputs=np.array([inputs]), outputs=np.array([outputs]))

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def statement(self) -> str:
        """How many pairs there are, and of what, for the source of what is drawn from them."""
        return f"{len(self)} pair(s)" + (f" of {self.source}" if self.source else "")

    def draw(self, count: int, seed: int) -> "Lengths":
        """Draw ``count`` pairs with replacement; input and output of a pair stay together."""
        check_count(count)
        chosen = np.random.default_rng(seed).integers(len(self), size=count)
        return replace(self, inputs=self.inputs[chosen], outputs=self.outputs[chosen])


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixBlocks:
    """Prompts cut into blocks of equal size, the last one of a prompt maybe partly filled."""

    size: int
    """Tokens of a block."""
    ids: Ints
    """[B], request after request. Equal ids: the same text up to and with this block."""
    counts: Ints
    """Blocks of each request, [N]."""

    @classmethod
    def unshared(cls, inputs: Ints) -> Self:
        """Give prompts of ``inputs`` tokens blocks of Mooncake's size that are all different."""
        counts = blocks_of(inputs, MOONCAKE_BLOCK)
        return cls(size=MOONCAKE_BLOCK, ids=np.arange(counts.sum()), counts=counts)

    def select(self, requests: Ints) -> "PrefixBlocks":
        """Return the blocks of some requests, in the order given."""
        counts = self.counts[requests]
        first = (np.cumsum(self.counts) - self.counts)[requests]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ids = self.ids[np.repeat(first, counts) + within]
        return PrefixBlocks(size=self.size, ids=ids, counts=counts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrivals:
    """Requests in order of arrival.

    Raises
    ------
    InputError
        Lists the requests (bounded) whose time is not finite, negative or before the one ahead,
        whose tokens are not at least 1, or whose blocks do not cover the prompt.
    """

    seconds: Floats
    """When each request arrives, from the start of the simulation, [N], ascending."""
    inputs: Ints
    """Prompt tokens, [N]."""
    outputs: Ints
    """Generated tokens, [N]; the first of them comes out of the prefill."""
    source: str
    """Where times and lengths come from, in a few words."""
    blocks: PrefixBlocks | None = None
    """What the prompts share, where the source tells."""
    left_out: int = 0
    """Requests of the source that failed: they have no answer and are not among the N."""

    def __post_init__(self) -> None:
        _settle(self, "arrivals", seconds=np.float64, inputs=np.int64, outputs=np.int64)
        with np.errstate(invalid="ignore"):
            wrong = ~(np.isfinite(self.seconds) & (self.seconds >= 0))
            early = np.concatenate(([False], np.diff(self.seconds) < 0)) & ~wrong
        tokens = _bad_tokens(self.inputs, self.outputs)
        problems = Problems(where="arrivals", unit="request")
        for index in np.flatnonzero(wrong | early | tokens).tolist():
            when = f"arrives at {self.seconds[index]} s"
            said = [when] if wrong[index] else []
            said += [f"{when}, before the one ahead"] if early[index] else []
            said += [_tokens_of(self, index)] if tokens[index] else []
            problems.add(index, "; ".join(said))
        problems.refuse()
        if self.blocks is not None:
            _check_blocks(self.blocks, self.inputs)

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def lengths(self) -> Lengths:
        """The pairs of input and output tokens."""
        return Lengths(inputs=self.inputs, outputs=self.outputs, source=self.source)

    @property
    def rate(self) -> float:
        """Requests per second: N - 1 over the time from the first to the last.

        Raises
        ------
        InputError
            If all requests arrive at once.
        """
        span = float(self.seconds[-1] - self.seconds[0])
        if span <= 0:
            raise InputError(
                f"{len(self)} request(s) arrive at one time -- a rate needs two different times; "
                "draw times with poisson(rate, ...) instead"
            )
        return (len(self) - 1) / span

    def first(self, count: int) -> "Arrivals":
        """Return the first ``count`` requests.

        Raises
        ------
        InputError
            If there are fewer.
        """
        check_count(count)
        if count > len(self):
            raise InputError(
                f"{count} requests asked for -- {self.source} has {len(self)}; ask for at most "
                "that many, or draw lengths from it with poisson(...)"
            )
        return replace(
            self,
            seconds=self.seconds[:count],
            inputs=self.inputs[:count],
            outputs=self.outputs[:count],
            blocks=None if self.blocks is None else self.blocks.select(np.arange(count)),
        )

    def scaled_to(self, rate: float) -> "Arrivals":
        """Rescale the times to ``rate`` requests per second; lengths and burstiness stay.

        Every time is multiplied by the same factor, so that `rate` becomes the wanted one
        exactly. Nothing is drawn anew.

        Raises
        ------
        InputError
            If ``rate`` is not positive or all requests arrive at once.
        """
        check_rate(rate)
        factor = self.rate / rate
        return replace(
            self,
            seconds=self.seconds * factor,
            source=f"{self.source}, times rescaled to {rate:g} requests/s",
        )


def blocks_of(inputs: Ints, size: int) -> Ints:
    """Return how many blocks of ``size`` tokens prompts begin, of the shape of ``inputs``."""
    return -(-inputs // size)


def _check_blocks(blocks: PrefixBlocks, inputs: Ints) -> None:
    if blocks.size < 1 or blocks.counts.shape != inputs.shape:
        raise InputError(
            f"arrivals: blocks of {blocks.size} tokens for {len(blocks.counts)} of {len(inputs)} "
            "requests -- at least 1 token, and every request"
        )
    wanted = blocks_of(inputs, blocks.size)
    wrong = np.flatnonzero(blocks.counts != wanted)
    if len(wrong) or len(blocks.ids) != wanted.sum():
        at = int(wrong[0]) if len(wrong) else len(inputs) - 1
        raise InputError(
            f"arrivals: request {at} of {inputs[at]} tokens has {blocks.counts[at]} blocks of "
            f"{blocks.size}, {len(blocks.ids)} ids in all -- one for each block that is begun"
        )


def _bad_tokens(inputs: Ints, outputs: Ints) -> NDArray[np.bool_]:
    low, high = np.minimum(inputs, outputs), np.maximum(inputs, outputs)
    return np.asarray((low < 1) | (high > MOST_TOKENS))


def _tokens_of(value: Lengths | Arrivals, index: int) -> str:
    return f"{value.inputs[index]} input and {value.outputs[index]} output tokens"


def _settle(value: Any, what: str, **dtypes: type) -> None:
    """Turn the fields into arrays of one length, at least 1."""
    arrays = {name: np.asarray(getattr(value, name)) for name in dtypes}
    sizes = {array.shape for array in arrays.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 1 or next(iter(sizes)) == (0,):
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise InputError(f"{what}: {shapes} -- one row of equal length, with at least one request")
    for name, dtype in dtypes.items():
        array = arrays[name]
        if dtype is np.int64 and not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"{what}: {name} is {array.dtype} -- whole numbers are expected")
        object.__setattr__(value, name, array.astype(dtype))
