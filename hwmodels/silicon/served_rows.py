"""Measured runs of served models: the one loader of ``silicon_sample.csv``, development cells only.

A row is one closed-loop run of a serving engine: its layout, request lengths and concurrency, and
the time to first token and per output token. The loader passes over every row of another cell
while it reads, repairs labels by rule, and counts what each rule did.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from hwmodels.silicon.wheel import root

CELLS: tuple[str, ...] = (
    "deepseek|b200_sxm|trtllm",
    "deepseek|b300_sxm|sglang",
    "deepseek|gb200|trtllm",
    "deepseek|h200_sxm|sglang",
    "glm|h200_sxm|sglang",
    "gpt-oss|b200_sxm|trtllm",
    "gpt-oss|b200_sxm|vllm",
    "gpt-oss|h100_sxm|vllm",
    "kimi|b200_sxm|vllm",
    "kimi|h200_sxm|vllm",
    "minimax|b200_sxm|vllm",
    "minimax|h200_sxm|vllm",
    "qwen3-235b|h200_sxm|vllm",
)
"""Model family, system and engine of the development cells; all others are for evaluation."""
FAMILIES = ("deepseek", "glm", "gpt-oss", "kimi", "minimax", "qwen3-235b")
"""Model families, as they occur in a checkpoint's name."""

DISAGGREGATED = "prefill and decode on separate workers: left out"
FLEET = "gb200, tp above 8: GPUs of a disaggregated deployment, left out"
NO_CONCURRENCY = "concurrency not stated: left out"
TWICE = "tp and ep counted twice (tp x dp = moe_tp x moe_ep = n x n): n ranks"
BOTH = "tp and dp both set, experts over tp x dp: the dp factor is not there"
NO_DP = "dp missing: moe_tp x moe_ep / tp"
REPEATED = "the same run exported again: left out"
SPECULATED = "DeepSeek on TensorRT-LLM, campaigns of 2026-01-14 and 2026-02-05/06: drafts of MTP"
_CAMPAIGNS = ("2026-01-14", "2026-02-05", "2026-02-06")
_SAME = 1e-3  # relative difference below which two exports are one run
_ROUNDING = 0.011  # ms; some exports are rounded to hundredths
_MEASURED = re.compile(r"measured=(\d{4}-\d\d-\d\d)")
_CONCURRENCY = re.compile(r"silicon_concurrency=(\d+)")


class Ranks(NamedTuple):
    """Parallel degrees of a run."""

    tp: int
    dp: int
    moe_tp: int
    moe_ep: int

    @property
    def gpus(self) -> int:
        """GPUs of the deployment."""
        return self.tp * self.dp


@dataclass(frozen=True, kw_only=True)
class ServedRow:
    """One measured run."""

    name: str
    """``id`` in the file."""
    family: str
    checkpoint: str
    """``model_path`` in the file."""
    precision: str
    """``precision`` in the file: fp8, fp4, int4."""
    system: str
    """GPU, as the wheel's folders name it."""
    engine: str
    version: str
    """Of the engine; empty where the file does not say."""
    inputs: int
    """Tokens of a prompt."""
    outputs: int
    """Tokens generated for each."""
    concurrency: int
    """Requests in the system."""
    ranks: Ranks
    drafts: int
    """Tokens drafted per step by multi-token prediction; 0: none."""
    ttft: float
    """Time to first token, s."""
    tpot: float
    """Time per output token after the first, s."""

    @property
    def cell(self) -> str:
        """Model family, system and engine."""
        return f"{self.family}|{self.system}|{self.engine}"

    @property
    def latency(self) -> float:
        """Time of a whole request, s: TTFT + TPOT (outputs - 1)."""
        return self.ttft + self.tpot * (self.outputs - 1)


@dataclass(frozen=True, kw_only=True)
class ServedRows:
    """The runs of the development cells, and what the rules did."""

    rows: tuple[ServedRow, ...]
    counts: dict[str, int]
    """Rows that each rule left out or repaired."""


def served_rows() -> ServedRows:
    """Read the runs of the development cells.

    Raises
    ------
    InputError
        If the wheel is not installed.
    """
    with (root() / "silicon_sample.csv").open(newline="", encoding="utf-8") as file:
        return clean(_development(csv.DictReader(file)))


