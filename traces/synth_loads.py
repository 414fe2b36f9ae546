"""A generator for a model of which only the loads are known.

How strong the processes are, how fast they change and how many factors they have is taken from the
generator of another model, or assumed (`ASSUMED`); so are the kinds of tokens. Which experts go
together is not known, so loadings, and what a kind adds to a cell's score, are drawn at random:
co-activation and layer-to-layer flow are as strong as in the other model, but between arbitrary
experts, and the same between far layers as between adjacent ones.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.meta import TraceMeta
from traces.synth_fit import match_loads
from traces.synth_kinds import ONE_KIND
from traces.synth_model import NEVER, Process, SynthFit

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Strength:
    """A process without its loadings: variances of an average cell, of 1 in all processes."""

    name: str
    decay: float
    common: float
    """Variance from the factors."""
    own: float
    """Variance that a cell shares with no other."""
    spectrum: Floats
    """``[r]`` share of the common variance in each factor, sum 1."""

    @classmethod
    def of(cls, process: Process) -> "Strength":
        """Return what a fitted process has in common with any model's."""
        power = np.square(process.loadings, dtype=np.float64).sum(axis=0)
        total = power.sum()
        return cls(
            name=process.name,
            decay=process.decay,
            common=float(process.common.mean()),
            own=float(process.own.mean()),
            spectrum=power / total if total else np.full(len(power), 1 / len(power)),
        )


_FALLING = 1 / np.arange(1, 25)  # factor j of 24 has a share of the variance like 1 / j
_FALLING /= _FALLING.sum()

ASSUMED = (
    Strength(name="request", decay=1.0, common=0.21, own=0.04, spectrum=_FALLING),
    Strength(name="slow", decay=0.99, common=0.09, own=0.01, spectrum=_FALLING),
    Strength(name="quick", decay=0.5, common=0.31, own=0.05, spectrum=_FALLING),
    Strength(name="token", decay=0.0, common=0.2, own=0.09, spectrum=_FALLING),
)
"""Assumed where there is no other generator: rounded from the fit with one kind to gpt-oss-20b on
MMLU questions (benchmarks/results/synth_fidelity.md), the spectrum made up."""

_RARELY = -3.0  # a score that is so low on average is all the same: used by 1 token of 1000


def fit_loads(
    shares: Floats,
    *,
    top_k: int,
    model: str,
    moe_layer_ids: tuple[int, ...],
    known_from: str,
    like: SynthFit | None = None,
    seed: int = 0,
) -> SynthFit:
    """Build a generator whose loads are the shares.

    Parameters
    ----------
    shares : float array ``[L, E]``
        Each expert's share of a layer's choices, below ``1 / top_k``; rows sum to 1.
    top_k : int
    model : str
        Name for the metadata.
    moe_layer_ids : tuple of int
        The model's layer index of each row.
    known_from : str
        Where the loads are from, for the note in every trace.
    like : SynthFit, optional
        Generator that lends processes, kinds and request lengths; otherwise `ASSUMED`, one kind,
        and requests of one length.
    seed : int
        Of the random loadings.

    Raises
    ------
    InputError
        If distinct experts cannot have these shares.
    """
    _check(shares, top_k)
    lent = f"a generator {like.meta.note.removeprefix('synthetic: ')}" if like else "assumptions"
    layers, experts = shares.shape
    rng = np.random.default_rng(seed)
    strengths = [Strength.of(process) for process in like.processes] if like else ASSUMED
    used = (shares * top_k).reshape(1, -1)
    processes = tuple(_random(strength, layers * experts, rng) for strength in strengths)
    kinds = like.kinds if like else ONE_KIND
    apart = _apart(like) if like else 0.0
    means = apart * rng.standard_normal((len(kinds.share), layers * experts))
    fit = SynthFit(
        meta=TraceMeta(
            model=model, num_experts=experts, top_k=top_k, moe_layer_ids=moe_layer_ids,
            source="traces.synth_loads, drawn by traces.synth_draw",
            synthetic=True,
            note=f"synthetic: loads of {known_from}; all else from {lent}; which experts go "
            "together is random",
        ),
        kinds=kinds,
        means=np.where(used > 0, means, NEVER),
        processes=processes,
        lengths=like.lengths if like else np.ones(1),
        prompt_share=like.prompt_share if like else 0.0,
    )  # fmt: skip
    return match_loads(fit, used, seed=seed)


def _apart(like: SynthFit) -> float:
    """Return the standard deviation over kinds of an average cell's mean score."""
    means = np.maximum(like.means[: len(like.kinds.share)], _RARELY)  # without first tokens
    off = means - like.kinds.share @ means
    return float(np.sqrt((like.kinds.share @ np.square(off)).mean()))


def _random(strength: Strength, cells: int, rng: np.random.Generator) -> Process:
    """Draw loadings in random directions; every cell has the average cell's variances."""
    loadings = rng.standard_normal((cells, len(strength.spectrum)))
    loadings *= np.sqrt(strength.spectrum)
    loadings *= np.sqrt(strength.common / np.square(loadings).sum(axis=1, keepdims=True))
    return Process(
        name=strength.name,
        decay=strength.decay,
        loadings=loadings.astype(np.float32),
        own=np.full(cells, strength.own, np.float32),
    )


def _check(shares: Floats, top_k: int) -> None:
    if shares.ndim != 2 or not (shares >= 0).all() or not np.allclose(shares.sum(axis=1), 1):
        raise InputError(f"shares {list(shares.shape)} -- [layers, experts], each row sums to 1")
    if top_k < 1:
        raise InputError(f"top_k {top_k} -- at least 1")
    if shares.max() * top_k >= 1:
        raise InputError(
            f"largest share {shares.max():.3f}, top_k {top_k} -- with distinct experts a share is "
            "below 1 / top_k"
        )
