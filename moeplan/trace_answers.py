"""What a newcomer asks of a trace: whether it is skewed, local, predictable, and long enough.

Each answer is a word, the figure behind it, what chance alone would give, and what follows from it.
The words are conventions with stated bounds; the figures are not.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeplan.figures import percent
from moeplan.trace_statistics import Found
from traces.measures.base import Floats
from traces.measures.support import ENOUGH

Word = Literal["yes", "somewhat", "no", "unknown"]
SKEWED = (2.0, 1.3)
"""Busiest expert over mean, mean over layers, from which loads are skewed, or somewhat."""
LOCAL = (1.5, 1.15)
"""Reuse over that of independent tokens from which routing is local, or somewhat."""
PREDICTABLE = (0.2, 0.05)
"""Predictability above the best unconditional guess from which layers predict each other."""
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question with its answer."""

    question: str
    word: Word
    figure: str
    """The number behind the word, as text with its unit."""
    because: str
    """What the number is, what chance would give, and the bound of the word."""
    so: str
    """What follows for a deployment."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dict(vars(self))


def answers(found: Found) -> tuple[Answer, ...]:
    """Answer the four questions."""
    return (_skewed(found), _local(found), _predictable(found), _enough(found))


def known_mean(values: Floats) -> float:
    """Return the mean of the figures that are known (not NaN); NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _word(value: float, bounds: tuple[float, float]) -> Word:
    if np.isnan(value):
        return "unknown"
    return "yes" if value >= bounds[0] else "somewhat" if value >= bounds[1] else "no"


def _skewed(found: Found) -> Answer:
    skew = found.load.loads.max_over_mean
    mean, worst = known_mean(skew), float(np.nanmax(skew))
    layer = found.load.loads.moe_layer_ids[int(np.nanargmax(skew))]
    error = known_mean(found.support.max_over_mean_standard_error)
    step = next((s for s in found.balance.by_batch if s.batch == _BATCH), None)
    word = _word(mean, SKEWED)
    so = f"a placement by load has {'little' if word == 'no' else 'something'} to even out"
    if step is not None and step.ranks:
        ranks = step.ranks[-1]
        so = (
            f"in steps of {_BATCH} tokens the busiest of {ranks.groups} ranks has "
            f"{ranks.observed:.2f} times the mean load with experts in order of their ids, and "
            f"{ranks.even:.2f} if loads were even: what lies between a placement can win"
        )
    spread = "" if np.isnan(error) else f" ± {error:.2f}"
    return Answer(
        question="Is it skewed?",
        word=word,
        figure=f"{mean:.2f}×",
        because=f"busiest expert over the mean, mean over the layers{spread}; layer {layer} has "
        f"{worst:.2f}. From {SKEWED[0]:g} on: yes, from {SKEWED[1]:g}: somewhat",
        so=so,
    )


def _local(found: Found) -> Answer:
    seen = found.reuse.observed[0]
    chance = float(found.reuse.independent.mean())
    reuse = known_mean(seen)
    ratio = reuse / chance
    curve = found.caches[0]
    double = min(2 * found.about.meta.top_k, found.about.meta.num_experts)
    at = int(np.argmin([abs(size - double) for size in curve.sizes]))
    return Answer(
        question="Is it local?",
        word=_word(ratio, LOCAL),
        figure="not known" if np.isnan(reuse) else percent(reuse),
        because=f"of a token's experts were used by the token before; independent tokens with "
        f"these loads: {percent(chance)}. From {LOCAL[0]:g} times that on: yes, {LOCAL[1]:g}: "
        "somewhat",
        so=f"an LRU cache of {curve.sizes[at]} of {found.about.meta.num_experts} experts per layer "
        f"hits {percent(float(curve.hit_rate[at]))} of the accesses of one request at a time",
    )


def _predictable(found: Found) -> Answer:
    flow = found.flow
    learnt, guess = known_mean(flow.predictability), known_mean(flow.unconditional)
    known = not np.isnan(learnt)
    why = flow.skipped or "there is one request: nothing to score on"
    return Answer(
        question="Is it predictable?",
        word=_word(learnt - guess, PREDICTABLE),
        figure=percent(learnt) if known else "not known",
        because="of the best guesses of an expert of the next layer, given one of this layer, are "
        f"right on requests that taught nothing; without knowing it {percent(guess)}. From "
        f"{100 * PREDICTABLE[0]:g} points more on: yes, {100 * PREDICTABLE[1]:g}: somewhat"
        if known
        else why,
        so="what prefetch from layer to layer, or experts of adjacent layers placed together, can "
        "build on",
    )


def _enough(found: Found) -> Answer:
    finding = found.support.findings[0]
    words: dict[str, Word] = {"yes": "yes", "roughly": "somewhat", "no": "no"}
    value = finding.value
    needed = found.about.num_requests * (value / ENOUGH) ** 2
    more = f"about {needed:,.0f} requests like these would do"
    if finding.answer == "yes":
        more = "loads are known well enough to place experts by them"
    elif np.isnan(value):
        more = "one request cannot tell how far requests differ: record several"
    missing = [f.question for f in found.support.findings[1:] if f.answer == "no"]
    return Answer(
        question="Is it long enough?",
        word="unknown" if np.isnan(value) else words[finding.answer],
        figure="not known" if np.isnan(value) else f"± {percent(value)}",
        because=f"standard error of an average expert's load, from request to request "
        f"({found.about.num_requests:,} requests); up to {percent(ENOUGH)}: yes",
        so=more + (f"; it says nothing of {', '.join(missing)}" if missing else ""),
    )
