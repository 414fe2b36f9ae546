"""Which figure of the machine would explain the error: one limit at a time, changed for a try.

What is minimised is the share of the measured time that the prediction puts wrongly: the sum over
kernels of |predicted - measured|, over what all kernels took, mean over the cases. Memory
bandwidth, peak FLOP/s and the fixed times of the cost models are tried in steps of half an octave.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np

from hwmodels.cluster import Cluster
from moeplan.validate_cases import Cases
from moeplan.validate_predict import LIMITS, Limit, Predicted, predict_steps, with_limit
from moeplan.validate_steps import Measured
from moeplan.validate_verdict import NOISY, measured
from traces.model_spec import ModelSpec

FACTORS = (2.0 ** (np.arange(-8, 9) / 2)).tolist()
"""Changes that are tried."""
_WORTH = 0.25  # share of the wrong time that a change must explain to be named


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """One limit of the machine and the change of it that explains most."""

    limit: Limit
    factor: float
    """Of the rate, or of the fixed times, against the machine's file: 0.5 means half of it."""
    wrong: float
    """Share of the measured time that is put wrongly as it is; see the module."""
    left: float
    """The same with the change."""

    @property
    def named(self) -> bool:
        """Whether the change explains enough to point at it."""
        return self.wrong - self.left >= _WORTH * self.wrong

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, and whether to point at it, as plain JSON data."""
        return {**vars(self), "named": self.named}


def suspects(
    model: ModelSpec, cluster: Cluster, cases: Cases, taken: Sequence[Measured]
) -> tuple[Suspect, ...]:
    """Try each limit; the one that explains most comes first.

    Parameters
    ----------
    model, cluster, cases
        As `moeplan.validate_predict.predict_steps`.
    taken
        What was measured of the cases.

    Returns
    -------
    tuple of Suspect
        One for each limit, from the cases that are decidable; none where no case is.
    """
    quiet = [measured(each.total_s)[1] <= NOISY for each in taken]
    if not any(quiet):
        return ()
    cases = replace(cases, all=tuple(compress(cases.all, quiet)))
    real = [
        {name: measured(s)[0] for name, s in each.kernel_s.items()}
        for each in compress(taken, quiet)
    ]
    wrong = _wrong(predict_steps(model, cluster, cases), real)
    found = []
    for limit in LIMITS:
        left, better = min(
            (_wrong(predict_steps(model, with_limit(cluster, limit, better), cases), real), better)
            for better in FACTORS
        )
        factor = 1 / better if limit == "fixed time" else better
        found.append(Suspect(limit=limit, factor=factor, wrong=wrong, left=left))
    return tuple(sorted(found, key=lambda suspect: suspect.left))


def _wrong(predicted: Sequence[Predicted], real: Sequence[dict[str, float]]) -> float:
    """Share of the measured time of kernels that is put wrongly, mean over cases."""
    shares = [
        sum(abs(ours.kernel_s[name].mean() - seconds) for name, seconds in case.items())
        / sum(case.values())
        for ours, case in zip(predicted, real, strict=True)
    ]
    return float(np.mean(shares))
