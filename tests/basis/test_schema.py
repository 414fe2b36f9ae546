from pathlib import Path

import pytest
from pydantic import Field

from basis import Bytes, BytesPerSecond, InputError, Strict, load, validate


class Part(Strict):
    bandwidth: BytesPerSecond
    """One way."""
    latency: float = 0.0


class Whole(Strict):
    name: str
    size: Bytes
    parts: dict[str, Part] = Field(default_factory=dict)
    list_of: list[Part] = Field(default_factory=list)


def test_all_errors_at_once_with_path_and_nearest_key() -> None:
    data = {
        "nam": "x",
        "size": 80,
        "parts": {"a": {"bandwith": "1 GB/s", "bandwidth": "1 TFLOP/s"}},
        "list_of": [{"bandwidth": "-1 GB/s"}],
    }
    with pytest.raises(InputError) as caught:
        validate(data, Whole, "file.yaml")
    text = str(caught.value)
    assert text.startswith("file.yaml: 6 errors")
    assert "name: missing" in text
    assert "nam: unknown key -- did you mean 'name'?" in text
    assert "size: unit missing in 80" in text
    assert "parts.a.bandwith: unknown key -- did you mean 'bandwidth'?" in text
    assert "parts.a.bandwidth: unknown unit 'TFLOP/s'" in text
    assert "list_of.0.bandwidth: '-1 GB/s' is not positive" in text


def test_a_far_key_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="known keys: list_of, name, parts, size"):
        validate({"name": "x", "size": "1 GB", "zzz": 1}, Whole, "f")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "x: [", "not valid YAML or JSON"),
        ("a.json", "{", "not valid YAML or JSON"),
        ("a.json", "[" * 100_000, "not valid YAML or JSON"),
        ("a.yaml", "[" * 10_000, "not valid YAML or JSON"),
        ("a.yaml", "2024-99-99", "not valid YAML or JSON"),
        ("a.yaml", "- 1", "expected a mapping, got list"),
        ("a.yaml", "", "expected a mapping, got NoneType"),
        ("a.yaml", "!!python/object/apply:os.system [ls]", "not valid YAML or JSON"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name, Whole)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.yaml", Whole)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="not valid"):
        load(tmp_path / "b.yaml", Whole)


def test_a_good_file_is_si(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: x\nsize: 80 GiB\nparts: {a: {bandwidth: 450 GB/s}}\n")
    whole = load(tmp_path / "a.yaml", Whole)
    assert whole.size == 80 * 2**30
    assert whole.parts["a"].bandwidth == 450e9
