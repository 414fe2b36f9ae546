"""Text for people comes out as it is, and a reader that stops reading is no error."""

import argparse
import os
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from moeplan import console
from moeplan.cli import main

_NAME = "gpt[/red] [b]:smile:"


@pytest.mark.parametrize("json", [False, True])
def test_names_are_no_markup(json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    screen = console.of(argparse.Namespace(json=json))
    table = Table(_NAME, title=_NAME)
    table.add_row(_NAME)
    screen.print(_NAME)
    screen.print(table)
    said = capsys.readouterr()
    assert (said.err if json else said.out).count(_NAME) == 4


def test_progress_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "is_terminal", True)
    with console.progress(console.of(argparse.Namespace(json=False))) as tell:
        tell(_NAME)  # markup would be an error


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_reader_that_has_gone(option: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    begin = "import sys; from moeplan.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", begin, "hardware", "list", *option],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 141
    # with --json the tables are on stderr, and nothing else
    assert "pipe" not in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moeplan.commands.hardware_list", stopped)
    assert main(["hardware", "list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
