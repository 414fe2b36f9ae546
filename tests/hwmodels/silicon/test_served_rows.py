"""The loader of measured serving runs: which cells it reads, and what its rules do."""

from collections.abc import Iterator, Mapping

import pytest

from hwmodels.silicon import served_rows as loader
from hwmodels.silicon.served_rows import (
    BOTH,
    CELLS,
    DISAGGREGATED,
    FLEET,
    NO_CONCURRENCY,
    NO_DP,
    REPEATED,
    SPECULATED,
    TWICE,
    Ranks,
    clean,
    repaired,
    served_rows,
)

ROW = {
    "id": "a",
    "silicon_data_source": "source_file=x.csv; silicon_concurrency=8; measured=2026-03-01",
    "backend": "vllm",
    "backend_version": "0.17.0",
    "model_path": "MiniMaxAI/MiniMax-M2.5",
    "system": "b200_sxm",
    "precision": "fp8",
    "mode": "agg",
    "isl": "1024",
    "osl": "1024",
    "tp_size": "4",
    "attention_dp_size": "1",
    "moe_tp_size": "4",
    "moe_ep_size": "1",
    "silicon_ttft_ms": "100.0",
    "silicon_tpot_ms": "10.0",
}


class _Sealed(Mapping[str, str]):
    """A row of an evaluation cell: only the three keys of its cell may be looked at."""

    def __init__(self, model: str, system: str, engine: str) -> None:
        self._cell = {"model_path": model, "system": system, "backend": engine}

    def __getitem__(self, key: str) -> str:
        if key not in self._cell:
            raise AssertionError(f"{key} of an evaluation row was read")
        return self._cell[key]

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("an evaluation row was walked over")

    def __len__(self) -> int:
        raise AssertionError("an evaluation row was measured")


def _labels(tp: int, dp: int | None, moe_tp: int, moe_ep: int) -> dict[str, str]:
    return {
        "tp_size": str(tp),
        "attention_dp_size": "" if dp is None else str(dp),
        "moe_tp_size": str(moe_tp),
        "moe_ep_size": str(moe_ep),
    }


def test_evaluation_rows_are_passed_over_unread() -> None:
    sealed = [
        _Sealed("deepseek-ai/DeepSeek-V3", "h100_sxm", "sglang"),
        _Sealed("openai/gpt-oss-120b", "h200_sxm", "trtllm"),
        _Sealed("Qwen/Qwen3-235B-A22B", "b200_sxm", "vllm"),
        _Sealed("meta-llama/Llama-3.3-70B", "b200_sxm", "vllm"),
    ]
    assert list(loader._development([*sealed, ROW, *sealed])) == [ROW]


def test_the_wheels_runs_are_of_the_development_cells_and_no_others() -> None:
    pytest.importorskip("aiconfigurator_core")
    found = served_rows()
    assert {row.cell for row in found.rows} == set(CELLS)
    assert len(CELLS) == 13
    assert len(found.rows) == 844
    assert found.counts[FLEET] == 35
    assert found.counts[NO_CONCURRENCY] == 1
    assert found.counts[TWICE] == 107


def test_repaired_layouts_use_as_many_gpus_for_attention_as_for_experts() -> None:
    pytest.importorskip("aiconfigurator_core")
    for row in served_rows().rows:
        tp, dp, moe_tp, moe_ep = row.ranks
        assert tp * dp == moe_tp * moe_ep <= 8, row.name


@pytest.mark.parametrize(
    ("labels", "ranks", "rule"),
    [
        ((4, 1, 4, 1), (4, 1, 4, 1), ""),
        ((1, 8, 1, 8), (1, 8, 1, 8), ""),
        ((8, 1, 1, 8), (8, 1, 1, 8), ""),
        ((1, 1, 1, 1), (1, 1, 1, 1), ""),
        ((64, 1, 8, 8), (8, 1, 1, 8), TWICE),
        ((1, 64, 8, 8), (1, 8, 1, 8), TWICE),
        ((1, 4, 2, 2), (1, 2, 1, 2), TWICE),
        ((4, 4, 1, 16), (4, 1, 1, 4), BOTH),
        ((2, 2, 1, 4), (2, 1, 1, 2), BOTH),
        ((2, None, 4, 1), (2, 2, 4, 1), NO_DP),
        ((8, None, 2, 4), (8, 1, 2, 4), NO_DP),
    ],
)
def test_labels_are_repaired(
    labels: tuple[int, int | None, int, int], ranks: tuple[int, ...], rule: str
) -> None:
    assert repaired(ROW | _labels(*labels)) == (Ranks(*ranks), rule)


def test_rows_are_left_out_by_rule() -> None:
    rows = [
        ROW | {"mode": "disagg"},
        ROW | {"system": "gb200", "backend": "trtllm"} | _labels(12, 1, 12, 1),
        ROW | {"silicon_data_source": "source_file=x.csv"},
        ROW,
    ]
    found = clean(rows)
    assert [row.name for row in found.rows] == ["a"]
    assert found.counts[DISAGGREGATED] == found.counts[FLEET] == found.counts[NO_CONCURRENCY] == 1


def test_one_run_exported_twice_is_one_run_and_keeps_its_version() -> None:
    rounded = ROW | {"id": "b", "silicon_ttft_ms": "100.004", "backend_version": ""}
    another = ROW | {"id": "c", "silicon_tpot_ms": "10.2"}
    found = clean([rounded, ROW, another])
    assert [(row.name, row.version) for row in found.rows] == [("b", "0.17.0"), ("c", "0.17.0")]
    assert found.counts[REPEATED] == 1


def test_other_settings_are_another_run() -> None:
    source = ROW["silicon_data_source"].replace("=8", "=16")
    found = clean([ROW, ROW | {"osl": "8192"}, ROW | {"silicon_data_source": source}])
    assert len(found.rows) == 3


def test_seconds_and_latency() -> None:
    row = clean([ROW]).rows[0]
    assert (row.ttft, row.tpot) == (0.1, 0.01)
    assert row.latency == pytest.approx(0.1 + 0.01 * 1023)
    assert row.concurrency == 8
    assert row.cell == "minimax|b200_sxm|vllm"


@pytest.mark.parametrize(
    ("model", "engine", "date", "dp", "drafts"),
    [
        ("deepseek-ai/DeepSeek-R1", "trtllm", "2026-02-05", 1, 3),
        ("deepseek-ai/DeepSeek-R1", "trtllm", "2026-01-14", 8, 1),
        ("deepseek-ai/DeepSeek-R1", "trtllm", "2026-01-29", 1, 0),
        ("openai/gpt-oss-120b", "trtllm", "2026-02-05", 1, 0),
        ("deepseek-ai/DeepSeek-R1", "sglang", "2026-02-05", 1, 0),
    ],
)
def test_drafts_are_known_by_campaign(
    model: str, engine: str, date: str, dp: int, drafts: int
) -> None:
    source = f"x; silicon_concurrency=4; measured={date}T00:00:00Z; wip=False"
    labels = _labels(8, 1, 8, 1) if dp == 1 else _labels(1, 8, 1, 8)
    row = {"model_path": model, "backend": engine, "silicon_data_source": source}
    found = clean([ROW | row | labels])
    assert found.rows[0].drafts == drafts
    assert found.counts.get(SPECULATED, 0) == (drafts > 0)
