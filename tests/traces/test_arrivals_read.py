"""Reading workload traces: every layout, by name, and what is refused."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.arrivals import find_format, is_workload, read_arrivals, read_lengths
from traces.arrivals.requests import PrefixBlocks

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2224670,879,55"  # no newline at the end
)
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,276,693,Conversation log
120,GPT-4,300,0,300,API log
120,ChatGPT,25,31,56,API log
121,ChatGPT,26,32,58,API log
140,GPT-4,0,0,0,API log
150,ChatGPT,801,7,808,Conversation log
150,GPT-4,90,11,101,Conversation log
199,GPT-4,1024,640,1664,API log
"""  # made by hand in the layout of BurstGPT_1.csv
QWEN = (
    '{"chat_id": 159, "parent_chat_id": 55, "timestamp": 61.114, "input_length": 33, '
    '"output_length": 132, "type": "text", "turn": 2, "hash_ids": [1089, 1090, 6326]}\n'
    '{"chat_id": 160, "parent_chat_id": -1, "timestamp": 61.5, "input_length": 16, '
    '"output_length": 9, "type": "text", "turn": 1, "hash_ids": [7]}\n'
)
CUSTOM = (
    '{"prompt": "one two three", "output_tokens": 10}\n{"prompt": "four", "output_tokens": 2}\n'
)


def _file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def _blocks(blocks: PrefixBlocks | None) -> list[list[int]]:
    assert blocks is not None
    parts = np.split(blocks.ids, np.cumsum(blocks.counts)[:-1])
    return [part.tolist() for part in parts]


def test_azure_counts_the_last_line_and_keeps_six_fractional_digits(tmp_path: Path) -> None:
    arrivals = read_arrivals(_file(tmp_path, "a.csv", AZURE))
    assert arrivals.inputs.tolist() == [374, 396, 879]
    assert arrivals.outputs.tolist() == [44, 109, 55]
    np.testing.assert_allclose(arrivals.seconds, [0, 4.314579, 4.541877], atol=1e-6)
    assert arrivals.blocks is None
    zoned = AZURE.replace(",374", "+00:00,374").replace(",879", "+01:00,879")
    later = read_arrivals(_file(tmp_path, "z.csv", zoned))  # one hour later is one hour earlier
    np.testing.assert_allclose(later.seconds[-1], 3600 + 4.314579 - 4.541877, atol=1e-6)


def test_burstgpt_leaves_failures_out_and_counts_them(tmp_path: Path) -> None:
    arrivals = read_arrivals(_file(tmp_path, "b.csv", BURST))
    assert len(arrivals) == 8
    assert arrivals.left_out == 2
    assert "without 2 of its 10 requests, which failed" in arrivals.source
    assert arrivals.seconds.tolist() == [0, 40, 113, 115, 116, 145, 145, 194]
    assert arrivals.inputs.tolist() == [472, 1087, 417, 25, 26, 801, 90, 1024]
    assert arrivals.outputs.tolist() == [18, 230, 276, 31, 32, 7, 11, 640]


def test_burstgpt_is_read_by_name_so_eight_columns_are_the_same(tmp_path: Path) -> None:
    rows = [
        dict(row, **{"Session ID": "1722ac82", "Elapsed time": "43"})
        for row in csv.DictReader(io.StringIO(BURST))
    ]
    header = ["Timestamp", "Session ID", "Elapsed time", "Model", "Request tokens"]
    header += ["Response tokens", "Total tokens", "Log Type"]  # the order of BurstGPT_3.csv
    text = io.StringIO()
    out = csv.DictWriter(text, header)
    out.writeheader()
    out.writerows(rows)
    six = read_arrivals(_file(tmp_path, "6.csv", BURST))
    eight = read_arrivals(_file(tmp_path, "8.csv", text.getvalue()))
    for name in ("seconds", "inputs", "outputs"):
        assert getattr(six, name).tolist() == getattr(eight, name).tolist()
    assert eight.left_out == 2


