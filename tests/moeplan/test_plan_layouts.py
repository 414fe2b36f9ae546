"""`moeplan plan` with layouts: all, from scenario to plan.json, terminal, report and exports."""

import copy
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from basis.errors import InputError
from moeplan.cli import main
from moeplan.engines import export_notes, export_plan
from moeplan.front_chart import front_chart
from moeplan.layout_report import render_layouts

Plan = dict[str, Any]
WANTED = {"layouts": "all", "steps": 2, "seeds": 2, "layouts_time_limit": "4 s"}
SWEEP = {"input_tokens": 100, "output_tokens": 60, "concurrency": [8, 64]}
KEYS = {
    "schema",
    "moe_layer_ids",
    "physical_to_logical_map",
    "dispatch",
    "parallelism",
    "deployment",
    "certificate",
    "predicted",
    "baselines",
    "alternatives",
    "evidence",
    "layouts",
}


@pytest.fixture(scope="module")
def swept(write_scenario: Callable[..., Path], tmp_path_factory: Any) -> tuple[Path, Path]:
    """Return scenario and output folder of a plan over two batch sizes."""
    folder = tmp_path_factory.mktemp("swept")
    path = write_scenario(folder, workload=SWEEP, plan=WANTED)
    assert main(["plan", str(path), "--out", str(folder / "out")]) == 0
    return path, folder / "out"


@pytest.fixture
def plan(swept: tuple[Path, Path]) -> Plan:
    return json.loads((swept[1] / "plan.json").read_text())


def _simulated(capsys: pytest.CaptureFixture[str], path: Path, out: Path) -> float:
    capsys.readouterr()
    arguments = ["simulate", str(path), "--deployment", str(out / "plan.json"), "--json"]
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)["summary"]["tokens_per_second"]


def test_the_contract_is_kept(plan: Plan, swept: tuple[Path, Path]) -> None:
    assert set(plan) >= KEYS
    assert plan["schema"] == "moeplan.plan/1"
    proof = plan["certificate"]
    assert proof["bound"] >= proof["objective"]
    gap = (proof["bound"] - proof["objective"]) / proof["objective"]
    assert proof["gap"] == pytest.approx(gap, abs=1e-12)
    assert proof["status"] == ("optimal" if plan["layouts"]["proof"]["proved"] else "time_limit")
    for figures in plan["baselines"].values():
        assert set(figures) == set(plan["predicted"])
    assert {"tokens_per_second", "step_time_s"} <= set(plan["predicted"])
    assert all({"name", "why"} == set(lost) for lost in plan["alternatives"])
    written = {p.name for p in swept[1].iterdir()}
    assert {"plan.json", "report.html", "timeline.json"} <= written


def test_the_choice_is_of_the_front_and_the_front_ascends(plan: Plan) -> None:
    found = plan["layouts"]
    front, chosen = found["front"], found["chosen"]
    for one, other in itertools.pairwise(front):
        assert one["tpot_s"] < other["tpot_s"]
        assert one["tokens_per_second"] < other["tokens_per_second"]
    assert plan["chosen"] == chosen["layout"]
    assert chosen["running_requests"] in SWEEP["concurrency"]
    beaten = [p for p in front if p["tokens_per_second"] > 1.01 * chosen["tokens_per_second"]]
    assert beaten == []
    speed = chosen["running_requests"] / chosen["tpot_s"]
    assert chosen["tokens_per_second"] == pytest.approx(speed)
    assert chosen["tokens_per_second_per_gpu"] == pytest.approx(speed / 4)


def test_memory_terms_add_up(plan: Plan) -> None:
    memory = plan["layouts"]["chosen"]["memory_bytes"]
    terms = ("weights", "experts", "kv_cache", "activations", "communication")
    assert sum(memory[term] for term in terms) == pytest.approx(memory["total"])
    assert memory["total"] <= memory["usable"]


