"""A fitted generator of routing traces, and the file that it is kept in.

Every cell d, a (layer, expert) pair, has a latent score at token t, which is of a kind:

    score(t, d) = mean(kind(t), d) + sum over processes of u(t, d)

and a token uses the ``top_k`` experts of each layer with the largest scores. The first tokens of
requests, often a template, are each a kind for itself. Processes are normal,
with variance 1 in all. Each changes with its own speed: constant in a request, slowly or quickly
along it, or new at every token; its covariance over the cells is ``loadings loadings' +
diag(own)``. Scores have no unit.

The file (npz, nothing pickled) holds these few arrays and no token of any trace.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from basis.files import check_file, replacing
from traces.importers.files import npz_names, read_npz
from traces.meta import TraceMeta, decode, encode
from traces.synth_kinds import Kinds

Floats = NDArray[np.float64]
NEVER = -1e3
"""Mean score of a cell whose load is zero."""
_MOST_BYTES = 2**32
_VARIANCE_SLACK = 1e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Process:
    """One part of the scores, with D = L * E cells (layer after layer) and r common factors."""

    name: str
    decay: float
    """Correlation with the next token of the request: 0 new at every token, 1 constant."""
    loadings: NDArray[np.float32]
    """``[D, r]``, of factors that all layers share."""
    own: NDArray[np.float32]
    """``[D]`` variance of each cell that it shares with no other."""

    @property
    def common(self) -> Floats:
        """``[D]`` variance of each cell that comes from the factors."""
        return np.square(self.loadings, dtype=np.float64).sum(axis=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class SynthFit:
    """A generator: what `traces.synth_fit` finds and `traces.synth_draw` draws from.

    Raises
    ------
    InputError
        If shapes or values are impossible.
    """

    meta: TraceMeta
    """Of the traces to draw: synthetic, with a note that says from what this was fitted."""
    kinds: Kinds
    means: Floats
    """``[M + P, D]`` mean score of each of M kinds, and of each of the first P tokens of a request;
    `NEVER` where the load is zero."""
    processes: tuple[Process, ...]
    lengths: Floats
    """``[Q]`` quantiles of the tokens of a request, evenly spaced from 0 to 1."""
    prompt_share: float
    """Share of a request's tokens that are its prompt (prefill)."""

    def __post_init__(self) -> None:
        cells = self.meta.num_layers * self.meta.num_experts
        variance = np.zeros(cells)
        for process in self.processes:
            rank = process.loadings.shape[-1]
            if process.loadings.shape != (cells, rank) or process.own.shape != (cells,):
                raise InputError(
                    f"process {process.name}: loadings {list(process.loadings.shape)}, own "
                    f"{list(process.own.shape)} -- must be [{cells}, r] and [{cells}]"
                )
            if not (0 <= process.decay <= 1 and (process.own >= 0).all()):
                raise InputError(
                    f"process {process.name}: decay {process.decay} and variances must be from 0, "
                    "the decay at most 1"
                )
            variance += process.common + process.own
        if not np.allclose(variance, 1, atol=_VARIANCE_SLACK):  # NaN is refused as well
            raise InputError("fit: a cell's variances over the processes must sum to 1")
        kinds = len(self.kinds.share)
        right = self.means.shape == (len(self.means), cells) and len(self.means) >= kinds
        if not (right and np.isfinite(self.means).all()):
            raise InputError(
                f"fit: means {list(self.means.shape)} -- finite values [{kinds} or more, {cells}], "
                "of kinds (and first tokens) and (layer, expert) pairs"
            )
        finite = len(self.lengths) and np.isfinite(self.lengths).all()
        if not finite or self.lengths.min() < 1 or not 0 <= self.prompt_share < 1:
            raise InputError(
                "fit: lengths must be at least 1 and finite, the prompt share from 0 to below 1"
            )
        if not self.meta.synthetic:
            raise InputError("fit: its traces are synthetic, the metadata must say so")


def save_fit(fit: SynthFit, path: Path) -> None:
    """Write a generator as npz.

    Raises
    ------
    InputError
        If it cannot be written there; what was there stays.
    """
    arrays: dict[str, Any] = {
        "meta": np.frombuffer(encode(fit.meta, ()).encode(), np.uint8),
        "means": fit.means,
        "lengths": fit.lengths,
        "prompt_share": np.array([fit.prompt_share]),
        "decays": np.array([process.decay for process in fit.processes]),
        "names": np.frombuffer("\n".join(p.name for p in fit.processes).encode(), np.uint8),
    }
    arrays |= {f"kinds_{each.name}": getattr(fit.kinds, each.name) for each in fields(Kinds)}
    for place, process in enumerate(fit.processes):
        arrays |= {f"loadings_{place}": process.loadings, f"own_{place}": process.own}
    with replacing(Path(path)) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def load_fit(path: Path) -> SynthFit:
    """Read a generator that `save_fit` wrote; nothing in it is unpickled.

    Raises
    ------
    InputError
        If the file is missing, not such an npz, damaged, too large or impossible.
    """
    path = Path(path)
    check_file(path, "what moeplan trace synth --save-fit wrote")
    found = read_npz(path, npz_names(path), _MOST_BYTES)
    try:
        return _from_arrays(found)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not a fitted generator ({error}) -- write it again with moeplan trace synth "
            "--save-fit"
        ) from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _from_arrays(found: dict[str, NDArray[Any]]) -> SynthFit:
    def of(name: str, axes: int, dtype: type = np.float64) -> NDArray[Any]:
        array = found[name]
        if array.dtype != dtype or array.ndim != axes or not array.size:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}, not {np.dtype(dtype)}, {axes} axes"
            )
        return array

    meta, _ = decode(of("meta", 1, np.uint8).tobytes())
    names = of("names", 1, np.uint8).tobytes().decode().split("\n")
    decays = of("decays", 1)
    if len(names) != len(decays):
        raise ValueError(f"{len(names)} names for {len(decays)} decays")
    axes = {"share": 1, "transitions": 2, "loadings": 2, "own": 1}
    return SynthFit(
        meta=meta,
        kinds=Kinds(**{name: of(f"kinds_{name}", count) for name, count in axes.items()}),
        means=of("means", 2),
        processes=tuple(
            Process(
                name=name,
                decay=float(decay),
                loadings=of(f"loadings_{place}", 2, np.float32),
                own=of(f"own_{place}", 1, np.float32),
            )
            for place, (name, decay) in enumerate(zip(names, decays, strict=True))
        ),
        lengths=of("lengths", 1),
        prompt_share=float(of("prompt_share", 1)[0]),
    )