def clean(raw: Iterable[Mapping[str, str]]) -> ServedRows:
    """Leave out and repair by rule; rows as the file has them."""
    counts: Counter[str] = Counter()
    rows = []
    for row in raw:
        refused = _refused(row)
        if refused:
            counts[refused] += 1
            continue
        ranks, rule = repaired(row)
        counts[rule] += bool(rule)
        rows.append(_row(row, ranks))
        counts[SPECULATED] += rows[-1].drafts > 0
    once = _distinct(rows)
    counts[REPEATED] = len(rows) - len(once)
    return ServedRows(rows=tuple(once), counts={rule: n for rule, n in counts.items() if rule})


def family_of(checkpoint: str) -> str | None:
    """Return the family of a checkpoint by its name, or None."""
    return next((f for f in FAMILIES if f in checkpoint.lower()), None)


def repaired(row: Mapping[str, str]) -> tuple[Ranks, str]:
    """Return a run's parallel degrees, and the rule that repaired them (empty: as labelled)."""
    tp, moe_tp, moe_ep = (int(row[key]) for key in ("tp_size", "moe_tp_size", "moe_ep_size"))
    experts = moe_tp * moe_ep
    if not row["attention_dp_size"]:
        return Ranks(tp, experts // tp, moe_tp, moe_ep), NO_DP
    dp = int(row["attention_dp_size"])
    if moe_tp == moe_ep > 1 and tp * dp == experts:
        whole = (moe_ep, 1) if dp == 1 else (1, moe_ep)
        return Ranks(*whole, 1, moe_ep), TWICE
    if tp > 1 and dp > 1 and experts == tp * dp:
        return Ranks(tp, 1, max(moe_tp // dp, 1), max(moe_ep // dp, 1)), BOTH
    return Ranks(tp, dp, moe_tp, moe_ep), ""


def drafts_of(row: Mapping[str, str], ranks: Ranks) -> int:
    """Return the tokens that a run drafts per step, which no column states.

    The recipes have each DeepSeek benchmark on TensorRT-LLM twice, plain and with multi-token
    prediction (three drafts, one with attention data parallelism). Of 47 configurations of one
    checkpoint and layout that were measured twice with TPOTs apart by more than a quarter, the
    faster run is always of one of these campaigns, the slower one never; the database export of
    2026-04-27, without drafts, has none of them.
    """
    found = _MEASURED.search(row["silicon_data_source"])
    deepseek = family_of(row["model_path"]) == "deepseek" and row["backend"] == "trtllm"
    if not deepseek or found is None or found[1] not in _CAMPAIGNS:
        return 0
    return 3 if ranks.dp == 1 else 1


def _development(reader: Iterable[Mapping[str, str]]) -> Iterator[Mapping[str, str]]:
    """Pass over all cells but the development cells."""
    for row in reader:
        if f"{family_of(row['model_path'])}|{row['system']}|{row['backend']}" in CELLS:
            yield row


def _refused(row: Mapping[str, str]) -> str:
    if row["mode"] != "agg":
        return DISAGGREGATED
    if row["system"] == "gb200" and int(row["tp_size"]) > 8:
        return FLEET
    return "" if _CONCURRENCY.search(row["silicon_data_source"]) else NO_CONCURRENCY


def _row(row: Mapping[str, str], ranks: Ranks) -> ServedRow:
    found = _CONCURRENCY.search(row["silicon_data_source"])
    return ServedRow(
        name=row["id"],
        family=family_of(row["model_path"]) or "",
        checkpoint=row["model_path"],
        precision=row["precision"],
        system=row["system"],
        engine=row["backend"],
        version=row["backend_version"],
        inputs=int(row["isl"]),
        outputs=int(row["osl"]),
        concurrency=int(found[1]) if found else 0,
        ranks=ranks,
        drafts=drafts_of(row, ranks),
        ttft=float(row["silicon_ttft_ms"]) / 1e3,
        tpot=float(row["silicon_tpot_ms"]) / 1e3,
    )


def _distinct(rows: list[ServedRow]) -> list[ServedRow]:
    """Keep one row of each run; an export that lacks the version takes another's."""
    kept: dict[tuple[object, ...], list[ServedRow]] = {}
    for row in rows:
        same = kept.setdefault(
            (row.cell, row.precision, row.inputs, row.outputs, row.concurrency, row.ranks), []
        )
        at = next((i for i, other in enumerate(same) if _one_run(row, other)), None)
        if at is None:
            same.append(row)
        elif not same[at].version:
            same[at] = replace(same[at], version=row.version)
    return [row for same in kept.values() for row in same]


def _one_run(row: ServedRow, other: ServedRow) -> bool:
    pairs = ((row.ttft, other.ttft), (row.tpot, other.tpot))
    return all(abs(a - b) <= max(_SAME * b, _ROUNDING / 1e3) for a, b in pairs)
