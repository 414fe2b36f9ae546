"""A fitted generator of routing traces, and the file that it is kept in.

Every cell d, a (layer, expert) pair, has a latent normal score at token t:

    score(t, d) = mean(d) + sum over processes of u(t, d),    variance 1 in all

and a token uses the ``top_k`` experts of each layer with the largest scores. A process changes with
its own speed: constant in a request, slowly or quickly along it, or new at every token; its
covariance over the cells is ``loadings loadings' + diag(own)``. Scores have no unit.

The file (npz, nothing pickled) holds these few arrays and no token of any trace.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.meta import TraceMeta, decode, encode

Floats = NDArray[np.float64]
NEVER = -1e3
"""Mean score of a cell whose load is zero."""
_MAX_NUMBERS = 2**28  # in one array: 1 GiB of float32
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
    means: Floats
    """``[D]`` mean score; `NEVER` where the load is zero."""
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
        if self.means.shape != (cells,) or not np.isfinite(self.means).all():
            raise InputError(f"fit: means {list(self.means.shape)} -- {cells} finite values")
        if not len(self.lengths) or not (self.lengths >= 1).all() or not 0 <= self.prompt_share < 1:
            raise InputError("fit: lengths must be at least 1, the prompt share from 0 to below 1")
        if not self.meta.synthetic:
            raise InputError("fit: its traces are synthetic, the metadata must say so")


def save_fit(fit: SynthFit, path: Path) -> None:
    """Write a generator as npz.

    Raises
    ------
    InputError
        If the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder -- make it first")
    arrays: dict[str, Any] = {
        "meta": np.frombuffer(encode(fit.meta, ()).encode(), np.uint8),
        "means": fit.means,
        "lengths": fit.lengths,
        "prompt_share": np.array([fit.prompt_share]),
        "decays": np.array([process.decay for process in fit.processes]),
        "names": np.frombuffer("\n".join(p.name for p in fit.processes).encode(), np.uint8),
    }
    for place, process in enumerate(fit.processes):
        arrays |= {f"loadings_{place}": process.loadings, f"own_{place}": process.own}
    with path.open("wb") as file:
        np.savez(file, **arrays)


def load_fit(path: Path) -> SynthFit:
    """Read a generator that `save_fit` wrote; nothing in it is unpickled.

    Raises
    ------
    InputError
        If the file is missing, not such an npz, damaged, too large or impossible.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file -- moeplan trace synth --save-fit writes one")
    try:
        with zipfile.ZipFile(path) as archive:
            return _from_archive(archive)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: not a fitted generator ({error}) -- truncated, or another format? write it "
            "again with moeplan trace synth --save-fit"
        ) from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _from_archive(archive: zipfile.ZipFile) -> SynthFit:
    meta, _ = decode(_array(archive, "meta", np.uint8, 1).tobytes())
    names = _array(archive, "names", np.uint8, 1).tobytes().decode().split("\n")
    decays = _array(archive, "decays", np.float64, 1)
    if len(names) != len(decays):
        raise ValueError(f"{len(names)} names for {len(decays)} decays")
    return SynthFit(
        meta=meta,
        means=_array(archive, "means", np.float64, 1),
        processes=tuple(
            Process(
                name=name,
                decay=float(decay),
                loadings=_array(archive, f"loadings_{place}", np.float32, 2),
                own=_array(archive, f"own_{place}", np.float32, 1),
            )
            for place, (name, decay) in enumerate(zip(names, decays, strict=True))
        ),
        lengths=_array(archive, "lengths", np.float64, 1),
        prompt_share=float(_array(archive, "prompt_share", np.float64, 1)[0]),
    )


def _array(archive: zipfile.ZipFile, name: str, dtype: type, axes: int) -> NDArray[Any]:
    """Read one array; its header is compared with the bytes that are there before it is read."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, so its size cannot be trusted")
    with archive.open(member) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{name}: unknown npy version")
        shape, by_column, found = np.lib.format.read_array_header_1_0(stream)
        numbers = int(np.prod(shape, dtype=object))
        if found != dtype or len(shape) != axes or by_column or not 0 < numbers <= _MAX_NUMBERS:
            raise ValueError(f"{name} is {found}{list(shape)}, not {np.dtype(dtype)}, {axes} axes")
        if numbers * found.itemsize != member.file_size - stream.tell():
            raise ValueError(f"{name} does not hold the bytes that it declares")
        return np.frombuffer(_exactly(stream, numbers * found.itemsize), dtype).reshape(shape)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise ValueError(f"{len(data)} of {size} bytes")
    return data