def test_mooncake_is_in_milliseconds_and_keeps_its_blocks(tmp_path: Path) -> None:
    text = (
        '{"timestamp": 3250, "input_length": 9, "output_length": 1, "hash_ids": [1]}\n'
        "\n"
        '{"timestamp": 3000, "input_length": 513, "output_length": 2, "hash_ids": [1, 5]}\n'
    )
    arrivals = read_arrivals(_file(tmp_path, "m.jsonl", text))
    assert arrivals.seconds.tolist() == [0.0, 0.25]
    assert arrivals.inputs.tolist() == [513, 9]
    assert arrivals.outputs.tolist() == [2, 1]
    assert _blocks(arrivals.blocks) == [[1, 5], [1]]
    assert arrivals.blocks is not None
    assert arrivals.blocks.size == 512
    bare = text.replace(', "hash_ids": [1]', "").replace(', "hash_ids": [1, 5]', "")
    assert read_arrivals(_file(tmp_path, "n.jsonl", bare)).blocks is None


def test_qwen_is_in_seconds_with_blocks_of_sixteen(tmp_path: Path) -> None:
    arrivals = read_arrivals(_file(tmp_path, "q.jsonl", QWEN))
    np.testing.assert_allclose(arrivals.seconds, [0.0, 0.386])
    assert arrivals.inputs.tolist() == [33, 16]
    assert _blocks(arrivals.blocks) == [[1089, 1090, 6326], [7]]
    assert arrivals.blocks is not None
    assert arrivals.blocks.size == 16


def test_seconds_are_not_taken_for_milliseconds(tmp_path: Path) -> None:
    """A trace like Qwen's without its ids of chats: its name has to be given."""
    bare = _file(tmp_path, "q.jsonl", QWEN.replace('"chat_id"', '"id"'))
    with pytest.raises(InputError, match=r"timestamp 61.114 .* name the format qwen"):
        read_arrivals(bare)
    np.testing.assert_allclose(read_arrivals(bare, "qwen").seconds, [0.0, 0.386])
    whole = QWEN.replace("61.114", "61").replace("61.5", "62").replace("chat_id", "id")
    with pytest.raises(InputError, match="1 blocks of 512 wanted"):
        read_arrivals(_file(tmp_path, "w.jsonl", whole))


def test_own_csv_is_sorted_by_time(tmp_path: Path) -> None:
    text = "seconds,input_tokens,output_tokens\n2.5,10,1\n0.5,20,2\n"
    arrivals = read_arrivals(_file(tmp_path, "o.csv", text))
    assert arrivals.seconds.tolist() == [0.0, 2.0]
    assert arrivals.inputs.tolist() == [20, 10]
    turned = "output_tokens,seconds,input_tokens\n1,2.5,10\n2,0.5,20\n"
    assert read_arrivals(_file(tmp_path, "t.csv", turned)).inputs.tolist() == [20, 10]


def test_vllm_custom_has_lengths_but_no_times(tmp_path: Path) -> None:
    path = _file(tmp_path, "v.jsonl", CUSTOM)
    with pytest.raises(InputError, match=r"requests without times .*draw times"):
        read_arrivals(path)
    with pytest.raises(InputError, match=r"2 bad lines(.|\n)*write it in every line, or give"):
        read_lengths(path)
    lengths = read_lengths(path, count_tokens=lambda text: len(text.split()))
    assert lengths.inputs.tolist() == [3, 1]
    assert lengths.outputs.tolist() == [10, 2]
    for name in ("prompt_len", "input_len"):
        said = CUSTOM.replace('"output_tokens"', f'"{name}": 77, "output_tokens"')
        given_too = read_lengths(_file(tmp_path, f"{name}.jsonl", said))
        assert given_too.inputs.tolist() == [77, 77]


