"""The report as a reader and as a browser meets it: complete, self-contained, escaped, small."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basis.errors import InputError
from moeplan import charts, figures
from moeplan.report import render_report
from moeplan.report_tables import comparison, headline

Plan = dict[str, Any]
Sample = Callable[[str], Plan]
SIZES = ["one_node", "two_nodes", "large"]
_VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers ids, links and the text in reading order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        assert len(named) == len(attrs), f"attribute twice in <{tag}>"
        assert not {"src", "srcset", "onload", "onclick"} & set(named)
        assert tag not in {"script", "link", "iframe", "object", "img"}
        if named.get("id"):
            self.ids.add(str(named["id"]))
        if "href" in named:
            self.targets.append(str(named["href"]))
        if tag == "svg":
            assert named["role"] == "img"
            assert named["aria-label"]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"rect", "circle", "path"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.mark.parametrize("size", SIZES)
def test_page_is_whole_small_and_needs_no_network(sample_plan: Sample, size: str) -> None:
    html = render_report(sample_plan(size))
    page = Page(html)
    assert len(html.encode()) < 1.5e6
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript:", html)
    assert all(target.startswith("#") and target[1:] in page.ids for target in page.targets)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize("size", SIZES)
def test_answer_and_trace_label_come_before_the_table(sample_plan: Sample, size: str) -> None:
    plan = sample_plan(size)
    words = Page(render_report(plan)).words
    order = [
        words.index("Worth it"),
        words.index(plan["verdict"]["answer"]),
        words.index(plan["scenario"]["trace_note"]),
        words.index("Predicted throughput"),
        words.index("Plan against what engines do otherwise"),
        words.index("Load per layer and rank"),
        words.index("Where a step's time goes"),
        words.index("Traffic between ranks"),
        words.index("What is proved"),
        words.index("What the figures rest on"),
        words.index("Warnings and what lost"),
        words.index("How to use the plan"),
        words.index("Sampling floor"),
    ]
    assert order == sorted(order)


def test_strings_of_the_plan_are_escaped(sample_plan: Sample) -> None:
    evil = '"><script>alert(1)</script>&'

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(v) for key, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return value + evil if isinstance(value, str) else value

    plan = sample_plan("one_node")
    kept = {key: plan[key] for key in ("schema", "dispatch", "deployment") if key in plan}
    html = render_report(poison(plan) | kept)
    Page(html)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 20


def test_parts_that_a_plan_may_lack_are_left_out(sample_plan: Sample) -> None:
    plan = sample_plan("one_node")
    for key in ("other_split", "second_stage", "alternatives", "evidence", "warnings"):
        del plan[key]
    del plan["certificate"]["per_layer"], plan["certificate"]["mean_bound"]
    del plan["scenario"]["ranks_per_node"]
    del plan["baselines"]["eplb"], plan["details"]["eplb"], plan["verdict"]["gain_over_eplb"]
    plan["details"]["plan"]["traffic"] = plan["details"]["contiguous"]["traffic"] = None
    plan["scenario"]["trace_note"] = ""
    words = Page(render_report(plan)).words
    gone = ["Same mix", "Second stage", "Warnings", "Trace:", "Traffic between", "Gain over EPLB"]
    assert [part for part in gone if part in words] == []
    assert "What is proved" in words


@pytest.mark.parametrize(
    ("change", "message"),
    [({"schema": "moeplan.plan/0"}, "moeplan.plan/0"), ({"certificate": None}, "certificate")],
)
def test_other_schemas_and_missing_parts_are_refused(
    sample_plan: Sample, change: dict[str, Any], message: str
) -> None:
    plan = sample_plan("small") | change
    plan = {key: value for key, value in plan.items() if value is not None}
    with pytest.raises(InputError, match=message):
        render_report(plan)


def test_shares_say_that_no_engine_takes_them(sample_plan: Sample) -> None:
    plan = sample_plan("one_node") | {"dispatch": "shares"}
    words = Page(render_report(plan)).words
    assert words.count("Cannot be exported") == 2
    assert "moeplan export" not in words


@pytest.mark.parametrize(
    ("tie", "worth_it", "badge"),
    [(True, False, "Tie"), (True, True, "Tie"), (False, False, "Not worth it")],
)
def test_badge_follows_the_verdict(
    sample_plan: Sample, tie: bool, worth_it: bool, badge: str
) -> None:
    plan = sample_plan("one_node")
    plan["verdict"] |= {"tie": tie, "worth_it": worth_it}
    html = render_report(plan)
    assert re.findall(r'<span class="badge \w+">(.*?)</span>', html) == [badge]


def _marks(own: dict[str, float], other: dict[str, float], noise: float) -> list[str]:
    table = comparison(own, {"eplb": other}, noise)
    return [row["cells"][1]["mark"].replace("\u00a0", " ") for row in table["rows"]]


def test_marks_say_tie_within_noise_and_the_direction_beyond() -> None:
    own = {"tokens_per_second": 1000.0, "step_time_s": 1e-3, "straggler": 1.2,
           "memory_bytes_fullest_rank": 2e10}  # fmt: skip
    near = {"tokens_per_second": 1004.0, "step_time_s": 0.996e-3, "straggler": 1.2,
            "memory_bytes_fullest_rank": 2e10}  # fmt: skip
    far = {"tokens_per_second": 800.0, "step_time_s": 1.25e-3, "straggler": 1.08,
           "memory_bytes_fullest_rank": 1.9e10}  # fmt: skip
    assert _marks(own, near, 0.005) == ["tie", "tie", "same", "same"]
    assert _marks(own, far, 0.005) == [
        "plan +25.0 %",
        "25.0 % worse",
        "10.0 % better",
        "5.0 % less",
    ]


def test_table_shows_interval_and_floor_beside_their_figures(sample_plan: Sample) -> None:
    plan = sample_plan("two_nodes")
    table = comparison(plan["predicted"], plan["baselines"], 0.0)
    rows = {row["label"]: row["cells"] for row in table["rows"]}
    assert rows["Throughput"][0]["below"].count("–") == 1
    assert all(cell["below"] == "floor 1.108" for cell in rows["Straggler"])
    assert rows["Throughput"][0]["mark"] == ""
    assert "Cross-node sends" in rows
    assert "Cross-node sends" not in {
        row["label"] for row in comparison({"cross_node_sends": 0.0}, {}, 0.0)["rows"]
    }


def test_headline_calls_a_gain_within_noise_a_tie(sample_plan: Sample) -> None:
    plan = sample_plan("one_node")
    plan["verdict"] |= {"gain_over_default": 0.05, "gain_over_eplb": -0.004, "noise": 0.005}
    tiles = {tile["label"]: tile["figure"].replace("\u00a0", " ") for tile in headline(plan)}
    assert tiles["Gain over engine default"] == "+5.0 %"
    assert tiles["Gain over EPLB"] == "tie"


def test_load_map_colours_lie_on_one_linear_scale() -> None:
    load = np.array([[1.0, 0.0, 2.0, 1.0], [1.5, 0.5, 1.0, 1.0]])
    assert charts.load_span([load, np.ones((2, 4))]) == 1.0
    svg = charts.load_map(load, 1.0, name="x", layer_ids=[3, 4], ranks_per_node=2)
    assert re.findall(r'<rect class="k(\d+)"', svg) == [
        "10",
        "0",
        "20",
        "10",
        "15",
        "5",
        "10",
        "10",
    ]
    assert "layer 4, rank 0: 1.50×" in svg
    assert svg.count('class="node"') == 1
    one_node = charts.load_map(load, 1.0, name="x", layer_ids=[3, 4], ranks_per_node=4)
    assert 'class="node"' not in one_node


def test_report_draws_every_cell_of_every_panel(sample_plan: Sample) -> None:
    plan = sample_plan("large")
    html = render_report(plan)
    assert len(re.findall(r'<rect class="k\d+"', html)) == 3 * 58 * 32
    assert len(re.findall(r'<rect class="t\d+"', html)) == 3 * 32 * 32
    load = np.array(plan["details"]["contiguous"]["rank_load"])
    worst = plan["moe_layer_ids"][int(load.max(axis=1).argmax())]
    assert f"{load.max():.2f}× in layer {worst}" in html


def test_traffic_between_nodes_is_the_closed_form_for_uniform_traffic(sample_plan: Sample) -> None:
    plan = sample_plan("two_nodes")
    uniform = np.ones((16, 16)) - np.eye(16)
    for detail in plan["details"].values():
        detail["traffic"] = uniform.tolist()
    html = render_report(plan)
    assert html.count(f"{100 * 8 / 15:.1f}\u00a0% of it between nodes") == 3


def test_bars_are_as_long_as_their_times(sample_plan: Sample) -> None:
    plan = sample_plan("one_node")
    html = render_report(plan)
    bars = re.findall(r'<div class="bar".*?</div>', html, re.DOTALL)
    lengths = [sum(map(float, re.findall(r"width:([\d.]+)%", bar))) for bar in bars]
    names = ["plan", "contiguous", "round_robin", "eplb"]
    times = [sum(plan["details"][n]["seconds_by_cause"].values()) for n in names]
    assert np.allclose(np.array(lengths) / lengths[0], np.array(times) / times[0], rtol=0.005)
    assert "embed" not in html  # takes no time


def test_very_large_maps_drop_hover_titles_to_stay_small() -> None:
    assert charts.with_titles([np.zeros((58, 32))] * 3)
    assert not charts.with_titles([np.zeros((58, 72))] * 3)
    bare = charts.load_map(
        np.ones((2, 2)), 1.0, name="x", layer_ids=[0, 1], ranks_per_node=None, titles=False
    )
    assert "<title>" not in bare


@given(st.floats(1e-12, 1e15), st.integers(2, 6))
def test_number_keeps_its_significant_digits(value: float, digits: int) -> None:
    shown = float(figures.number(value, digits).replace(",", ""))
    assert shown == pytest.approx(value, rel=0.5001 * 10.0 ** (1 - digits))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (figures.number(12345.6), "12,350"),
        (figures.number(0.041236), "0.04124"),
        (figures.number(999.96), "1,000"),
        (figures.number(None), "–"),
        (figures.number(float("nan")), "–"),
        (figures.seconds(2.412e-3), "2.41 ms"),
        (figures.seconds(9.999e-4), "1.00 ms"),
        (figures.seconds(3.1e-7), "310 ns"),
        (figures.data_size(61.23e9), "61.2 GB"),
        (figures.data_size(0), "0 B"),
        (figures.percent(0.0316, signed=True), "+3.2 %"),
        (figures.percent(-0.004), "−0.40 %"),
        (figures.count(8192), "8,192"),
        (figures.interval(None, 3.0), ""),
    ],
)
def test_figures_read_as_people_write_them(text: str, expected: str) -> None:
    assert text.replace("\u00a0", " ") == expected
