"""`moeplan trace synth`: fit a generator of routing traces, draw a trace from it, or both.

What is fitted comes from a trace (``--like``), from a saved generator (``--fit``), or from a file
of loads (``--loads``), where one of the other two may lend what loads do not tell.
"""

import argparse
from typing import Any

from basis.errors import InputError
from basis.files import check_file, check_target, refuse_same
from moeplan import console
from traces.convert import read_npz
from traces.routing_trace import read_trace
from traces.synth import loadstats_layers, shares_from_loadstats
from traces.synth_draw import request_lengths, write_drawn
from traces.synth_fit import fit_trace
from traces.synth_loads import fit_loads
from traces.synth_model import SynthFit, load_fit, save_fit


def synth(options: argparse.Namespace) -> dict[str, Any]:
    """Fit or open a generator; write it, a trace, or both."""
    _check(options)
    screen = console.of(options)
    files = []
    with console.progress(screen) as tell:
        fit = _generator(options, tell)
        if options.save_fit:
            save_fit(fit, options.save_fit)
            files.append(str(options.save_fit))
        lengths = None
        if options.out:
            lengths = request_lengths(
                fit, tokens=options.tokens, requests=options.requests, seed=options.seed
            )
            tell(f"draw {options.tokens} tokens")
            write_drawn(fit, lengths, options.out, seed=options.seed)
            files.append(str(options.out))
    answer = {
        "synthetic": True,
        "model": fit.meta.model,
        "note": fit.meta.note,
        "tokens": options.tokens if options.out else None,
        "requests": None if lengths is None else len(lengths),
        "kinds": len(fit.kinds.share),
        "processes": [
            {
                "name": process.name,
                "decay": process.decay,
                "common_variance": float(process.common.mean()),
                "own_variance": float(process.own.mean()),
            }
            for process in fit.processes
        ],
        "files": files,
    }
    screen.print(f"{fit.meta.model}: {fit.meta.note}")
    for name in files:
        screen.print(f"wrote {name}")
    return answer


def _generator(options: argparse.Namespace, tell: Any) -> SynthFit:
    lender = None
    if options.fit:
        lender = load_fit(options.fit)
    elif options.like:
        tell(f"fit a generator to {options.like.name}")
        npz = options.like.suffix == ".npz"
        lender = fit_trace(
            read_npz(options.like) if npz else read_trace(options.like, weights=False),
            seed=options.seed,
        )
    if not options.loads:
        assert lender is not None  # _check
        return lender
    tell(f"loads of {options.loads.name}")
    return fit_loads(
        shares_from_loadstats(options.loads, options.num_experts, options.seed),
        top_k=options.top_k,
        model=options.model or "synthetic",
        moe_layer_ids=loadstats_layers(options.loads),
        known_from=options.loads.name,
        like=lender,
        seed=options.seed,
    )


def _check(options: argparse.Namespace) -> None:
    """Refuse impossible combinations, all at once, before anything is computed."""
    problems = []
    if options.like and options.fit:
        problems.append("--like and --fit together -- a trace, or a generator fitted before")
    if not (options.like or options.fit or options.loads):
        problems.append("nothing to fit -- give --like TRACE, --fit NPZ or --loads CSV")
    geometry = (options.num_experts, options.top_k)
    if options.loads and None in geometry:
        problems.append("--loads without --num-experts and --top-k -- give the model's")
    if not options.loads and (options.model, *geometry) != (None,) * 3:
        problems.append(
            "--num-experts, --top-k and --model -- only with --loads; a trace says its own"
        )
    if not (options.out or options.save_fit):
        problems.append("nothing to write -- give --out PARQUET, --save-fit NPZ or both")
    problems += _wrong_sizes(options)
    if options.seed < 0:
        problems.append(f"--seed {options.seed} -- from 0")
    outputs = [path for path in (options.out, options.save_fit) if path]
    for path in outputs:
        try:
            check_target(path)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))
    if options.like:
        check_file(options.like, "a trace")
    refuse_same(outputs, [options.like, options.fit, options.loads])


def _wrong_sizes(options: argparse.Namespace) -> list[str]:
    """Say what is wrong with the size of the trace to draw."""
    tokens, requests = options.tokens, options.requests
    given = {
        name: count
        for name, count in (("--tokens", tokens), ("--requests", requests))
        if count is not None
    }
    problems = [f"{name} {count} -- at least one" for name, count in given.items() if count < 1]
    if given and not options.out:
        problems.append(f"{' and '.join(given)} without --out -- name the trace to draw")
    if options.out and tokens is None:
        problems.append("--out without --tokens -- say how many")
    if len(given) == 2 and requests > tokens >= 1:
        problems.append(f"--requests {requests} of --tokens {tokens} -- at least one token each")
    return problems