def test_lengths_are_read_from_arrivals_too(tmp_path: Path) -> None:
    lengths = read_lengths(_file(tmp_path, "b.csv", BURST))
    assert len(lengths) == 8
    assert lengths.statement == "8 pair(s) of b.csv without 2 of its 10 requests, which failed"


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.csv", AZURE, "azure"),
        ("a.csv", "\ufeff" + BURST, "burstgpt"),
        ("a.csv", "seconds,input_tokens,output_tokens\n", "moeplan"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 3}\n', "mooncake"),
        ("a.jsonl", QWEN, "qwen"),
        ("a.jsonl", CUSTOM, "vllm-custom"),
    ],
)
def test_formats_are_recognised(tmp_path: Path, name: str, text: str, found: str) -> None:
    path = _file(tmp_path, name, text)
    assert find_format(path) == found
    assert is_workload(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "Layer ID,Batch Number,Token,Activated Expert IDs\n"),
        ("a.csv", "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"),  # prompts of images too
        ("a.jsonl", '{"schema": "moeplan.trace/1", "model": "m"}\n'),
        ("a.jsonl", '{"type":"route","req_id":"r1","token_idx":9,"layer":0,"topk_ids":[56]}\n'),
        ("a.jsonl", '{"prompt": "no length of the answer"}\n'),
        ("a.jsonl", "[1, 2]\n"),
        ("a.parquet", "PAR1"),
        ("absent.csv", ""),
    ],
)
def test_other_files_are_no_workloads(tmp_path: Path, name: str, text: str) -> None:
    path = _file(tmp_path, name, text) if text else tmp_path / name
    assert not is_workload(path)
    with pytest.raises(InputError, match=r"known are|no such file|one JSON object"):
        read_arrivals(path)


def test_a_named_format_has_to_fit(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.csv", AZURE)
    with pytest.raises(InputError, match=r"3 bad lines(.|\n)*'seconds' is missing"):
        read_arrivals(path, "moeplan")
    with pytest.raises(InputError, match="no format 'qwen' for csv files -- one of azure"):
        read_arrivals(path, "qwen")


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
    assert "from 1 to 2147483647" in message


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "time,in,out\n1,2,3\n", "header 'time,in,out'"),
        ("a.csv", "", "header ''"),
        ("a.csv", "seconds,input_tokens,output_tokens\n", "no requests"),
        ("a.csv", BURST.splitlines()[0] + "\n1,GPT-4,3,0,3,x\n", "no requests"),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.jsonl", "", "no requests"),
        ("a.jsonl", "\n \n", "no requests"),
        ("a.jsonl", '{"timestamp": 1, "input_length": 3}\n', "'output_length' is missing"),
        ("a.jsonl", '{"timestamp": 1, "input_length": true, "output_length": 2}', "whole number"),
        ("a.jsonl", '{"timestamp": "1", "input_length": 1, "output_length": 2}', "a number"),
        ("a.jsonl", '{"timestamp": NaN, "input_length": 1, "output_length": 2}', "finite"),
        ("a.jsonl", '{"timestamp": 1, "input_length": 2147483648, "output_length": 2}', "to 2147"),
        ("a.jsonl", "[1, 2]\n", "line 1: .*not a JSON object"),
        ("a.jsonl", "\n{\n", "line 2: "),
        ("a.jsonl", "[" * 100_000, "line 1: "),
        ("a.jsonl", QWEN.replace("[7]", "[7, 8]"), "line 2: .*hash_ids 2 for 16 tokens: 1 blocks"),
        ("a.jsonl", QWEN.replace("[7]", "[-7]"), "line 2: .*whole numbers from 0"),
        ("a.jsonl", QWEN.replace("[7]", "7"), "line 2: .*hash_ids 7 for"),
        ("a.jsonl", QWEN.replace("[7]", "[]"), "no hash_ids, but blocks of 16 in the lines before"),
        ("a.jsonl", QWEN + "{}\n" + QWEN[:40], "2 bad lines"),
        ("a.csv", AZURE.replace("2023-11-16 18:15:50", "yesterday"), "line 3"),
        ("a.csv", f"seconds,input_tokens,output_tokens\n1,2,{'9' * 200_000}\n", "as CSV"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_arrivals(_file(tmp_path, name, text))


def test_no_text_and_no_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_arrivals(tmp_path / "b.csv")
    monkeypatch.setattr("traces.arrivals.text._LONGEST", 100)
    with pytest.raises(InputError, match="a line of more than 100 characters"):
        read_arrivals(_file(tmp_path, "long.jsonl", "x" * 101))


@settings(deadline=None, max_examples=30)
@given(junk=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".jsonl"]))
def test_junk_is_refused_in_one_way(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("junk") / f"junk{suffix}"
    for head in (b"", b"seconds,input_tokens,output_tokens\n", QWEN.encode()):
        path.write_bytes(head + junk)
        refusal = _refusal(path)
        assert refusal is None or str(path) in refusal


def _refusal(path: Path) -> str | None:
    try:
        read_arrivals(path)
    except InputError as error:
        return str(error)
    return None
