"""Files of saved answers: lines, lists, pretty-printed, and damage."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.importers import responses
from traces.importers.responses import decoded, first_answer, read_answers, whole_number

ANSWERS: list[dict[str, Any]] = [{"a": 1}, {"b": [2, {"c": "ü"}]}, {}]


def head(path: Path, size: int = 2**16) -> bytes:
    return path.read_bytes()[:size]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(json.dumps(answer) for answer in ANSWERS),
        "".join(json.dumps(answer) + "\r\n\r\n" for answer in ANSWERS),
        json.dumps(ANSWERS),
        json.dumps(ANSWERS, indent=2, ensure_ascii=False),
        json.dumps(ANSWERS[:2]) + "\n" + json.dumps(ANSWERS[2]),
    ],
)
def test_every_way_to_save_answers(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.write_text(text, encoding="utf-8")
    assert [answer for _, answer in read_answers(path)] == ANSWERS
    assert first_answer(path, head(path)) == ANSWERS[0]


def test_one_pretty_answer(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text(json.dumps(ANSWERS[1], indent=2))
    assert [answer for _, answer in read_answers(path)] == [ANSWERS[1]]
    assert first_answer(path, head(path)) == ANSWERS[1]


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 400), seen=st.integers(1, 60))
def test_the_first_answer_however_long(
    size: int, seen: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("x") / "x"
    answer = {"text": "ü" * size, "last": 1}
    path.write_text(json.dumps([answer, answer], ensure_ascii=False), encoding="utf-8")
    assert first_answer(path, head(path, seen)) == answer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "empty"),
        (b'{"a": 1}\n{"a"', "line 2: no complete JSON"),
        (b'{"a": 1', "x: no complete JSON"),
        (b'{"a": 1}\n\xff\xfe\n', "line 2: no complete JSON"),
        (b"3", "line 1: a int -- an answer is a JSON object"),
        (b'[{"a": 1}, 4]', "answer 1: a int"),
        (b"[" * 100000, "no complete JSON"),
    ],
)
def test_damage(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(text)
    with pytest.raises(InputError, match=message):
        list(read_answers(path))


def test_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MOST_BYTES", 100)
    path = tmp_path / "x"
    path.write_text(json.dumps({"a": "x" * 200}))
    with pytest.raises(InputError, match="line 1: longer than 100 bytes -- one answer per line"):
        list(read_answers(path))
    path.write_text(json.dumps([{"a": 1}] * 20, indent=2))
    with pytest.raises(InputError, match="bytes of JSON in several lines -- at most 100"):
        list(read_answers(path))


@given(data=st.binary(max_size=50))
@settings(deadline=None, max_examples=30)
def test_base64(data: bytes) -> None:
    assert decoded(base64.b64encode(data).decode(), "x") == data


@pytest.mark.parametrize("text", ["a", "????", "YWJj\n", None, 3, "ü"])
def test_no_base64(text: Any) -> None:
    with pytest.raises(InputError, match="x: "):
        decoded(text, "x")


@pytest.mark.parametrize("value", [-1, 1.0, "1", True, None])
def test_no_whole_number(value: Any) -> None:
    with pytest.raises(InputError, match=r"x: .* -- a whole number of at least 0"):
        whole_number(value, "x")
