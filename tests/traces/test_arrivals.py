"""Arrivals: the three file formats, drawn ones, and bad input."""

from pathlib import Path

import numpy as np
import pytest

from basis.errors import InputError
from traces.arrivals import Arrivals, Lengths, poisson, read_arrivals

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2224670,879,55"  # no newline at the end
)


def _file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_azure_counts_the_last_line_and_keeps_six_fractional_digits(tmp_path: Path) -> None:
    arrivals = read_arrivals(_file(tmp_path, "a.csv", AZURE))
    assert arrivals.inputs.tolist() == [374, 396, 879]
    assert arrivals.outputs.tolist() == [44, 109, 55]
    np.testing.assert_allclose(arrivals.seconds, [0, 4.314579, 4.541877], atol=1e-6)


def test_mooncake_is_in_milliseconds(tmp_path: Path) -> None:
    text = (
        '{"timestamp": 3000, "input_length": 7, "output_length": 2, "hash_ids": [1]}\n'
        '{"timestamp": 3250, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}\n'
    )
    arrivals = read_arrivals(_file(tmp_path, "m.jsonl", text))
    assert arrivals.seconds.tolist() == [0.0, 0.25]
    assert arrivals.inputs.tolist() == [7, 9]
    assert arrivals.outputs.tolist() == [2, 1]


def test_own_csv_is_sorted_by_time(tmp_path: Path) -> None:
    text = "seconds,input_tokens,output_tokens\n2.5,10,1\n0.5,20,2\n"
    arrivals = read_arrivals(_file(tmp_path, "o.csv", text))
    assert arrivals.seconds.tolist() == [0.0, 2.0]
    assert arrivals.inputs.tolist() == [20, 10]


@pytest.mark.parametrize(
    ("name", "rows", "total"),
    [("azure-2023-conv.csv", 19_366, 22_361_870), ("mooncake-conversation.jsonl", 12_031, None)],
)
def test_published_traces(moeplan_data: Path, name: str, rows: int, total: int | None) -> None:
    path = moeplan_data / "workloads" / name
    if not path.is_file():
        pytest.skip(f"set MOEPLAN_DATA to a folder with workloads/{name}")
    arrivals = read_arrivals(path)
    assert len(arrivals) == rows
    assert total is None or arrivals.inputs.sum() == total
    assert 3000 < arrivals.seconds[-1] < 3700  # an hour


def test_all_bad_lines_are_listed_and_the_list_is_bounded(tmp_path: Path) -> None:
    bad = "\n".join(["1,5,5", "x,5,5", "2,0,5", "3,5", "nan,5,5", "4,5,-1", "5,1.5,1", "6,7,8"])
    path = _file(tmp_path, "bad.csv", f"seconds,input_tokens,output_tokens\n{bad}\n")
    with pytest.raises(InputError) as caught:
        read_arrivals(path)
    message = str(caught.value)
    assert "6 bad lines" in message
    assert [f"line {n}:" in message for n in range(2, 10)] == [
        False, True, True, True, True, True, False, False,
    ]  # fmt: skip
    assert "and 1 more" in message
    assert "at least 1" in message


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "time,in,out\n1,2,3\n", "header 'time,in,out'"),
        ("a.csv", "", "header ''"),
        ("a.csv", "seconds,input_tokens,output_tokens\n", "no requests"),
        ("a.jsonl", "", "no requests"),
        ("a.jsonl", '{"timestamp": 1, "input_length": 3}\n', "'output_length' is missing"),
        ("a.jsonl", '{"timestamp": 1, "input_length": true, "output_length": 2}', "whole numbers"),
        ("a.jsonl", "[1, 2]\n", "line 1"),
        ("a.csv", AZURE.replace("2023-11-16 18:15:50", "yesterday"), "line 3"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_arrivals(_file(tmp_path, name, text))


def test_no_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_arrivals(tmp_path / "absent.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_arrivals(tmp_path / "b.csv")


def test_arrivals_refuse_disorder_and_empty_requests() -> None:
    with pytest.raises(InputError, match=r"request 1: arrives at 0.5 s, before"):
        _arrivals([1.0, 0.5], [1, 1], [1, 1])
    with pytest.raises(InputError, match=r"request 0: arrives at -1.0 s"):
        _arrivals([-1.0], [1], [1])
    with pytest.raises(InputError, match="request 1: 0 input and 3 output"):
        _arrivals([0.0, 1.0], [1, 0], [1, 3])
    with pytest.raises(InputError, match="at least one request"):
        _arrivals([], [], [])
    with pytest.raises(InputError, match="equal length"):
        _arrivals([0.0], [1, 2], [1])
    with pytest.raises(InputError, match="whole numbers"):
        Arrivals(seconds=np.zeros(1), inputs=np.array([1.5]), outputs=np.array([1]), source="test")


def test_poisson_has_exponential_gaps_and_drawn_pairs() -> None:
    lengths = Lengths(inputs=np.array([1, 2, 3]), outputs=np.array([10, 20, 30]))
    arrivals = poisson(4.0, 20_000, lengths, seed=0)
    gaps = np.diff(arrivals.seconds)
    assert arrivals.rate == pytest.approx(4.0, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)  # exponential: equal
    assert (arrivals.outputs == 10 * arrivals.inputs).all()
    assert np.bincount(arrivals.inputs)[1:] / 20_000 == pytest.approx([1 / 3] * 3, abs=0.02)
    again = poisson(4.0, 20_000, lengths, seed=0)
    assert (again.seconds == arrivals.seconds).all()
    assert (poisson(4.0, 20_000, lengths, seed=1).seconds != arrivals.seconds).any()


def test_scaling_keeps_lengths_and_burstiness() -> None:
    arrivals = _arrivals([0.0, 1.0, 5.0], [1, 2, 3], [4, 5, 6])
    scaled = arrivals.scaled_to(8.0)
    assert scaled.rate == pytest.approx(8.0)
    np.testing.assert_allclose(scaled.seconds * 20, arrivals.seconds)
    assert scaled.inputs.tolist() == [1, 2, 3]
    assert "rescaled to 8 requests/s" in scaled.source


def test_limits() -> None:
    arrivals = _arrivals([0.0, 0.0], [1, 2], [1, 1])
    assert len(arrivals.first(1)) == 1
    with pytest.raises(InputError, match="has 2; ask for at most"):
        arrivals.first(3)
    with pytest.raises(InputError, match="must be at least 1"):
        arrivals.first(0)
    with pytest.raises(InputError, match="at one time"):
        arrivals.scaled_to(1.0)
    with pytest.raises(InputError, match="positive"):
        poisson(0.0, 1, Lengths.fixed(1, 1), seed=0)
    with pytest.raises(InputError, match="0 input"):
        Lengths.fixed(0, 1)


def _arrivals(seconds: list[float], inputs: list[int], outputs: list[int]) -> Arrivals:
    return Arrivals(
        seconds=np.array(seconds),
        inputs=np.array(inputs, dtype=np.int64),
        outputs=np.array(outputs, dtype=np.int64),
        source="test",
    )
