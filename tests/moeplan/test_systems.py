"""Every published system runs, prints its claims, and keeps the direction that the guide says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from basis.errors import InputError
from moeplan.cli import main
from moeplan.composition import composition_answer, run
from moeplan.composition_file import Composition, read_composition
from simulator.deployment import Workload

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ROOT / "examples" / "systems"
GUIDE = ROOT / "docs" / "guides" / "published-systems.md"
FILES = sorted(SYSTEMS.glob("*.yaml"))
NAMES = {
    "Duplex", "DeepSpeed-MoE", "HybriMoE", "MoE Parallel Folding", "MoE-Infinity", "MoE-Lens",
    "MoETuner", "MoNDE", "Pre-gated MoE", "SE-MoE",
}  # fmt: skip
SLOW = {"moetuner"}
"""Plan their placement: a few requests and a small prompt show the direction."""


def _small(path: Path) -> Composition:
    """Shorten a composition so that it runs in a second; its tokens per step stay."""
    composition = read_composition(path)
    steps = {"hybrimoe": 16, "moe-infinity": 16, "pre-gated-moe": 8}.get(path.stem, 2)
    update: dict[str, Any] = {"steps": steps}
    if path.stem in SLOW:
        assert not isinstance(composition.trace, str)
        update["trace"] = composition.trace.model_copy(update={"tokens": 2048, "requests": 8})
        update["workloads"] = (Workload(prefill_tokens=1024),)
    return composition.model_copy(update=update)


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    found = {}
    for path in FILES:
        composition = _small(path)
        found[composition.system] = composition_answer(composition, run(composition, SYSTEMS))
    return found


def test_the_ten_systems_are_there(answers: dict[str, dict[str, Any]]) -> None:
    assert set(answers) == NAMES


def test_every_variant_runs_but_those_that_cannot_fit(answers: dict[str, dict[str, Any]]) -> None:
    refused = {
        (name, r["variant"], r["workload"].get("decode_batch"))
        for name, answer in answers.items()
        for r in answer["runs"]
        if r["summary"] is None
    }
    assert refused == {("MoE-Lens", "gpu-attention", 4664)}
    for answer in answers.values():
        assert all(r["summary"]["tokens_per_second"] > 0 for r in answer["runs"] if r["summary"])


def test_every_system_has_a_claim_with_its_source(answers: dict[str, dict[str, Any]]) -> None:
    for answer in answers.values():
        assert answer["claims"]
        assert any(claim["ours"] is not None for claim in answer["claims"])


def _rows(page: str) -> list[list[str]]:
    table = page.split("<!-- begin: benchmarks/systems.py -->")[1].split("<!-- end -->")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_guide_says_the_direction_that_is_found(answers: dict[str, dict[str, Any]]) -> None:
    rows = _rows(GUIDE.read_text(encoding="utf-8"))
    page = {(row[0], row[1]): row for row in rows}
    claims = [(name, claim) for name, its in answers.items() for claim in its["claims"]]
    assert len(page) == len(rows) == len(claims)
    words = {True: "same", False: "opposite"}
    for name, claim in claims:
        row = page[name, claim["claim"]]
        assert row[6] == claim["remark"]
        if claim["same_direction"] is None:
            assert row[5] == ("" if claim["ours"] is None else "figure")
        else:
            assert row[5] == words[claim["same_direction"]], (name, claim)
            assert row[6] or claim["same_direction"], "an opposite direction needs its reason"


def test_a_run_prints_claim_and_confidence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(SYSTEMS / "moe-lens.yaml")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "outperforms the state-of-the-art solution by 4.6x on average" in shown
    assert "(abstract)" in shown
    assert "claimed 972, ours" in shown
    assert "cannot run: mixtral-8x7b does not fit on moelens-a40: memory hbm" in shown


def test_a_run_answers_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(SYSTEMS / "se-moe.yaml"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (claim,) = answer["claims"]
    assert claim["confidence"] == "A"
    assert claim["claimed"] == 1.13
    assert claim["same_direction"] is True


def _write(tmp_path: Path, **changes: Any) -> Path:
    data = yaml.safe_load((SYSTEMS / "se-moe.yaml").read_text(encoding="utf-8")) | changes
    path = tmp_path / "system.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


RING = {"home": "host", "predictor": {"name": "all"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"claims": [{"text": "x", "confidence": "A", "ours": {"of": "rings"}}]},
            "'rings' is not a variant -- variants are ring, no-overlap, gpu-only",
        ),
        ({"baseline": "base"}, "'base' is not a variant"),
        ({"workload": []}, "workload: unknown key -- did you mean 'workloads'?"),
        ({"variants": {"no-overlap": {"ofload": RING}, "ring": {}}}, "did you mean 'offload'?"),
        (
            {"variants": {"ring": {"cache": {"share": 0.5}}, "no-overlap": {}}},
            "cache needs offload -- say where the other experts live",
        ),
        (
            {"variants": {"ring": {"cache": {"share": 0.5}, "offload": {"cache": {"slots": 1}}},
                          "no-overlap": {}}},
            "cache and offload.cache -- give one of them",
        ),
        ({"model": "models/none.yaml"}, "model: .*none.yaml does not exist -- give a path"),
        ({"cluster": "pregated"}, "unknown cluster 'pregated' -- did you mean"),
        ({"trace": {"exponnt": 1}}, "1 error trace.synthetic.exponnt: .* did you mean 'exponent'"),
        ({"trace": {"context": [5, 2]}}, r"context \[5, 2\] -- from 0, the smaller one first"),
    ],
)  # fmt: skip
def test_a_bad_file_gives_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "models").symlink_to(SYSTEMS / "models")
    assert main(["simulate", str(_write(tmp_path, **changes))]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("error: ") == 1
    assert re.search(message, shown), shown


def test_another_trace_that_lacks_something_is_a_row(tmp_path: Path) -> None:
    """MRS needs 2k candidates; the bundled trace has only the chosen experts."""
    composition = read_composition(SYSTEMS / "hybrimoe.yaml")
    wanted = {"steps": 4, "workloads": composition.workloads[:1], "cluster": "workstation-rtx4090"}
    found = run(
        composition.model_copy(update=wanted),
        SYSTEMS,
        model=ROOT / "examples" / "data" / "example-moe-config.json",
        trace=ROOT / "examples" / "data" / "example-moe-12x32.parquet",
    )
    refused = {r.variant: r.refused for r in found if r.result is None}
    assert set(refused) == {"hybrimoe", "all-predicted", "without-prefetch", "mrs-only"}
    assert all("needs the 2k" in why for why in refused.values())
    answer = composition_answer(composition, found)
    assert all(claim["ours"] is None for claim in answer["claims"])


def test_a_wrong_file_is_refused_also_in_its_own_words() -> None:
    """The file's own facts must fit its variants: no row hides that."""
    composition = read_composition(SYSTEMS / "hybrimoe.yaml")
    assert not isinstance(composition.trace, str)
    plain = composition.trace.model_copy(update={"candidates": None})
    with pytest.raises(InputError, match="needs the 2k"):
        run(composition.model_copy(update={"trace": plain}), SYSTEMS)
