"""A fitted generator is checked when it is made, and when its file is read."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from basis.errors import InputError
from traces.synth_model import Process, SynthFit, load_fit, save_fit


def test_a_file_gives_the_generator_back(make_fit: Callable[..., SynthFit], tmp_path: Path) -> None:
    fit = make_fit(layers=2, experts=6, kinds=3, first=2)
    save_fit(fit, tmp_path / "fit.npz")
    back = load_fit(tmp_path / "fit.npz")
    assert back.meta == fit.meta
    assert back.prompt_share == fit.prompt_share
    assert np.array_equal(back.means, fit.means)
    assert np.array_equal(back.lengths, fit.lengths)
    for name in ("share", "transitions", "loadings", "own"):
        assert np.array_equal(getattr(back.kinds, name), getattr(fit.kinds, name))
    for ours, theirs in zip(fit.processes, back.processes, strict=True):
        assert (ours.name, ours.decay) == (theirs.name, theirs.decay)
        assert np.array_equal(ours.loadings, theirs.loadings)
        assert np.array_equal(ours.own, theirs.own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: {"means": f.means[:, :-1]},
            r"means \[1, 11\] -- finite values \[1 or more, 12\]",
        ),
        (lambda f: {"means": f.means[0]}, r"means \[12\] -- finite values"),
        (lambda f: {"means": f.means * np.nan}, "means .* finite values"),
        (lambda f: {"lengths": np.zeros(3)}, "lengths must be at least 1"),
        (lambda f: {"lengths": np.array([1.0, np.inf])}, "lengths must be at least 1 and finite"),
        (lambda f: {"prompt_share": 1.0}, "prompt share"),
        (lambda f: {"processes": f.processes[:-1]}, "must sum to 1"),
        (lambda f: {"meta": replace(f.meta, synthetic=False)}, "must say so"),
        (lambda f: {"processes": (replace(f.processes[0], decay=1.1),)}, "decay 1.1"),
        (lambda f: {"processes": (replace(f.processes[0], own=np.ones(2, np.float32)),)}, r"\[2\]"),
        (
            lambda f: {"processes": (replace(f.processes[0], own=-f.processes[0].own),)},
            "variances must be from 0",
        ),
    ],
)
def test_impossible_generators(
    make_fit: Callable[..., SynthFit], change: Callable[[SynthFit], dict], message: str
) -> None:
    fit = make_fit(layers=2, experts=6)
    with pytest.raises(InputError, match=message):
        replace(fit, **change(fit))


def damaged(path: Path, name: str, array: np.ndarray) -> None:
    """Replace one array of a file."""
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    np.savez(path, **(arrays | {name: array}))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("means", np.zeros((1, 12), np.float32), "means is float32"),
        ("means", np.zeros((12, 1, 1)), r"means is float64\[12, 1, 1\]"),
        ("means", np.zeros((1, 0)), r"means is float64\[1, 0\]"),
        ("means", np.zeros((1, 11)), "means .* finite values"),
        ("kinds_share", np.full(1, 0.5), "kinds: shares and rows of transitions must"),
        ("kinds_own", np.zeros(2), r"kinds: share \[1\], .* own \[2\] -- must be \[M\]"),
        ("decays", np.array([0.5]), "4 names for 1 decays"),
        ("decays", np.array([1.0, 0.9, 0.5, np.nan]), "decay nan"),
        ("loadings_2", np.full((12, 3), np.inf, np.float32), "must sum to 1"),
        ("loadings_0", np.zeros((12, 3)), "loadings_0 is float64"),
        ("meta", np.frombuffer(b"{}", np.uint8), "trace metadata: missing"),
        ("meta", np.frombuffer(b"\xff\xfe", np.uint8), "not valid JSON"),
    ],
)
def test_damaged_arrays(
    make_fit: Callable[..., SynthFit], tmp_path: Path, name: str, array: np.ndarray, message: str
) -> None:
    path = tmp_path / "fit.npz"
    save_fit(make_fit(layers=2, experts=6), path)
    damaged(path, name, array)
    with pytest.raises(InputError, match=message):
        load_fit(path)


def test_damaged_files(make_fit: Callable[..., SynthFit], tmp_path: Path) -> None:
    path = tmp_path / "fit.npz"
    with pytest.raises(InputError, match="no such file"):
        load_fit(path)
    with pytest.raises(InputError, match="no such folder"):
        save_fit(make_fit(layers=2, experts=6), tmp_path / "absent" / "fit.npz")
    save_fit(make_fit(layers=2, experts=6), path)
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1"
    half = whole[: len(whole) // 2]
    for bad, message in (
        (b"", "empty"), (pointer, "a Git LFS pointer"), (half, "not a readable npz"),
    ):  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(InputError, match=message):
            load_fit(path)
    with pytest.raises(InputError, match="a folder"):
        load_fit(tmp_path)
    np.savez(path, means=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(InputError, match="holds pickled objects"):
        load_fit(path)


def test_a_full_disk_loses_nothing(
    make_fit: Callable[..., SynthFit], tmp_path: Path, full_disk: None
) -> None:
    path = tmp_path / "fit.npz"
    path.write_bytes(b"what was there")
    with pytest.raises(InputError, match=r"fit\.npz: not written"):
        save_fit(make_fit(layers=8, experts=64), path)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]


def test_a_small_file_cannot_ask_for_much_memory(
    make_fit: Callable[..., SynthFit], tmp_path: Path
) -> None:
    path = tmp_path / "fit.npz"
    save_fit(make_fit(layers=2, experts=6), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # the header of means declares 10 GB
    header = members["means.npy"][:128].replace(b"(1, 12)", b"(1, 1250000000)", 1)
    members["means.npy"] = (
        header[:127].rstrip(b" \n").ljust(127) + b"\n" + members["means.npy"][128:]
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match=r"means\.npy.* declares"):
        load_fit(path)


def test_variance_of_factors() -> None:
    process = Process(
        name="x", decay=0.5, loadings=np.array([[0.3, 0.4], [0, 1]], np.float32),
        own=np.zeros(2, np.float32),
    )  # fmt: skip
    assert process.common == pytest.approx([0.25, 1.0])
