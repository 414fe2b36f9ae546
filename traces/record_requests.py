"""Whose tokens a forward pass holds: requests, positions and phases from a model's own inputs.

A pass without a cache begins new requests, one a row; a pass with a cache that an earlier pass
filled goes on with them. Padding is what the attention mask leaves out, on either side. One token
a row after the prompt is decode, everything else prefill. What cannot be told (packed sequences,
a cache that was filled elsewhere, cut or reordered) is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.record_choice import to_numpy
from traces.record_generate import Generating

Bools = NDArray[np.bool_]
_CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Whose tokens the next forward pass holds; arrays broadcast to ``[B, S]``."""

    rows: int
    """Requests, B."""
    columns: dict[str, NDArray[Any]]
    """By field of a trace: request_id, decode, step, domain and, if it is known, position."""
    mask: Bools
    """True for real tokens."""

    def flat(self, tokens: int) -> tuple[dict[str, NDArray[Any]], Bools]:
        """Columns and mask, ``[T]`` each, of a pass over T tokens, padding included.

        Raises
        ------
        InputError
            When T is not whole rows, or an array does not broadcast to them.
        """
        if tokens % self.rows:
            raise InputError(
                f"the experts got {tokens} tokens for {self.rows} requests -- every row of the "
                "batch is a request -- describe the batch that the model gets"
            )
        shape = (self.rows, tokens // self.rows)
        mask = _grid(self.mask, shape, "mask")
        counted = {"position": np.cumsum(mask, axis=1) - 1}  # padding may be on either side
        columns = {
            name: _grid(values, shape, name).ravel()
            for name, values in (counted | self.columns).items()
        }
        return columns, mask.ravel()


@dataclass(kw_only=True, eq=False)
class _Live:
    """Requests that share a cache; B rows."""

    request_id: NDArray[np.int64]
    """``[B]``."""
    domain: NDArray[np.int64]
    """``[B]``."""
    generating: Generating | None
    """The call of ``generate`` that they belong to."""
    columns: int = 0
    """Tokens of each row in the cache, padding included."""
    step: int = 0
    """Decode passes so far."""
    last: NDArray[np.int64] = field(init=False)
    """``[B]`` last recorded position, -1 at first."""
    ended: Bools = field(init=False)
    """``[B]`` whether a row was given an end-of-text token that it had generated."""

    def __post_init__(self) -> None:
        self.last = np.full(len(self.request_id), -1)
        self.ended = np.zeros(len(self.request_id), np.bool_)


class Requests:
    """Follows the requests of a model over its forward passes.

    Parameters
    ----------
    domains
        Names that `next_domains` may use; one alone is that of all rows without it.
    """

    def __init__(self, domains: tuple[str, ...]) -> None:
        self.domains = domains
        self.next_domains: Sequence[str] = ()
        self.begun = 0
        """Requests so far."""
        self._generating: Generating | None = None
        self._live: WeakKeyDictionary[Any, _Live] = WeakKeyDictionary()
        self._now: _Live | None = None
        self._cache: Any = None

    def generates(self, call: Generating | None) -> None:
        """Note that a call of ``generate`` runs, or that it ended."""
        self._generating = call

    def begins(self, inputs: Mapping[str, Any]) -> Batch:
        """Describe the pass that begins.

        Parameters
        ----------
        inputs
            The model's inputs by name; of them ``input_ids`` or ``inputs_embeds``,
            ``attention_mask``, ``position_ids`` and the cache are looked at.

        Raises
        ------
        InputError
            When the tokens cannot be told apart or attributed.
        """
        tokens = inputs.get("input_ids")
        shaped = inputs.get("inputs_embeds") if tokens is None else tokens
        if shaped is None or shaped.ndim < 2:
            raise InputError(
                "a forward pass without input_ids [requests, tokens] or inputs_embeds -- the "
                "recorder reads the batch from these -- pass one of them by name"
            )
        if inputs.get("cu_seq_lens_q") is not None:
            raise _packed()
        rows, width = shaped.shape[:2]
        cache = next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)
        live = self._now = self._continued(cache, rows) or self._new(rows)
        if self._generating:
            self._generating.begun = True
        self._cache = cache
        if live.generating is not self._generating:  # a text is gone on with: nothing has ended
            live.generating, live.ended = self._generating, np.zeros(rows, np.bool_)
        mask = _real(inputs.get("attention_mask"), rows, width)
        prompt = live.generating.prompt_columns if live.generating else 0
        decode = live.columns > 0 and width == 1 and live.columns >= prompt
        if decode:
            live.step += 1
            mask = mask & ~self._ended(live, tokens)[:, None]
        position = _positions(inputs.get("position_ids"), mask, live.last)
        live.last = np.where(mask, position, live.last[:, None]).max(axis=1)
        live.columns += width
        return Batch(
            rows=rows,
            columns={
                "request_id": live.request_id[:, None],
                "position": position,
                "decode": np.array(decode),
                "step": np.array(live.step),
                "domain": live.domain[:, None],
            },
            mask=mask,
        )

    def ends(self, output: Any) -> None:
        """Note which cache the pass filled."""
        live, self._now = self._now, None
        filled = (getattr(output, name, None) for name in _CACHES)
        cache = next((found for found in filled if found is not None), self._cache)
        self._cache = None
        if cache is not None and live is not None:
            try:
                self._live[cache] = live
            except TypeError:
                raise InputError(
                    f"a cache of type {type(cache).__name__} -- allowed are the cache objects of "
                    "transformers 5 -- use these"
                ) from None

    def _continued(self, cache: Any, rows: int) -> _Live | None:
        """Return the requests whose cache this is, or None where it is empty."""
        if cache is None:
            return None
        length = _length(cache)
        live = self._live.get(cache)
        if not length:
            return None
        if live is None or live.columns != length or len(live.request_id) != rows:
            held = f"{live.columns} of {len(live.request_id)} requests" if live else "none"
            raise InputError(
                f"a forward pass of {rows} rows goes on from a cache of {length} tokens, the "
                f"recorder saw {held} of them -- the tokens of a cache must all be recorded, in "
                "their order -- begin inside the recorder's with block, without beam search or "
                "assisted decoding"
            )
        return live

    def _new(self, rows: int) -> _Live:
        if self._generating and self._generating.begun:
            raise InputError(
                "generate() runs the whole text again for each token -- a pass must hold new "
                "tokens only -- use_cache=True"
            )
        only = self.domains * rows if len(self.domains) == 1 else ()
        names = self.next_domains or only
        unknown = sorted(set(names) - set(self.domains))
        if unknown or len(names) != rows:
            raise InputError(
                f"{len(names)} domains for {rows} requests"
                + (f", unknown: {', '.join(unknown)}" if unknown else "")
                + f" -- each row needs one of {', '.join(self.domains)} -- set the recording's "
                "next_domains before each batch"
            )
        live = _Live(
            request_id=np.arange(self.begun, self.begun + rows),
            domain=np.array([self.domains.index(name) for name in names]),
            generating=self._generating,
        )
        self.begun += rows
        return live

    def _ended(self, live: _Live, tokens: Any) -> Bools:
        """Return the rows that are over: what they are given from here on is only padding."""
        if live.generating and live.generating.end_tokens and tokens is not None:
            given = to_numpy(tokens)[:, 0]
            live.ended = live.ended | np.isin(given, list(live.generating.end_tokens))
        return live.ended


