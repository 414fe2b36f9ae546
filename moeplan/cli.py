"""The command line: parses, calls one function per command, and turns errors into exit codes.

Exit codes: 0 done, 1 the answer is no (infeasible), 2 bad input, 130 interrupted, 141 nobody reads
on. With ``--json`` the result goes to stdout as JSON and everything else to stderr.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from basis.errors import InfeasibleError, InputError, MoeplanError
from moeplan.cli_trace import add_trace_commands
from moeplan.engines import ENGINES
from moeplan.sections import SECTIONS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; one test lists every option, so that they stay few."""
    parser = argparse.ArgumentParser(
        prog="moeplan", description="Predict and plan the deployment of MoE language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = _command(
        commands, "plan", "place experts, choose a layout or what to offload, with a proof"
    )
    plan.add_argument("scenario", type=Path, help="scenario YAML")
    plan.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")

    simulate = _command(
        commands, "simulate", "predict one deployment of a scenario, or a published system"
    )
    simulate.add_argument("scenario", type=Path, help="scenario or composition YAML")
    simulate.add_argument("--model", type=Path, metavar="FILE", help="another config.json")
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="another routing trace")
    simulate.add_argument(
        "--deployment",
        default="contiguous",
        metavar="NAME|FILE",
        help="contiguous, round_robin, eplb, or a plan.json or deployment file",
    )
    simulate.add_argument("--out", type=Path, metavar="DIR", help="write result and timeline here")

    compare = _command(commands, "compare", "plan the same work on several clusters")
    compare.add_argument("scenario", type=Path, help="scenario YAML; its cluster is replaced")
    compare.add_argument(
        "--clusters", nargs="+", required=True, metavar="NAME|FILE", help="clusters to compare"
    )
    compare.add_argument("--out", type=Path, metavar="DIR", help="write table and picture here")

    trace = commands.add_parser("trace", help="record, read, understand or draw routing traces")
    add_trace_commands(trace, _command)

    hardware = commands.add_parser("hardware", help="the catalog of devices and clusters")
    verbs = hardware.add_subparsers(dest="verb", required=True, metavar="VERB")
    _command(verbs, "list", "names of devices, memories and clusters")
    show = _command(verbs, "show", "every figure of a device, memory or cluster with its source")
    show.add_argument("name", help="catalog name, or path of a YAML file")
    check = _command(verbs, "check", "find sparse FLOPS, two-way links, GB for GiB, broken physics")
    check.add_argument(
        "name",
        nargs="*",
        metavar="NAME|FILE",
        help="catalog names or YAML files; all of the catalog without; exit code 2 on errors",
    )

    _calibrate(commands)
    _validate(commands)

    export = _command(commands, "export", "write a plan as the file that an engine loads")
    export.add_argument("plan", type=Path, help="plan.json")
    export.add_argument("--to", required=True, choices=ENGINES, dest="engine")
    export.add_argument("--out", type=Path, required=True, metavar="DIR")

    demo = _command(commands, "demo", "plan the bundled example")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR")
    return parser


def _calibrate(commands: Any) -> None:
    """Options of the two kinds of calibration: this machine, and the engines' tables."""
    calibrate = _command(commands, "calibrate", "fit cost models to this machine, or to tables")
    calibrate.add_argument(
        "--device",
        nargs="+",
        metavar="NAME",
        help="cpu or cuda: measure this machine; with --from silicon catalog devices, all without",
    )
    calibrate.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    calibrate.add_argument(
        "--threads", type=int, default=1, metavar="N", help="pinned threads of a rank (default 1)"
    )
    calibrate.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="that products are measured in"
    )
    calibrate.add_argument(
        "--noisy", action="store_true", help="go on where repeats spread by more than 5 %%"
    )
    calibrate.add_argument(
        "--from",
        choices=("silicon",),
        dest="origin",
        help="silicon: the tables of aiconfigurator-core (pip install 'moeplan[silicon]')",
    )
    calibrate.add_argument("--engine", nargs="+", metavar="NAME", help="engines; all without")
    calibrate.add_argument(
        "--rows", type=Path, metavar="DIR", help="write every row, measured and predicted (Parquet)"
    )


def _validate(commands: Any) -> None:
    """Options of validation: measured here and now, or by others."""
    validate = _command(
        commands, "validate", "measure and predict the same work; exit code 1 if they disagree"
    )
    validate.add_argument(
        "scenario", type=Path, nargs="?", help="scenario YAML; the bundled small decoder without"
    )
    validate.add_argument(
        "--machine",
        type=Path,
        default=Path("machine"),
        metavar="DIR",
        help="what calibrate --device wrote (default machine)",
    )
    validate.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="PART", help=f"of {', '.join(SECTIONS)}"
    )
    validate.add_argument(
        "--bound", type=float, default=0.10, metavar="SHARE", help="median |error| that passes"
    )
    validate.add_argument(
        "--rounds", type=int, metavar="N", help="interleaved repeats, instead of each part's own"
    )
    validate.add_argument(
        "--runs",
        type=Path,
        metavar="FILE",
        help="compare with runs of vLLM, SGLang, llama-bench or a CSV instead of measuring",
    )
    validate.add_argument(
        "--deployment", default="contiguous", metavar="NAME|FILE", help="of the runs"
    )
    validate.add_argument("--out", type=Path, metavar="DIR", help="write result and pictures here")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        _check_packages()
        options = build_parser().parse_args(arguments)
        return _run(options)
    except InfeasibleError as error:
        lines = [
            f"infeasible: {error}",
            *(f"  would make it fit: {lever}" for lever in error.levers),
        ]
        print("\n".join(lines), file=sys.stderr)
        return 1
    except MoeplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error} -- check the path", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from moeplan import commands, console  # heavy imports only once the arguments are good

    name = "_".join(p for p in (options.command, getattr(options, "verb", None)) if p)
    result = getattr(commands, name)(options)
    if options.json:
        try:
            json.dump(result, sys.stdout, indent=1, allow_nan=False)
            print(flush=True)
        except BrokenPipeError:
            console.end_unread()
    if result.get("errors"):  # only a check of files counts them
        return 2
    return 1 if result.get("failed") else 0  # sections of a validation


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="result as JSON on stdout")
    return parser


def _check_packages() -> None:
    """Refuse to run on someone else's package of the same name (PyPI has a few)."""
    import importlib.util

    home = Path(__file__).resolve().parents[1]
    for name in ("basis", "traces", "hwmodels", "simulator", "planner"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
        if found != home:
            raise InputError(
                f"the package {name!r} that Python finds is not moeplan's ({found}) -- install "
                "moeplan in an environment of its own: pipx install moeplan, or a fresh venv"
            )
