"""Every layout is recognised by one format, and comes back as it was written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.counts_trace import read_counts
from traces.importers.base import Asked
from traces.importers.formats import FORMATS, detect, import_file
from traces.routing_trace import RoutingTrace, read_trace

Writers = dict[str, Callable[[RoutingTrace, Path], Path]]
TOKENS = (
    "vllm-logger", "hook-jsonl", "hook-jsonl-steps", "dispatch-jsonl", "router-json", "prompt-csv",
    "score-csv",
    "request-npz",
)  # fmt: skip
COUNTS = ("counts-csv", "counts-json", "imatrix")
NO_WEIGHTS = ("prompt-csv", "request-npz")
NO_PHASES = ("score-csv",)


@pytest.fixture(scope="session")
def every_format(own_formats: tuple[Any, ...]) -> tuple[Any, ...]:
    """All formats of the package, with those of this folder also before they are registered."""
    names = {each.name for each in FORMATS}
    return (*FORMATS, *(each for each in own_formats if each.name not in names))


@pytest.mark.parametrize("name", [*TOKENS, *COUNTS])
def test_one_format_claims_a_layout(
    name: str,
    writers: Writers,
    every_format: tuple[Any, ...],
    trace: RoutingTrace,
    tmp_path: Path,
) -> None:
    source = writers[name](trace, tmp_path)
    assert detect(source, every_format).name == name
    for file in source.rglob("*") if source.is_dir() else ():
        if file.is_file():
            assert detect(file, every_format).name == name


@pytest.mark.parametrize("name", TOKENS)
def test_round_trip(
    name: str, writers: Writers, own_formats: Any, trace: RoutingTrace, asked: Asked, tmp_path: Path
) -> None:
    source = writers[name](trace, tmp_path)
    found = import_file(source, tmp_path / "a.parquet", asked=asked, formats=own_formats)
    back = read_trace(tmp_path / "a.parquet")
    assert (found.format, found.kind, found.rows) == (name, "tokens", 20)
    assert (back.meta.num_experts, back.meta.top_k) == (8, 2)
    assert back.meta.moe_layer_ids == (1, 2, 3)
    assert (back.domains, back.meta.licence) == (("prose",), "CC-BY-4.0")
    assert np.array_equal(back.request_id, trace.request_id)
    assert np.array_equal(back.position, trace.position)
    assert np.array_equal(back.experts, trace.experts)
    assert np.array_equal(back.decode, trace.decode & (name not in NO_PHASES))
    if name in NO_WEIGHTS:
        assert back.weights is None
    else:
        assert back.weights is not None
        assert np.array_equal(back.weights, trace.weights)
    assert found.dropped == (
        {"warm-up tokens (the same experts in a whole step)": 40} if name == "vllm-logger" else {}
    )


@pytest.mark.parametrize("name", ["vllm-logger", "hook-jsonl", "hook-jsonl-steps"])
def test_steps_are_recovered(
    name: str, writers: Writers, own_formats: Any, trace: RoutingTrace, asked: Asked, tmp_path: Path
) -> None:
    source = writers[name](trace, tmp_path)
    import_file(source, tmp_path / "a.parquet", asked=asked, formats=own_formats)
    assert np.array_equal(read_trace(tmp_path / "a.parquet").step, trace.step)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("with_model", [True, False])
def test_counts_come_back(
    name: str,
    with_model: bool,
    writers: Writers,
    own_formats: Any,
    plain_counts: Callable[[RoutingTrace], dict[int, list[int]]],
    trace: RoutingTrace,
    asked: Asked,
    tmp_path: Path,
) -> None:
    source = writers[name](trace, tmp_path)
    asked = asked if with_model else Asked()
    found = import_file(source, tmp_path / "c.parquet", asked=asked, formats=own_formats)
    back = read_counts(tmp_path / "c.parquet")
    assert (found.format, found.kind, found.rows) == (name, "counts", 1)
    assert back.moe_layer_ids == (1, 2, 3)
    assert back.counts[0].tolist() == list(plain_counts(trace).values())
    assert back.top_k == (2 if with_model or name == "imatrix" else None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty -- record it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n",
         "Git LFS pointer, not the data"),
        (b"hello, world\n", "no format recognises it -- name one with --format"),
        (b'{"experts": 1', "no format recognises it"),
        (b"GGUF" + bytes(40), "no format recognises it"),
        (b"\x80\x04\x95counter", "no format recognises it"),
    ],
)  # fmt: skip
def test_what_nobody_knows_is_refused(
    every_format: tuple[Any, ...], content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "source").write_bytes(content)
    with pytest.raises(InputError, match=message):
        import_file(tmp_path / "source", tmp_path / "a.parquet", formats=every_format)
    assert not (tmp_path / "a.parquet").exists()


def test_what_is_only_refused_is_not_offered(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"hello, world\n")
    with pytest.raises(InputError) as raised:
        detect(tmp_path / "source")
    offered = str(raised.value).partition("--format: ")[2].split(", ")
    assert {each.name for each in FORMATS} - {*offered} == {"imatrix-dat", "counts-pickle"}


@pytest.mark.parametrize(("name", "content"), [
    ("counts.pkl", b"\x80\x04\x95\x10\x00"),
    ("imatrix.dat", b"\x02\x00\x00\x00\x17\x00\x00\x00blk.0.ffn_down.weight\x00\x00"),
])  # fmt: skip
def test_recognised_to_be_refused(
    name: str, content: bytes, own_formats: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"write the counts as CSV|one count for all experts"):
        import_file(tmp_path / name, tmp_path / "c.parquet", formats=own_formats)


@pytest.mark.parametrize("name", TOKENS)
def test_a_model_of_another_geometry_is_refused(
    name: str, writers: Writers, own_formats: Any, trace: RoutingTrace, asked: Asked, tmp_path: Path
) -> None:
    source = writers[name](trace, tmp_path)
    assert asked.model is not None
    for change, message in (
        ({"top_k": 3}, "top-3|3 scores|2 experts|exactly 3"),
        ({"num_experts": 4}, "4 experts|has 4|0 to 3"),
        ({"moe_layer_ids": (1, 2)}, "layers|2 MoE layers|dense"),
    ):
        wrong = asked.model.model_copy(update=change)
        with pytest.raises(InputError, match=message):
            import_file(
                source, tmp_path / "a.parquet", asked=Asked(model=wrong), formats=own_formats
            )
        assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("name", TOKENS)
def test_what_states_no_geometry_needs_a_model(
    name: str, writers: Writers, own_formats: Any, trace: RoutingTrace, tmp_path: Path
) -> None:
    source = writers[name](trace, tmp_path)
    if name in ("dispatch-jsonl", "score-csv"):
        import_file(source, tmp_path / "a.parquet", formats=own_formats)
        assert np.array_equal(read_trace(tmp_path / "a.parquet").experts, trace.experts)
    else:
        with pytest.raises(InputError, match=r"give the config\.json of the model"):
            import_file(source, tmp_path / "a.parquet", formats=own_formats)


@pytest.mark.parametrize("name", [*TOKENS, *COUNTS])
def test_a_file_cut_anywhere_is_refused_or_shorter(
    name: str, writers: Writers, own_formats: Any, trace: RoutingTrace, asked: Asked, tmp_path: Path
) -> None:
    """Nothing but a clear refusal, or fewer rows that are all right, comes of half a file."""
    source = writers[name](trace, tmp_path)
    file = next(f for f in sorted(source.rglob("*")) if f.is_file()) if source.is_dir() else source
    whole = file.read_bytes()
    for length in np.linspace(5, len(whole) - 2, 23).astype(int):
        file.write_bytes(whole[:length])
        try:
            import_file(
                source, tmp_path / "a.parquet", format=name, asked=asked, formats=own_formats
            )
        except InputError:
            assert not (tmp_path / "a.parquet").exists()
            continue
        if name in TOKENS:
            assert name in (
                "hook-jsonl", "hook-jsonl-steps", "vllm-logger", "prompt-csv", "score-csv"
            )  # fmt: skip
            back = read_trace(tmp_path / "a.parquet")
            assert back.num_tokens <= trace.num_tokens
        (tmp_path / "a.parquet").unlink()


@pytest.mark.parametrize("name", ["router-json", "prompt-csv", "score-csv", "request-npz"])
def test_a_pointer_in_place_of_one_file_of_a_folder(
    name: str, writers: Writers, own_formats: Any, trace: RoutingTrace, asked: Asked, tmp_path: Path
) -> None:
    source = writers[name](trace, tmp_path)
    file = [path for path in sorted(source.rglob("*")) if path.is_file()][1]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64
    file.write_bytes(pointer + b"\nsize 12345\n")
    with pytest.raises(InputError, match=f"{file.name}: a Git LFS pointer, not the data"):
        import_file(source, tmp_path / "a.parquet", asked=asked, formats=own_formats)
    assert not (tmp_path / "a.parquet").exists()


@pytest.mark.parametrize("name", ["router-json", "prompt-csv", "score-csv", "request-npz"])
def test_an_empty_folder(name: str, own_formats: Any, asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.(json|csv|npz) files"):
        import_file(
            tmp_path / "empty", tmp_path / "a.parquet", format=name, asked=asked,
            formats=own_formats,
        )  # fmt: skip


def test_two_formats_that_claim_it_are_an_error(
    own_formats: tuple[Any, ...], writers: Writers, trace: RoutingTrace, tmp_path: Path
) -> None:
    source = writers["counts-csv"](trace, tmp_path)
    with pytest.raises(InputError, match="several formats recognise it -- name one"):
        detect(source, (*own_formats, *own_formats))


def test_an_unknown_name_gets_a_hint(own_formats: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("layer,expert,count\n0,0,1\n")
    with pytest.raises(InputError, match="did you mean 'counts-csv'"):
        import_file(
            tmp_path / "x.csv", tmp_path / "a.parquet", format="count-csv", formats=own_formats
        )
