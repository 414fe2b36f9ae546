"""The comparison of clusters: the same figures as text, as JSON and as a picture."""

import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from basis.errors import InputError
from moeplan.compare_view import comparison_data, comparison_table, render_comparison

Row = dict[str, Any]
CAUSES = {"attention": 60, "experts": 150, "wait": 46}


@pytest.fixture
def rows() -> list[Row]:
    return [
        {
            "cluster": name,
            "tokens_per_second": speed,
            "low": 0.8 * speed,
            "high": 1.2 * speed,
            "step_time_s": 256 / speed,
            "memory_bytes_per_rank": memory,
            "seconds_by_cause": {n: s / speed for n, s in CAUSES.items()},
            "evidence": "fitted",
        }
        for name, speed, memory in (
            ("hgx-a100-8", 50_000.0, 21e9),
            ("hgx-h100-8", 90_000.0, 21e9),
            ("hgx-b200-8", 150_000.0, 21e9),
        )
    ]


def _text(rows: list[Row]) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparison_table(rows))
    return console.export_text().replace("\u00a0", " ")


def test_table_has_a_line_for_each_cluster(rows: list[Row]) -> None:
    lines = _text(rows).splitlines()
    found = next(line for line in lines if "hgx-h100-8" in line)
    for part in ("90,000", "72,000–108,000", "1.80×", "2.84 ms", "21.0 GB", "experts 58.6 %"):
        assert part in found
    assert not any("TPOT" in line for line in lines)


def test_table_shows_tpot_where_it_is_given(rows: list[Row]) -> None:
    rows[1]["tpot_s"] = 3.1e-3
    assert "3.10 ms" in _text(rows)


def test_data_is_json_and_relative_to_the_first(rows: list[Row]) -> None:
    data = json.loads(json.dumps(comparison_data(rows), allow_nan=False))
    assert data["baseline"] == "hgx-a100-8"
    assert [row["relative"] for row in data["rows"]] == [1.0, 1.8, 3.0]
    assert data["rows"][2]["seconds_by_cause"] == rows[2]["seconds_by_cause"]


def test_picture_is_written_twice_and_is_the_same_each_time(
    rows: list[Row], tmp_path: Path
) -> None:
    svg, png = render_comparison(rows, tmp_path / "new")
    assert png.read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(svg)
    again, _ = render_comparison(rows, tmp_path / "again")
    assert svg.read_bytes() == again.read_bytes()


def test_picture_changes_with_an_interval_and_with_a_cause(rows: list[Row], tmp_path: Path) -> None:
    before = render_comparison(rows, tmp_path / "0")[0].read_bytes()
    rows[0]["low"] *= 0.5
    after = render_comparison(rows, tmp_path / "1")[0].read_bytes()
    assert after != before
    rows[0]["seconds_by_cause"]["combine"] = 1e-3
    assert render_comparison(rows, tmp_path / "2")[0].read_bytes() != after


def test_one_cluster_can_be_shown(rows: list[Row], tmp_path: Path) -> None:
    assert all(path.is_file() for path in render_comparison(rows[:1], tmp_path))


@pytest.mark.parametrize("show", [comparison_table, comparison_data])
def test_rows_that_lack_a_figure_are_refused(rows: list[Row], show: Any) -> None:
    del rows[1]["high"]
    with pytest.raises(InputError, match="hgx-h100-8 lacks high"):
        show(rows)
    with pytest.raises(InputError, match="at least one"):
        show([])
