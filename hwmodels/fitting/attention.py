"""Fit an engine's attention kernels on one table: structure and numbers from the fitted shapes.

A kernel is fitted for each head width that was measured; rows of other widths of the same engine
weigh a tenth, so that a width with few shapes does not run away. The held-out shapes only score.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis import InputError
from hwmodels.fitting.fit import Fit, fit, interval, score
from hwmodels.kernels.attention import AttentionCost, AttentionKernels, Rule, shares_keys
from hwmodels.kernels.attention_decode import AttentionDecodeCost
from hwmodels.kernels.attention_prefill import AttentionPrefillCost
from hwmodels.kernels.base import Features, Limits
from hwmodels.ops import AttentionDecode, AttentionPrefill
from hwmodels.silicon.table import Table

ROWS = 1500
"""Rows of one kernel that its numbers are fitted on, drawn at random from the fitted shapes."""
LEAST_ROWS = 60
"""Fitted rows below which a width gets no kernel of its own."""
_TRIAL_ROWS = 400
_OTHERS = 0.1  # weight of all rows of other widths together, that of the width's own being 1
_GENERATED = ("b200", "b300", "gb200", "gb300")  # with TensorRT-LLM's generated kernels
_GAIN = 0.9  # a rule with a second kernel must bring the loss below this share of the first's

Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]
_PREFILL: tuple[dict[str, Any], ...] = tuple(
    {"tile": tile, "packed": packed, "split": split}
    for tile in (64, 128, 256)
    for packed, split in ((False, False), (True, False), (True, True))
)
_DECODE = ("head_tile", "row_step", "resident", "split_keys", "fill", "most_splits", "block_keys")
_SHARED: tuple[dict[str, Any], ...] = tuple(
    dict(zip(_DECODE, values, strict=True))
    for values in (
        (64, 8, 1, 128, 1, 32, 128),
        (64, 64, 1, 128, 1, 128, 128),
        (16, 8, 1, 128, 1, 128, 128),
        (128, 128, 1, 128, 1, 128, 128),
        (32, 8, 1, 128, 8, 128, 128),
        (16, 8, 1, 256, 1, 32, 128),
        (32, 8, 1, 64, 4, 1024, 64),
        (64, 8, 2, 128, 2, 32, 128),
    )
)
_SINGLE: tuple[dict[str, Any], ...] = tuple(
    dict(zip(_DECODE, values, strict=True))
    for values in ((1, 1, 2, 128, 2, 128, 16), (1, 1, 2, 256, 2, 128, 32))
)
_LATENCY: tuple[dict[str, Any], ...] = tuple(
    dict(zip(_DECODE, values, strict=True))
    for values in ((16, 8, 1, 256, 1, 128, 128), (16, 8, 1, 128, 1, 128, 128))
)
_PLENTY: tuple[dict[str, Any], ...] = tuple(
    dict(zip(_DECODE, values, strict=True))
    for values in ((64, 64, 1, 256, 1, 128, 128), (64, 64, 1, 128, 1, 128, 128))
)


def fit_attention(table: Table, limits: Limits) -> AttentionKernels:
    """Fit a table's kernels and score them on the shapes held out.

    Parameters
    ----------
    table : Table
        Measured attention of one device, engine, phase, format and kernel.
    limits : Limits
        Peaks of this device for bf16 products, with its last-level cache.

    Returns
    -------
    AttentionKernels
        With errors and the 10th to 90th percentile on held-out shapes; evidence fitted, ``warm``
        as measured (see `AttentionKernels.in_service`).

    Raises
    ------
    InputError
        If the table is not of attention, has fewer fitted rows than `LEAST_ROWS`, or none to
        score on.
    """
    given = _Given(table=table, limits=limits)
    fitted, held_out = given.fitted, ~given.fitted
    if fitted.sum() < LEAST_ROWS or not held_out.any():
        raise InputError(
            f"{table.source.path} ({table.dtype}, {table.kernel}): {fitted.sum()} rows to "
            f"fit and {held_out.sum()} to score -- at least {LEAST_ROWS} and one -- leave this "
            "kernel out"
        )
    rule = _rule(given)
    kernels = [_kernel(given, rule, width, shared) for width, shared in _kinds(given, rule)]
    cost = AttentionKernels(
        kernel=table.kernel, rule=rule, of=kernels, evidence="fitted", source=table.source.path
    )
    predicted = np.concatenate([cost.seconds(part, limits) for part in given.parts])[held_out]
    measured = table.seconds[held_out]
    low, high = interval(predicted, measured)
    update = {"low": low, "high": high, "held_out": score(predicted, measured)}
    return cost.model_copy(update=update)


@dataclass(frozen=True, kw_only=True)
class _Given:
    """A table with what is asked of it again and again."""

    table: Table
    limits: Limits

    @cached_property
    def parts(self) -> list[AttentionDecode | AttentionPrefill]:
        """The table's columns, all of attention."""
        parts = [p for p in self.table.parts if isinstance(p, (AttentionDecode, AttentionPrefill))]
        if len(parts) != len(self.table.parts):
            raise InputError(
                f"{self.table.source.path}: a table of {self.table.op} -- attention is fitted "
                "here -- give tables of attention_tables or mla_tables"
            )
        return parts

    @cached_property
    def fitted(self) -> Mask:
        return ~self.table.held_out

    @cached_property
    def widths(self) -> NDArray[np.int64]:
        return np.concatenate([np.full(len(part), part.head_dim) for part in self.parts])

    @cached_property
    def _features(self) -> dict[int, tuple[AttentionCost, Features]]:
        return {}

    @property
    def prefill(self) -> bool:
        return self.table.op.endswith("prefill")

    def shared(self, rule: Rule) -> Mask:
        """Rows of the kernel whose query heads share keys, [n]."""
        return np.concatenate([shares_keys(rule, part, self.limits) for part in self.parts])

    def under(self, choice: dict[str, Any]) -> tuple[AttentionCost, Features]:
        """Return a model of a structure at the parameters' starts, and its features of all rows."""
        if id(choice) not in self._features:
            kind: type[AttentionDecodeCost] | type[AttentionPrefillCost] = AttentionDecodeCost
            if self.prefill:
                kind = AttentionPrefillCost
            values: dict[str, Any] = {p.name: p.start for p in kind.PARAMETERS}
            blank = kind.model_construct(**choice, **values)
            self._features[id(choice)] = blank, self.table.features(blank, self.limits)
        return self._features[id(choice)]