def test_simulate_reproduces_the_prediction_of_a_sweep(
    plan: Plan, swept: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = _simulated(capsys, *swept)
    assert found == pytest.approx(plan["layouts"]["tokens_per_second_by_seed"][0], rel=1e-9)


def test_simulate_reproduces_the_prediction_of_one_batch_size(
    scenario: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scenario(plan={**WANTED, "layouts_time_limit": "1 s"}, workload={"decode_batch": 16})
    assert main(["plan", str(path), "--out", str(tmp_path / "out")]) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["layouts"]["chosen"]["running_requests"] == 16
    found = _simulated(capsys, path, tmp_path / "out")
    assert found == pytest.approx(plan["layouts"]["tokens_per_second_by_seed"][0], rel=1e-9)
    mean = sum(plan["layouts"]["tokens_per_second_by_seed"]) / 2
    assert plan["predicted"]["tokens_per_second"] == pytest.approx(mean)


def test_slots_that_do_not_divide_over_all_ranks_are_no_error(
    scenario: Callable[..., Path], tmp_path: Path
) -> None:
    path = scenario(gpus=3, plan=WANTED)  # 8 experts over 3 ranks: only with redundant experts
    assert main(["plan", str(path), "--out", str(tmp_path / "out")]) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    ep = plan["parallelism"]["experts"]["ep"]
    assert len(plan["physical_to_logical_map"][0]) % ep == 0
    left_out = {lost["name"]: lost["why"] for lost in plan["alternatives"]}
    assert "3" in left_out["tensor_parallel"]  # 8 heads and 3 ranks
    assert "tensor_parallel" not in plan["baselines"]


def test_people_read_front_memory_runner_up_and_proof(
    scenario: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scenario(workload=SWEEP, plan={**WANTED, "layouts_time_limit": "1 s"})
    assert main(["plan", str(path), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["verdict"]["answer"] in printed
    for words in ("Pareto front", "per GPU", "TPOT p99", "KV cache", "other split, interleaved"):
        assert words in printed
    assert plan["layouts"]["proof"]["statement"] in printed
    assert plan["layouts"]["runner_up"]["why_lost"] in printed
    assert f"and {len(plan['alternatives']) - 4} more in plan.json" in printed


def test_one_gpu_has_one_layout_and_no_runner_up(
    scenario: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scenario(gpus=1, plan=WANTED)
    assert main(["plan", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "no other layout fits" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.html").read_text()
    assert "There is no runner-up" in report


def test_the_report_shows_every_point_of_the_front(plan: Plan, swept: tuple[Path, Path]) -> None:
    page = (swept[1] / "report.html").read_text()
    assert page == render_layouts(plan)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script", page)
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    circles = [e for e in ElementTree.fromstring(svg).iter() if e.tag == "circle"]
    assert len(circles) == len(plan["layouts"]["front"]) + 1  # the choice lies on top
    for text in (plan["verdict"]["answer"], plan["layouts"]["confirmation"]):
        assert text in page


def test_better_points_lie_higher_and_faster_ones_further_left() -> None:
    points = [
        {"layout": f"L{i}", "running_requests": n, "tpot_s": t, "tokens_per_second": n / t}
        for i, (n, t) in enumerate([(1, 0.002), (16, 0.004), (512, 0.03)])
    ]
    svg = ElementTree.fromstring(str(front_chart(points, points[-1])))
    dots = [e for e in svg.iter("circle") if e.get("class") == "dot"]
    x, y = ([float(str(e.get(k))) for e in dots] for k in ("cx", "cy"))
    assert x == sorted(x)
    assert y == sorted(y, reverse=True)
    assert 0 < min(x) < max(x) < 360


def test_a_single_point_is_drawn() -> None:
    point = {"layout": "L", "running_requests": 8, "tpot_s": 0.01, "tokens_per_second": 800.0}
    assert front_chart([point], point).count("<circle") == 2


def _with_layout(plan: Plan, attention: dict[str, int], experts: dict[str, Any]) -> Plan:
    changed = copy.deepcopy(plan)
    changed["parallelism"] = {"attention": attention, "experts": experts}
    slots = 8 if 8 % experts["ep"] == 0 else 9
    changed["physical_to_logical_map"] = [[s % 8 for s in range(slots)] for _ in range(4)]
    return changed


@pytest.mark.parametrize(
    ("engine", "attention", "experts", "message"),
    [
        ("sglang", (4, 1, 1), {"ep": 2, "tp": 1}, "ep x tp must be all ranks"),
        ("trtllm", (4, 1, 1), {"ep": 2, "tp": 1}, "ep x tp must be all ranks"),
        ("trtllm", (2, 2, 1), {"ep": 4, "tp": 1}, "dp or tp must be 1"),
        ("sglang", (4, 1, 1), {"ep": 2, "tp": 2}, "need ep = all ranks"),
        ("sglang", (2, 1, 2), {"ep": 2, "tp": 1}, "plan with pp 1"),
        ("llama.cpp", (4, 1, 1), {"ep": 4, "tp": 1}, "export to sglang, trtllm"),
    ],
)
def test_layouts_that_an_engine_cannot_say_are_refused(
    plan: Plan, tmp_path: Path, engine: str, attention: Any, experts: Plan, message: str
) -> None:
    dp, tp, pp = attention
    changed = _with_layout(plan, {"dp": dp, "tp": tp, "pp": pp}, experts)
    with pytest.raises(InputError, match=message):
        export_plan(changed, engine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensor_parallelism_needs_no_map(plan: Plan, tmp_path: Path) -> None:
    changed = _with_layout(plan, {"dp": 1, "tp": 4, "pp": 1}, {"ep": 1, "tp": 4})
    (flags,) = export_plan(changed, "sglang", tmp_path / "s")
    assert "--tp-size 4" in flags.read_text()
    assert "--init-expert-location" not in flags.read_text()
    files = export_plan(changed, "trtllm", tmp_path / "t")
    assert {f.name for f in files} == {"extra_llm_api_options.yaml", "flags.txt"}
    assert "load_balancer" not in files[0].read_text()
    assert "--tp_size 4 --ep_size 1" in files[1].read_text()


def test_all_gather_is_the_engines_own_exchange(plan: Plan, tmp_path: Path) -> None:
    changed = _with_layout(
        plan, {"dp": 4, "tp": 1, "pp": 1}, {"ep": 2, "tp": 2, "exchange": "all_gather"}
    )
    text = export_plan(changed, "sglang", tmp_path)[-1].read_text()
    assert "--moe-a2a-backend none" in text
    assert "--ep-size 2" in text
    assert "by itself" in " ".join(export_notes(changed, "trtllm"))
