"""Why a layout lost, in words with numbers by cause.

Causes are compared per generated token (seconds of a step over its running requests), because
layouts may be best at different batch sizes; shares are of each layout's own step.
"""

import math

from planner.layouts_measured import Measured

LEAST_GAIN = 0.005
"""Relative gain in tokens/s below which two layouts are called a tie: kernel models err by more."""
_MOST_CAUSES = 2
_LEAST = 0.005  # of the choice's time per token: smaller differences are not named
NAMES = {
    "attention": "attention",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "dense_ffn": "dense layers",
    "dispatch and combine": "the exchange of tokens (dispatch and combine)",
    "tensor_parallel": "tensor-parallel all-reduces and gathers",
    "transfer": "sends between pipeline stages",
    "wait": "waiting for slower ranks",
    "router": "routing",
    "head": "the head",
    "embed": "the embedding",
    "other": "norms",
}


def why_lost(loser: Measured, winner: Measured) -> str:
    """Say by how much a layout is behind and where its time goes."""
    behind, noise = winner.gain_over(loser)
    less = 1 - 1 / (1 + behind)
    text = f"{less:.1%} fewer tokens/s" if less >= 0 else f"{-less:.1%} more tokens/s"
    if not math.isnan(noise):
        text += f" (noise {noise:.1%})"
    if loser.size == winner.size:
        text += f" at the same {loser.size} running requests"
    else:
        text += f" at {loser.size} running requests, against {winner.size}"
    text += f", TPOT {loser.step_time * 1e3:.1f} ms against {winner.step_time * 1e3:.1f} ms"
    said = "; ".join([*_differences(loser, winner, 1), *_differences(loser, winner, -1)])
    return f"{text}: {said}" if said else text


def is_tie(one: Measured, other: Measured) -> bool:
    """Whether two results differ by no more than the noise, or by less than `LEAST_GAIN`."""
    gain, noise = one.gain_over(other)
    return abs(gain) <= (LEAST_GAIN if math.isnan(noise) else max(noise, LEAST_GAIN))


def _differences(loser: Measured, winner: Measured, sign: int) -> list[str]:
    """Causes with more time (sign 1) or less (-1) in the loser, the largest difference first."""
    mine, its = _causes(loser), _causes(winner)
    least = _LEAST * winner.step_time / winner.size
    more = {
        name: sign * (mine.get(name, 0.0) / loser.size - its.get(name, 0.0) / winner.size)
        for name in mine.keys() | its.keys()
    }
    order = sorted((name for name in more if more[name] > least), key=lambda n: (-more[n], n))
    word = "more" if sign > 0 else "less"
    same = loser.size == winner.size

    def amount(name: str) -> str:
        if same:
            return f"{more[name] * loser.size * 1e3:.2g} ms {word}"
        return f"{more[name] * 1e6:.2g} us per token {word}"

    return [
        f"{amount(name)} for {NAMES.get(name, name)} "
        f"({mine.get(name, 0.0) / loser.step_time:.0%} of its step against "
        f"{its.get(name, 0.0) / winner.step_time:.0%})"
        for name in order[: _MOST_CAUSES if sign > 0 else 1]
    ]


def _causes(measured: Measured) -> dict[str, float]:
    """Seconds per step by cause, both ways of the exchange as one."""
    causes = dict(measured.seconds_by_cause)
    both = causes.pop("dispatch", 0.0) + causes.pop("combine", 0.0)
    return causes | {"dispatch and combine": both}
