"""Pages and examples stay true: generated pages are current, links lead somewhere, demos run."""

import importlib.util
import re
from pathlib import Path

import pytest

from moeplan.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_generated_reference_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "reference" / "scenario.md").read_text() == module.scenario_page()
    assert (DOCS / "reference" / "command-line.md").read_text() == module.command_page()


@pytest.mark.parametrize(
    "page", sorted([*DOCS.rglob("*.md"), ROOT / "README.md"]), ids=lambda p: p.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_docs_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    for page in DOCS.rglob("*.md"):
        if page.parent.name != "design" and page != DOCS / "README.md":
            assert f"{page.parent.name}/{page.name}" in index


def test_the_demo_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    assert "not a production model" in printed
    assert str(tmp_path / "demo" / "report.html") in printed
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
