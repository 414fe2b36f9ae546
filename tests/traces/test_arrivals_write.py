"""Mooncake JSONL: read back, and as the benchmarks of two engines read it."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from basis.errors import InputError
from traces.arrivals import (
    Arrivals,
    Lengths,
    PrefixBlocks,
    convert_workload,
    gamma,
    read_arrivals,
    write_mooncake,
)

MOONCAKE = (
    '{"timestamp": 0, "input_length": 1500, "output_length": 500, "hash_ids": [0, 1, 2]}\n'
    '{"timestamp": 3052, "input_length": 1100, "output_length": 490, "hash_ids": [0, 1, 3]}\n'
    '{"timestamp": 3052, "input_length": 512, "output_length": 1, "hash_ids": [0]}\n'
)


def _vllm(path: Path, chunk: int, to_seconds: float) -> Iterator[tuple[float, list[Any], int]]:
    """Read as ``TimedTrace`` of vLLM does: time, prompt and output length of each request.

    After vllm/benchmarks/datasets/datasets.py of vllm-project/vllm at 003cf02 (``load_data``,
    ``sample``, ``_expand_prompt``): every line is JSON, each id in turn becomes ``chunk`` tokens,
    or as many as are left, and ids that are missing make the prompt shorter. A token is written
    here as (id, tokens of its piece, place).
    """
    with path.open() as file:
        for line in file.readlines():
            entry = json.loads(line.strip())
            left, prompt = entry["input_length"], []
            for block in entry.get("hash_ids", []):
                size = chunk if left >= chunk else left
                prompt += [(block, size, place) for place in range(size)]
                left -= size
                if left <= 0:
                    break
            yield float(entry["timestamp"]) * to_seconds, prompt, entry["output_length"]


def _sglang(path: Path) -> Iterator[tuple[float, str, int]]:
    """Read as SGLang's bench does: time, text of the prompt and output length.

    After python/sglang/benchmark/datasets/mooncake.py of sgl-project/sglang at 17481b4 (``load``,
    ``get_mooncake_request_over_time`` with one round).
    """
    with path.open() as file:
        records = [json.loads(line) for line in file if line.strip()]
    records.sort(key=lambda record: record["timestamp"])
    for record in records:
        text = "".join(f"{i}" + " ".join(["hi"] * 128) for i in record.get("hash_ids", []))
        after = (record["timestamp"] - records[0]["timestamp"]) / 1000.0
        yield after, text + "Tell me a story based on this context.", record["output_length"]


def _common(one: Any, other: Any) -> int:
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def test_both_benchmarks_replay_what_was_drawn(tmp_path: Path) -> None:
    lengths = Lengths(inputs=np.array([3, 512, 513, 2000]), outputs=np.array([9, 8, 7, 6]))
    drawn = gamma(5.0, 2.0, 60, lengths, seed=4)
    path = tmp_path / "out.jsonl"
    write_mooncake(drawn, path)
    for replayed in (_vllm(path, 512, 1e-3), _sglang(path)):
        times, prompts, outputs = zip(*replayed, strict=True)
        assert list(outputs) == drawn.outputs.tolist()
        started = drawn.seconds - (drawn.seconds[0] if isinstance(prompts[0], str) else 0)
        assert np.abs(np.array(times) - started).max() <= 1.0e-3 + 1e-9
        assert len({str(prompt[:1]) + str(prompt[:8]) for prompt in prompts}) == 60
    for (_, prompt, _), inputs in zip(_vllm(path, 512, 1e-3), drawn.inputs.tolist(), strict=True):
        assert len(prompt) == inputs  # no prompt cut short for lack of ids


def test_no_reuse_is_made_up(tmp_path: Path) -> None:
    arrivals = _arrivals([0.0, 1.0, 2.0], [2000, 2000, 600])
    write_mooncake(arrivals, tmp_path / "out.jsonl")
    prompts = [prompt for _, prompt, _ in _vllm(tmp_path / "out.jsonl", 512, 1e-3)]
    tokens = [token for prompt in prompts for token in prompt]
    assert len(set(tokens)) == len(tokens) == 4600


def test_what_the_source_shares_stays_shared(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(MOONCAKE)
    said = convert_workload(source, target)
    assert target.read_text() == MOONCAKE
    assert said.block_size == 512
    assert not any("rounded" in note or "reuses no prefix" in note for note in said.notes)
    first, second, third = (prompt for _, prompt, _ in _vllm(target, 512, 1e-3))
    assert _common(first, second) == 1024
    assert _common(first, third) == 512


def test_other_blocks_stay_and_are_named(tmp_path: Path) -> None:
    blocks = PrefixBlocks(size=16, ids=np.array([4, 5, 4, 6]), counts=np.array([2, 1, 1]))
    arrivals = _arrivals([0.0, 0.001, 0.002], [17, 16, 3], blocks)
    path = tmp_path / "out.jsonl"
    write_mooncake(arrivals, path)
    assert all(json.loads(line)["block_size"] == 16 for line in path.read_text().splitlines())
    assert [len(prompt) for _, prompt, _ in _vllm(path, 16, 1e-3)] == [17, 16, 3]
    again = read_arrivals(path)
    assert again.blocks is not None
    assert (again.blocks.size, again.blocks.ids.tolist()) == (16, [4, 5, 4, 6])
    said = convert_workload(path, tmp_path / "again.jsonl")
    assert any("--timed-trace-chunk-hash-size 16" in note for note in said.notes)


@settings(deadline=None, max_examples=30)
@given(
    gaps=st.lists(st.floats(0, 100), min_size=1, max_size=30),
    size=st.sampled_from([None, 16, 512]), seed=st.integers(0, 99),
)  # fmt: skip
def test_written_arrivals_are_read_back(gaps: list[float], size: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.integers(1, 2000, len(gaps))
    counts = -(-inputs // (size or 1))
    blocks = PrefixBlocks(size=size or 1, ids=rng.integers(0, 50, counts.sum()), counts=counts)
    arrivals = _arrivals(np.cumsum(gaps).tolist(), inputs.tolist(), blocks if size else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        write_mooncake(arrivals, path)
        again = read_arrivals(path)
        assert [each.name for each in Path(folder).iterdir()] == ["out.jsonl"]
    assert again.inputs.tolist() == arrivals.inputs.tolist()
    assert again.outputs.tolist() == arrivals.outputs.tolist()
    whole = np.round(arrivals.seconds * 1e3)
    np.testing.assert_allclose(again.seconds, (whole - whole[0]) / 1e3, atol=1e-9)
    assert again.blocks is not None
    if size:
        assert again.blocks.ids.tolist() == arrivals.blocks.ids.tolist()  # type: ignore[union-attr]
        assert again.blocks.size == size
    else:
        assert len(set(again.blocks.ids.tolist())) == (-(-arrivals.inputs // 512)).sum()


def test_conversion_says_what_is_lost(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("seconds,input_tokens,output_tokens\n0,5,1\n0.0012,5,2\n0.0013,5,3\n")
    said = convert_workload(source, tmp_path / "out.jsonl")
    assert (said.format, said.requests, said.left_out, said.block_size) == ("moeplan", 3, 0, 512)
    rounded, unshared, vllm, sglang = said.notes
    assert "0.17 ms on average, 0.3 ms at most; 1 request(s) now come with the one" in rounded
    assert "reuses no prefix" in unshared
    assert "--self-timed --timed-trace-sec-multiplier 0.001" in vllm
    assert "--num-prompts 3" in sglang
    assert json.dumps(said.to_dict())


def test_conversion_counts_failures(tmp_path: Path) -> None:
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    source = tmp_path / "in.csv"
    source.write_text(f"{header}\n1,GPT-4,5,6,11,x\n2,GPT-4,5,0,5,x\n3,GPT-4,7,8,15,x\n")
    said = convert_workload(source, tmp_path / "out.jsonl")
    assert (said.format, said.requests, said.left_out) == ("burstgpt", 2, 1)


@pytest.mark.parametrize("name", ["azure-2023-code.csv", "mooncake-conversation.jsonl"])
def test_published_traces_are_replayed(moeplan_data: Path, tmp_path: Path, name: str) -> None:
    source, target = moeplan_data / "workloads" / name, tmp_path / "out.jsonl"
    if not source.is_file():
        pytest.skip(f"set MOEPLAN_DATA to a folder with workloads/{name}")
    said = convert_workload(source, target)
    assert (target.read_bytes() == source.read_bytes()) == (said.format == "mooncake")
    assert any("rounded" in note for note in said.notes) == (said.format == "azure")
    arrivals = read_arrivals(source)
    with target.open() as file:
        entries = [json.loads(line) for line in file]
    assert [entry["input_length"] for entry in entries] == arrivals.inputs.tolist()
    assert all(0 <= 512 * len(e["hash_ids"]) - e["input_length"] < 512 for e in entries)
    off = np.array([entry["timestamp"] for entry in entries]) / 1e3 - arrivals.seconds
    assert np.abs(off).max() <= 0.5e-3 + 1e-9


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("before")

    def full(_: object) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr("traces.arrivals.write.json.dumps", full)
    with pytest.raises(OSError, match="no space"):
        write_mooncake(_arrivals([0.0], [1]), target)
    assert [each.name for each in tmp_path.iterdir()] == ["out.jsonl"]
    assert target.read_text() == "before"


def test_bad_targets(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(MOONCAKE)
    with pytest.raises(InputError, match=r"end it in .jsonl"):
        convert_workload(source, tmp_path / "out.csv")
    with pytest.raises(InputError, match="the same file"):
        convert_workload(source, source)
    with pytest.raises(InputError, match="no such folder"):
        convert_workload(source, tmp_path / "absent" / "out.jsonl")
    late = _arrivals([0.0, 1e15], [1, 1])
    with pytest.raises(InputError, match="rescale the times"):
        write_mooncake(late, tmp_path / "late.jsonl")
    source.write_text(MOONCAKE + "{}\n")
    with pytest.raises(InputError, match="line 4"):
        convert_workload(source, tmp_path / "out.jsonl")
    assert [each.name for each in tmp_path.iterdir()] == ["in.jsonl"]


def _arrivals(
    seconds: list[float], inputs: list[int], blocks: PrefixBlocks | None = None
) -> Arrivals:
    return Arrivals(
        seconds=np.array(seconds),
        inputs=np.array(inputs),
        outputs=np.arange(1, len(inputs) + 1),
        source="test",
        blocks=blocks,
    )


def test_targets_that_are_there(tmp_path: Path) -> None:
    source, folder, second = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    source.write_text(MOONCAKE)
    folder.mkdir()
    second.hardlink_to(source)
    with pytest.raises(InputError, match=r"b\.jsonl: a folder -- name a file"):
        convert_workload(source, folder)
    with pytest.raises(InputError, match=r"c\.jsonl: source and target are the same file"):
        convert_workload(source, second)
    assert set(tmp_path.iterdir()) == {source, folder, second}
    assert source.read_text() == MOONCAKE


def test_what_is_wrong_with_a_source_comes_first(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="header 'a,b' -- known are"):
        convert_workload(tmp_path / "bad.csv", tmp_path / "out.csv")
