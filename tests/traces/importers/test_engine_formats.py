"""All layouts of serving engines: there and back, recognition, and what is refused in all."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.counts_trace import read_counts
from traces.importers import formats
from traces.importers.base import Asked, Format
from traces.importers.formats import detect, import_file
from traces.importers.megatron import FORMATS_MEGATRON
from traces.importers.moe_infinity import FORMATS_MOE_INFINITY
from traces.importers.sglang import FORMATS_SGLANG
from traces.importers.sglang_counts import FORMATS_SGLANG_COUNTS
from traces.importers.sglang_recorder import FORMATS_SGLANG_RECORDER
from traces.importers.tensorrt import FORMATS_TENSORRT
from traces.importers.vllm import FORMATS_VLLM
from traces.routing_trace import RoutingTrace, read_trace

FORMATS: tuple[Format, ...] = (
    *FORMATS_VLLM,
    *FORMATS_SGLANG,
    *FORMATS_SGLANG_RECORDER,
    *FORMATS_SGLANG_COUNTS,
    *FORMATS_TENSORRT,
    *FORMATS_MEGATRON,
    *FORMATS_MOE_INFINITY,
)
BY_NAME = {each.name: each for each in FORMATS}
ALL = (*FORMATS, *(each for each in formats.FORMATS if each.name not in BY_NAME))
"""With the formats of other tools: none of them may claim what an engine wrote."""
WHOLE = ["vllm-0.14 outputs", "vllm-0.14 npz", "vllm-0.21", "vllm-0.33", "sglang-r3 generate",
         "sglang-r3 openai"]  # fmt: skip
COUNTS = ["sglang-per-pass", "sglang-stat", "trtllm-counts"]
ENGINES = [*WHOLE, "vllm-0.14 npy", *COUNTS, "sglang-per-token", "trtllm-raw", "megatron-replay",
           "moe-infinity"]  # fmt: skip
FILES = ["vllm-0.14 npy", "vllm-0.33", "sglang-r3 generate", "vllm-0.14 outputs", "vllm-0.21",
         "sglang-per-token", "sglang-stat", "megatron-replay", "moe-infinity"]  # fmt: skip


def same(ours: RoutingTrace, theirs: RoutingTrace) -> None:
    for name, column in theirs.columns.items():
        assert np.array_equal(ours.columns[name], column), name


@pytest.mark.parametrize("layout", WHOLE)
def test_a_trace_comes_back_as_it_was(engines: Any, layout: str, tmp_path: Path) -> None:
    source = engines.source()
    done = import_file(
        engines.write(layout, tmp_path, source), tmp_path / "out.parquet",
        asked=engines.asked(), formats=FORMATS,
    )  # fmt: skip
    assert done.format == engines.layouts[layout][0]
    assert (done.kind, done.rows, done.dropped) == ("tokens", source.trace.num_tokens, {})
    assert any("last sampled token of each of 3 requests" in note for note in done.notes)
    found = read_trace(tmp_path / "out.parquet")
    same(found, source.trace)
    assert found.meta.moe_layer_ids == engines.moe
    assert done.format in found.meta.source


def test_an_array_alone_does_not_tell_the_prompt(engines: Any, tmp_path: Path) -> None:
    source = engines.source()
    path = engines.write("vllm-0.14 npy", tmp_path, source)
    done = import_file(path, tmp_path / "out", asked=engines.asked(), formats=FORMATS)
    found, first = read_trace(tmp_path / "out"), source.trace.request_id == 0
    assert np.array_equal(found.experts, source.trace.experts[first])
    assert np.array_equal(found.position, source.trace.position[first])
    assert not found.decode.any()
    assert any("1 requests do not tell the length of their prompt" in each for each in done.notes)


def test_lone_tokens_keep_their_experts(engines: Any, tmp_path: Path) -> None:
    source = engines.source()
    path = engines.write("megatron-replay", tmp_path, source)
    done = import_file(path, tmp_path / "out", asked=engines.asked(), formats=FORMATS)
    found = read_trace(tmp_path / "out")
    assert np.array_equal(found.experts, source.trace.experts)
    assert found.num_requests == found.num_tokens
    assert any("nothing can be said of reuse" in note for note in done.notes)


def test_raw_statistics_keep_their_experts(engines: Any, tmp_path: Path) -> None:
    source = engines.source()
    path = engines.write("trtllm-raw", tmp_path, source)
    import_file(path, tmp_path / "out", asked=engines.asked(), formats=FORMATS)
    found = read_trace(tmp_path / "out")
    wanted = [
        cells
        for step in range(5)
        for rank in range(2)
        for cells in source.trace.experts[step::5][rank::2]
    ]
    assert np.array_equal(found.experts, wanted)
    assert found.step.tolist() == sorted(found.step.tolist())
    assert set(found.step.tolist()) == set(range(5))


@pytest.mark.parametrize("layout", COUNTS)
@pytest.mark.parametrize("with_model", [True, False])
def test_counts_come_back(engines: Any, layout: str, with_model: bool, tmp_path: Path) -> None:
    source = engines.source()
    asked = engines.asked() if with_model else Asked()
    path = engines.write(layout, tmp_path, source)
    done = import_file(path, tmp_path / "out", asked=asked, formats=FORMATS)
    found = read_counts(tmp_path / "out")
    assert np.array_equal(found.counts, source.counts()[:, list(engines.moe)])
    assert found.moe_layer_ids == engines.moe
    assert found.model == ("small" if with_model else "not stated")
    assert (done.kind, done.rows) == ("counts", 5)
    assert found.relative == layout.startswith("sglang")
    dropped = {"steps without any count": 3} if layout == "sglang-stat" else {}
    assert done.dropped == dropped


def test_counts_of_sequences_come_back(engines: Any, tmp_path: Path) -> None:
    source = engines.source()
    path = engines.write("moe-infinity", tmp_path, source)
    done = import_file(path, tmp_path / "out", asked=engines.asked(), formats=FORMATS)
    found = read_counts(tmp_path / "out")
    for number in range(3):
        cells = source.trace.experts[source.trace.request_id == number]
        for layer in range(3):
            wanted = np.bincount(cells[:, layer].reshape(-1), minlength=engines.experts)
            assert np.array_equal(found.counts[number, layer], wanted)
    assert done.dropped == {"places that no sequence filled": 2}


def test_every_layout_is_claimed_by_its_format_alone(engines: Any, tmp_path: Path) -> None:
    for number, (layout, (name, _)) in enumerate(engines.layouts.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = engines.write(layout, folder)
        head = b"" if path.is_dir() else path.read_bytes()[: 2**16]
        claims = [each.name for each in ALL if each.matches(path, head)]
        assert claims == [name], layout
        assert detect(path, ALL).name == name


def test_a_long_answer_is_recognised_too(engines: Any, tmp_path: Path) -> None:
    """The routing stands beyond the first 64 KiB."""
    path = engines.write("vllm-0.33", tmp_path)
    answers = json.loads(path.read_text())
    answers[0] = {"prompt": "word " * 40000, **answers[0]}
    path.write_text(json.dumps(answers))
    assert detect(path, FORMATS).name == "vllm-0.33"


@pytest.mark.parametrize("text", [b"{}", b"[]", b"[[[[", b"{" * 5000, b"PK\x03\x04", b"\x93NUMPY"])
def test_nothing_claims_what_is_nothing(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "thing"
    path.write_bytes(text)
    with pytest.raises(InputError, match="no format recognises it"):
        detect(path, FORMATS)


def test_nor_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no format recognises it"):
        detect(tmp_path, FORMATS)


NEEDS_MODEL = [*WHOLE, "vllm-0.14 npy", "sglang-per-token", "megatron-replay", "moe-infinity"]


@pytest.mark.parametrize("layout", NEEDS_MODEL)
def test_without_a_model(engines: Any, layout: str, tmp_path: Path) -> None:
    path = engines.write(layout, tmp_path)
    with pytest.raises(InputError, match=r"needs the model's geometry -- give the config\.json"):
        import_file(path, tmp_path / "out", formats=FORMATS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", FILES)
def test_a_pointer_in_place_of_the_data(engines: Any, layout: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
    )
    chosen = engines.layouts[layout][0]
    with pytest.raises(InputError, match="Git LFS pointer, not the data"):
        import_file(path, tmp_path / "out", format=chosen, asked=engines.asked(), formats=FORMATS)
    with pytest.raises(InputError, match="Git LFS pointer, not the data"):
        drain(BY_NAME[chosen].read(path, engines.asked()))


def drain(found: Any) -> None:
    for _ in getattr(found, "chunks", ()):
        pass


CUT = {
    "vllm-0.14 outputs": "no complete JSON",
    "vllm-0.14 npy": "bytes, .* are there -- truncated",
    "vllm-0.21": "no complete JSON",
    "vllm-0.33": "no complete JSON",
    "sglang-r3 generate": "no complete JSON",
    "sglang-per-token": "no file of torch.save .* cut off",
    "sglang-stat": "no file of torch.save .* cut off",
    "megatron-replay": "no file of torch.save .* cut off",
    "moe-infinity": "bytes, .* are there -- truncated",
}


@pytest.mark.parametrize("layout", CUT)
def test_cut_off(engines: Any, layout: str, tmp_path: Path) -> None:
    path = engines.write(layout, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(InputError, match=CUT[layout]):
        import_file(
            path, tmp_path / "out", format=engines.layouts[layout][0], asked=engines.asked(),
            formats=FORMATS,
        )  # fmt: skip
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("layout", ENGINES)
def test_random_damage_is_refused_or_harmless(engines: Any, layout: str, tmp_path: Path) -> None:
    """Cut, one byte, or some bytes changed: no other exception, and nothing half written."""
    rng, source = np.random.default_rng(0), engines.write(layout, tmp_path)
    file = sorted(source.iterdir())[-1] if source.is_dir() else source
    original, out = file.read_bytes(), tmp_path / "out"
    refused = 0
    for turn in range(12):
        data = bytearray(original)
        for place in rng.integers(len(data), size=(0, 1, 9)[turn % 3]):
            data[place] = rng.integers(256)
        file.write_bytes(data[: rng.integers(len(data))] if turn % 3 == 0 else data)
        for each in ALL:
            each.matches(source, b"" if source.is_dir() else bytes(data[: 2**16]))
        try:
            import_file(
                source, out, format=engines.layouts[layout][0], asked=engines.asked(), formats=ALL
            )
            out.unlink()
        except InputError:
            refused += 1
        assert {each.name for each in tmp_path.iterdir()} == {source.name}
    assert refused >= 4


OTHER_MODELS = {
    "wrong k": ({"top_k": 3}, "top-3"),
    "ids out of range": ({"num_experts": 5}, "of range|of experts 0 to 11|12 experts"),
    "wrong layer count": ({"num_layers": 5, "moe_layer_ids": (1, 2)}, "layers|MoE layers 1, 2"),
    "another dense layer": ({"moe_layer_ids": (2, 3, 4)}, "dense|no experts there|layers 2, 3, 4"),
}  # fmt: skip
UNSEEN = {
    ("vllm-0.21", "another dense layer"),  # three MoE layers either way: it has no others
    ("megatron-replay", "another dense layer"),
    ("sglang-stat", "wrong k"),  # counts do not show it, a note does
    ("sglang-per-pass", "wrong k"),
    ("moe-infinity", "wrong k"),
}


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        (layout, change)
        for layout in dict.fromkeys([*NEEDS_MODEL, *COUNTS, "trtllm-raw"])
        for change in OTHER_MODELS
        if (layout, change) not in UNSEEN
    ],
)
def test_another_model(engines: Any, layout: str, change: str, tmp_path: Path) -> None:
    fields, message = OTHER_MODELS[change]
    path = engines.write(layout, tmp_path)
    with pytest.raises(InputError, match=message):
        import_file(path, tmp_path / "out", asked=engines.asked(**fields), formats=FORMATS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["sglang-stat", "sglang-per-pass", "moe-infinity"])
def test_counts_that_are_no_multiple_of_top_k(engines: Any, layout: str, tmp_path: Path) -> None:
    path = engines.write(layout, tmp_path)
    done = import_file(path, tmp_path / "out", asked=engines.asked(top_k=7), formats=FORMATS)
    assert any("no multiples of top-7" in note for note in done.notes)


def _npy_header(shape: str, kind: str) -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def _npz_of_10_gb(path: Path) -> None:
    """A member whose directory entry and header declare 10 GB; it is packed zeros of 1 MB."""
    header = _npy_header("(100000, 1250, 20)", "<i4")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("routed_experts.npy", header + bytes(2**20))
        archive.getinfo("routed_experts.npy").file_size = 10**10 + len(header)


def _huge(name: str, engines: Any, folder: Path) -> Path:
    path = folder / "huge"
    shape = "(100000, 1250, 20)"
    if name == "vllm-0.14 npz":
        path = folder / "huge.npz"
        _npz_of_10_gb(path)
    elif name == "vllm-0.14 npy":
        path = folder / "huge.npy"
        path.write_bytes(_npy_header(shape, "<i4"))
    elif name == "moe-infinity":
        path.write_bytes(_npy_header(shape, "<f4"))
    elif name == "vllm-0.33":
        import base64

        text = base64.b64encode(_npy_header(shape, "<i4")).decode()
        path.write_text(json.dumps({"choices": [{"routed_experts": text}]}))
    elif name.startswith("trtllm"):
        folder = engines.write(name, folder)
        header = json.dumps(
            {"100_1": {"dtype": "I64", "shape": [10**9, 1], "data_offsets": [0, 8 * 10**9]}}
        ).encode()
        target = folder / ("rank0_raw.safetensors" if "raw" in name else "rank0.safetensors")
        target.write_bytes(len(header).to_bytes(8, "little") + header)
        path = folder
    return path


@pytest.mark.parametrize(
    "layout",
    ["vllm-0.14 npz", "vllm-0.14 npy", "vllm-0.33", "moe-infinity", "trtllm-counts", "trtllm-raw"],
)
def test_10_gb_in_a_small_header(
    engines: Any, layout: str, tmp_path: Path, memory: Callable[[Callable[[], Any]], int]
) -> None:
    path = _huge(layout, engines, tmp_path)

    def run() -> None:
        with pytest.raises(InputError, match=r"declares \d{10,} bytes"):
            drain(BY_NAME[engines.layouts[layout][0]].read(path, engines.asked()))

    assert memory(run) < 2**26
