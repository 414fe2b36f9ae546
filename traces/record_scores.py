"""The best candidates of each token: the M experts that a router scored highest, with scores.

Routers return logits, and what they make of them (softmax, sigmoid, ...) differs from model to
model. It is not looked up but found: the weights that the experts got must be the scores of the
chosen experts up to a factor per token (a normalisation or a scaling), and exactly one of the known
functions may fit that. Where none does, candidates are refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from basis.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Rule = Callable[[Floats, Floats], Floats]
"""Scores from logits ``[T, N]`` and the log of the sum of all experts' exponentials ``[T, 1]``."""

RULES: dict[str, Rule] = {
    "softmax": lambda logits, total: np.exp(logits - total),
    "sigmoid": lambda logits, total: expit(logits),
    "sqrtsoftplus": lambda logits, total: np.sqrt(np.logaddexp(logits, 0)),
    "as returned": lambda logits, total: logits,
}
"""What routers make of their logits; all ascend, so that candidates are the largest logits."""
_TOLERANCE = 1e-4
"""Allowed difference from the weights, as a share of the largest, in single precision."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BestOfLayer:
    """What one router said of T tokens."""

    ids: NDArray[np.int64]
    """``[T, M]``, best first."""
    logits: Floats
    """``[T, M]`` of these."""
    chosen: Floats
    """``[T, K]`` logits of the chosen experts."""
    total: Floats
    """``[T, 1]`` log of the sum of all experts' exponentials."""
    tolerance: float


class Candidates:
    """Reads the best candidates of a model's routers.

    Parameters
    ----------
    count
        M, more than the top-k of the model.
    num_experts
        E, experts per layer.
    """

    def __init__(self, count: int, num_experts: int) -> None:
        self._count, self._num_experts = count, num_experts
        self._rule: str | None = None

    def read(self, routed: Any, ids: "Tensor", weights: "Tensor", layer: int) -> BestOfLayer:
        """Read what a router returned in a pass.

        Parameters
        ----------
        routed
            Output of the router: a tensor or a tuple with a tensor ``[T, E]``.
        ids, weights
            The choice, ``[T, K]`` each.
        layer
            Index of the layer, for the message.

        Raises
        ------
        InputError
            When the output has no scores of all experts, or M is not from K + 1 to E.
        """
        import torch

        tokens, top_k = ids.shape
        if not top_k < self._count <= self._num_experts:
            raise InputError(
                f"{self._count} candidates -- allowed are {top_k + 1} (top-k + 1) to "
                f"{self._num_experts} (all experts)"
            )
        shape = (tokens, self._num_experts)
        for part in routed if isinstance(routed, tuple) else (routed,):
            if not torch.is_tensor(part) or not part.is_floating_point():
                continue
            if part.numel() != tokens * self._num_experts or part.shape[-1] != shape[1]:
                continue
            if int((part != 0).sum()) <= ids.numel():
                continue  # scores that are 0 outside the choice say nothing of the others
            logits = part.detach().reshape(shape)
            best = logits.float().topk(self._count, dim=-1)
            coarse = max(torch.finfo(t.dtype).eps for t in (logits, weights))
            return BestOfLayer(
                ids=best.indices.cpu().numpy(),
                logits=_double(best.values),
                chosen=_double(logits.gather(-1, ids)),
                total=_double(logits.float().logsumexp(-1, keepdim=True)),
                tolerance=max(_TOLERANCE, 4 * coarse),
            )
        raise InputError(
            f"the router of layer {layer} does not return the scores of all {self._num_experts} "
            "experts -- candidates come from these -- record without candidates"
        )

    def scored(
        self, layers: Sequence[BestOfLayer], weights: NDArray[Any], real: NDArray[np.bool_]
    ) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
        """Return candidates and scores ``[R, L, M]`` of the R real tokens of a pass.

        Parameters
        ----------
        layers
            What `read` gave, layer by layer.
        weights
            What the experts got for the real tokens, ``[R, L, K]``.
        real
            Which tokens are real, ``[T]``.

        Raises
        ------
        InputError
            When no function of the logits gives the weights, or several do.
        """
        if len(weights):
            self._settle(layers, weights.astype(np.float64), real)
        rule = RULES[self._rule or "softmax"]  # any of them, of no tokens
        ids = np.stack([layer.ids[real] for layer in layers], axis=1)
        scores = np.stack([rule(layer.logits[real], layer.total[real]) for layer in layers], axis=1)
        return ids.astype(np.uint16), scores.astype(np.float16)

    def _settle(
        self, layers: Sequence[BestOfLayer], weights: Floats, real: NDArray[np.bool_]
    ) -> None:
        """Find the rule in the first pass, and check it in all others."""
        names = [self._rule] if self._rule else list(RULES)
        misfits = {
            name: max(
                _misfit(RULES[name], layer, weights[:, at], real) / layer.tolerance
                for at, layer in enumerate(layers)
            )
            for name in names
        }
        fitting = [name for name, misfit in misfits.items() if misfit <= 1]
        if len(fitting) != 1:
            found = f"each of {', '.join(fitting)} gives" if fitting else "none of them gives"
            raise InputError(
                f"the router's scores: of {', '.join(names)} of its output {found} the weights "
                "that the experts got -- one has to -- record without candidates"
                + (", or in float32" if fitting else "")
            )
        self._rule = fitting[0]


def _misfit(rule: Rule, layer: BestOfLayer, weights: Floats, real: NDArray[np.bool_]) -> float:
    """Return the largest difference of weights ``[R, K]`` from scaled scores, as a share."""
    scores = rule(layer.chosen[real], layer.total[real])
    if not (scores >= 0).all():
        return np.inf
    if weights.shape[1] > 1:  # of one weight, a factor could explain anything
        scores = scores * (weights.sum(1) / np.maximum(scores.sum(1), 1e-300))[:, None]
    return float((np.abs(weights - scores).max(1) / weights.max(1)).max())


def _double(tensor: "Tensor") -> Floats:
    values: Floats = tensor.detach().double().cpu().numpy()
    return values