def _rule(given: _Given) -> Rule:
    """Return how the engine chooses between kernels, from the loss on fitted rows."""
    losses: dict[Rule, float] = {}
    for rule in _rules(given.table):
        shared = given.shared(rule)
        losses[rule] = 0.0
        for kind in (True, False):
            own = _draw(given.fitted & (shared == kind), _TRIAL_ROWS)
            if len(own):
                found = _best(given, own, own[:0], _choices(given, rule, kind)[::2])[1]
                losses[rule] += found.loss * float(np.mean(shared[given.fitted] == kind))
    best = min(losses, key=lambda rule: losses[rule])
    return best if losses[best] < _GAIN * losses["width"] else "width"


def _rules(table: Table) -> tuple[Rule, ...]:
    """Return the rules that the engine's own code knows for this device."""
    generated = table.source.device in _GENERATED
    if table.op == "mla_decode" and generated:
        return "width", "latency"
    if table.op == "attention_decode" and table.source.engine == "trtllm" and not generated:
        return "width", "grouped", "filled"
    return ("width",)


def _choices(given: _Given, rule: Rule, shared: bool) -> tuple[dict[str, Any], ...]:
    """Return the structures to try for a kernel of a kind."""
    if given.prefill:
        return _PREFILL
    if rule == "latency":
        return _PLENTY if shared else _LATENCY
    return _SHARED if shared else _SINGLE


def _kinds(given: _Given, rule: Rule) -> Iterator[tuple[int, bool]]:
    """Yield the head widths and kinds of kernel that have rows enough to fit."""
    shared = given.shared(rule)
    for kind in (True, False):
        widths, counts = np.unique(
            given.widths[given.fitted & (shared == kind)], return_counts=True
        )
        enough = widths[counts >= LEAST_ROWS]
        for width in enough if len(enough) else widths[-1:]:
            yield int(width), kind


def _kernel(given: _Given, rule: Rule, width: int, shared: bool) -> AttentionCost:
    """Fit the kernel of one head width and kind."""
    fitted = given.fitted & (given.shared(rule) == shared)
    own, other = fitted & (given.widths == width), fitted & (given.widths != width)
    choices = _choices(given, rule, shared)
    choice, trial = _best(given, _draw(own, _TRIAL_ROWS), _draw(other, _TRIAL_ROWS // 2), choices)
    found = _numbers(given, choice, _draw(own, ROWS), _draw(other, ROWS // 2), trial.numbers)
    update = {**found.numbers, "width": width, "evidence": "fitted", "kernel": given.table.kernel}
    if not given.prefill:
        update["shared"] = shared
    return given.under(choice)[0].model_copy(update=update)


def _best(
    given: _Given, own: Rows, others: Rows, choices: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], Fit]:
    """Return the structure with the least loss."""
    trials = [(choice, _numbers(given, choice, own, others)) for choice in choices]
    return min(trials, key=lambda trial: trial[1].loss)


def _numbers(
    given: _Given,
    choice: dict[str, Any],
    own: Rows,
    others: Rows,
    near: Mapping[str, float] | None = None,
) -> Fit:
    """Fit the parameters of a structure, from a trial's result where there is one.

    Without full windows nothing tells of their edge, which is then zero.
    """
    blank, features = given.under(choice)
    rows = np.concatenate([own, others])
    used = {name: array[..., rows] for name, array in features.items()}
    absent = {"edge"} if "full" in used and not used["full"].any() else set()
    zeros = dict.fromkeys(absent, 0.0)
    start = {p.name: p.start for p in blank.PARAMETERS} if near is None else near
    share = _OTHERS * len(own) / max(len(others), 1)
    found = fit(
        [replace(p, start=start[p.name]) for p in blank.PARAMETERS if p.name not in absent],
        lambda numbers, rows: blank.time({**numbers, **zeros}, rows),
        used,
        given.table.seconds[rows],
        weights=np.concatenate([np.ones(len(own)), np.full(len(others), share)]),
        starts=1,
        evaluations=30 if near is None else 100,
    )
    return Fit(numbers=found.numbers | zeros, loss=found.loss)


def _draw(mask: Mask, most: int) -> Rows:
    """Return rows of a mask, at most so many, drawn at random."""
    return np.sort(np.random.default_rng(0).permutation(np.flatnonzero(mask))[:most])