def _length(cache: Any) -> int:
    """Return the tokens in a cache."""
    # of all layers: some models give linear attention a layer that stays empty
    layers = [layer for layer in getattr(cache, "layers", []) if hasattr(layer, "get_seq_length")]
    try:
        return max(int(holder.get_seq_length()) for holder in layers or [cache])
    except (AttributeError, ValueError):
        raise InputError(
            f"a cache of type {type(cache).__name__} -- allowed are caches that say how many "
            "tokens they hold -- use those of transformers 5"
        ) from None


def _real(mask: Any, rows: int, width: int) -> Bools:
    """Return ``[B, S]`` which of a pass's tokens are real."""
    if mask is None:
        return np.ones((rows, width), np.bool_)
    if isinstance(mask, Mapping) or getattr(mask, "ndim", 0) != 2:
        raise InputError(
            "an attention mask that is not [requests, tokens] -- padding cannot be told from it "
            "-- pass the tokenizer's mask, and no static cache"
        )
    if mask.shape[0] != rows or mask.shape[1] < width:
        raise InputError(
            f"an attention mask {list(mask.shape)} for {rows} requests of {width} tokens -- it "
            "must cover each of them -- pass the tokenizer's mask"
        )
    real: Bools = to_numpy(mask)[:, -width:] != 0  # with a cache it covers the past as well
    return real


def _positions(passed: Any, mask: Bools, last: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``[B, S]`` positions: as passed if they are one number a token, else counted."""
    if passed is None or passed.shape not in ((1, mask.shape[1]), mask.shape):
        return last[:, None] + np.cumsum(mask, axis=1)
    position = np.broadcast_to(to_numpy(passed), mask.shape).astype(np.int64)
    known = np.where(mask, position, np.iinfo(np.int64).min)
    before = np.maximum.accumulate(np.column_stack([last, known[:, :-1]]), axis=1)
    if (mask & (position <= before)).any():
        raise _packed()
    return position


def _packed() -> InputError:
    return InputError(
        "positions that do not ascend along a row -- a row must be one request -- pass padded "
        "batches, not packed ones"
    )


def _grid(values: NDArray[Any], shape: tuple[int, int], name: str) -> NDArray[Any]:
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        raise InputError(
            f"{name} has shape {values.shape} -- allowed is what broadcasts to {shape}, requests "
            "by tokens -- check the batch"
        ) from None
