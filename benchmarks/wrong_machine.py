"""Is a wrong figure of the machine found? One at a time: bandwidth x2, FLOP/s x2, fixed times x10.

    python benchmarks/wrong_machine.py MACHINE

MACHINE is what `moeplan calibrate --device cpu` wrote. Each wrong copy is validated
(`moeplan validate --only operators`); writes benchmarks/results/wrong_machine.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from basis import format_quantity, parse_quantity

RESULT = Path(__file__).parent / "results" / "wrong_machine.md"
FIXED = ("launch", "call", "row", "score", "select", "choice")
_DIMENSIONS = {"s": "seconds", "B/s": "bytes per second", "FLOP/s": "FLOP per second"}
Device = dict[str, Any]


def main() -> None:
    """Spoil, validate, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("machine", type=Path)
    asked = options.parse_args()
    text = "\n".join(_page(asked.machine)) + "\n"
    RESULT.write_text(text, encoding="utf-8")
    print(text)


def _page(machine: Path) -> Iterable[str]:
    about = json.loads((machine / "machine.json").read_text(encoding="utf-8"))
    yield "# A wrong machine file is found"
    yield ""
    yield (
        "`python benchmarks/wrong_machine.py MACHINE`: one figure of the calibrated machine is "
        "made wrong, then `moeplan validate --only operators`. "
        f"{about['processor']}, {about['threads']} pinned thread, torch {about['torch']}, "
        f"{about['date'][:10]}. Median |error| in %, of decidable rows, by what limits a row."
    )
    yield ""
    yield (
        "| made wrong | exit code | all | 90th percentile | bandwidth rows | FLOP/s rows | "
        "fixed-time rows | points at | times the value in the file |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, spoil in (
        ("bandwidth x2", _bandwidth),
        ("FLOP/s x2", _flops),
        ("fixed times x10", _fixed),
    ):
        code, found = _validate(machine, spoil)
        summary, first = found["summary"], found["suspects"][0]
        limits = {row["label"]: row["median"] for row in found["by_limit"]}
        shown = (limits.get(n) for n in ("bandwidth", "FLOP/s", "fixed time"))
        cells = ["-" if each is None else f"{100 * each:.1f}" for each in shown]
        pointed = first["limit"] if first["named"] else "nothing"
        yield (
            f"| {name} | {code} | {100 * summary['median']:.1f} | {100 * summary['p90']:.1f} | "
            f"{' | '.join(cells)} | {pointed} | {first['factor']:.2g} |"
        )


def _validate(machine: Path, spoil: Callable[[Device], None]) -> tuple[int, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "machine"
        shutil.copytree(machine, wrong)
        device = yaml.safe_load((wrong / "device.yaml").read_text(encoding="utf-8"))
        spoil(device)
        (wrong / "device.yaml").write_text(yaml.safe_dump(device, sort_keys=False))
        command = ["validate", "--machine", str(wrong), "--only", "operators", "--json"]
        run = "import sys; from moeplan.cli import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", run, *command], stdout=subprocess.PIPE, check=False
        )
    return done.returncode, json.loads(done.stdout)["operators"]


def _bandwidth(device: Device) -> None:
    _times(device["memories"]["host"]["bandwidth"], "value", 2, "B/s")


def _flops(device: Device) -> None:
    for figure in device["processors"]["cpu"]["flops"].values():
        _times(figure, "value", 2, "FLOP/s")


def _fixed(device: Device) -> None:
    for by_dtype in device["processors"]["cpu"]["kernels"].values():
        for cost in {id(cost): cost for cost in by_dtype.values()}.values():
            for name in set(FIXED) & set(cost):
                _times(cost, name, 10, "s")


def _times(entry: dict[str, Any], name: str, factor: float, unit: str) -> None:
    value = parse_quantity(entry[name], _DIMENSIONS[unit])
    entry[name] = format_quantity(factor * value, unit, 6)


if __name__ == "__main__":
    main()
