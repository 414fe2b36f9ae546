"""``moeplan hardware check``: all findings of all files, as text or JSON, and the exit code."""

import json
from pathlib import Path

import pytest

from moeplan.cli import main

WRONG = Path(__file__).parents[1] / "hwmodels" / "wrong_devices"


def test_errors_make_the_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(WRONG / f"{name}.yaml") for name in ("two-way-link", "no-source")]
    assert main(["hardware", "check", *files, "h100", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert (answer["errors"], answer["warnings"]) == (1, 1)
    assert [f["file"] for f in answer["findings"]] == files
    assert answer["findings"][0]["where"] == "node.interconnect.bandwidth"
    assert set(answer["findings"][0]) == {"file", "level", "where", "message"}


def test_warnings_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    file = WRONG / "decimal-capacity.yaml"
    assert main(["hardware", "check", str(file)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning" in printed
    assert "80 GB are the stacks' 80 GiB" in printed
    assert "1 finding" in printed


@pytest.mark.parametrize(
    "name", ["h10", "none/such.yaml", str(WRONG / "efficiency-above-one.yaml")]
)
def test_what_cannot_be_read_is_one_message(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware", "check", name]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.out == ""


def test_parts_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware", "list", "--json"]) == 0
    assert "micron-cz120-256gb" in json.loads(capsys.readouterr().out)["memories"]
    assert main(["hardware", "show", "micron-cz120-256gb", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bandwidth"]["value"] == pytest.approx(36e9)
    assert shown["name"] == "micron-cz120-256gb"
