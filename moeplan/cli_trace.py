"""The options of `moeplan trace`: record, import, stats, convert and synth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[[Any, str, str], Any]
"""Adds a command of a name and a line of help to a group, with what all commands share."""


def add_trace_commands(trace: Any, command: Command) -> None:
    """Add the verbs to the parser of ``trace``."""
    verbs = trace.add_subparsers(dest="verb", required=True, metavar="VERB")
    _record(command(verbs, "record", "run prompts through a Hugging Face model and record it"))
    _import(command(verbs, "import", "read what another tool recorded"))
    _stats(command(verbs, "stats", "is this trace skewed, local, predictable, and long enough?"))
    convert = command(verbs, "convert", "rewrite a trace, or the arrivals of a workload")
    convert.add_argument("source", type=Path, help=".parquet, .npz, .jsonl; or a workload")
    convert.add_argument("target", type=Path, help=".parquet, .npz, .jsonl; arrivals: .jsonl")
    _synth(command(verbs, "synth", "fit a generator to a trace or to loads, and draw from it"))


def _record(parser: Any) -> None:
    parser.add_argument("model", help="folder of a Hugging Face model, or its name on the hub")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help=".jsonl or lines of text"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PARQUET")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="prompts (default 8)")
    parser.add_argument(
        "--candidates", type=int, default=0, metavar="M", help="best experts to keep, above top-k"
    )
    parser.add_argument("--domain-key", default="domain", metavar="KEY", help="of the .jsonl")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )


def _import(parser: Any) -> None:
    parser.add_argument("source", type=Path, nargs="?", help="file or folder")
    parser.add_argument("target", type=Path, nargs="?", help="Parquet file: a trace, or loads")
    parser.add_argument("--format", metavar="NAME", help="without, the one that recognises it")
    parser.add_argument("--model", type=Path, metavar="FILE", help="config.json of the model")
    parser.add_argument("--domain", default="imported", help="kind of text, where none is stated")
    parser.add_argument("--licence", default="not stated", help="of the data")
    parser.add_argument("--list", action="store_true", help="name the formats")


def _stats(parser: Any) -> None:
    parser.add_argument(
        "trace", type=Path, nargs="+", help="Parquet files, a folder of them, or an npz"
    )
    parser.add_argument("--out", type=Path, metavar="HTML", help="write a page with pictures here")
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="plan.json whose local choices are counted"
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of Dask: local, or tcp://HOST:PORT")


def _synth(parser: Any) -> None:
    parser.add_argument("--like", type=Path, metavar="TRACE", help="fit to this trace")
    parser.add_argument("--fit", type=Path, metavar="NPZ", help="a generator fitted before")
    parser.add_argument("--loads", type=Path, metavar="CSV", help="loads of each layer, to be met")
    parser.add_argument("--num-experts", type=int, metavar="E", help="of the model of --loads")
    parser.add_argument("--top-k", type=int, metavar="K", help="of the model of --loads")
    parser.add_argument("--model", help="name of the model of --loads (default synthetic)")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens to draw")
    parser.add_argument("--requests", type=int, metavar="R", help="by the fitted length without")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    parser.add_argument("--out", type=Path, metavar="PARQUET", help="trace to write")
    parser.add_argument("--save-fit", type=Path, metavar="NPZ", help="file for the generator")
