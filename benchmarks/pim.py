"""Memories with processors: derived rates beside published ones, times, energies, sharing.

    python benchmarks/pim.py

writes benchmarks/results/pim.md. Nothing is fitted; docs/background/pim.md says what is modelled.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwmodels import load_cluster
from hwmodels.ops import Gemm, GroupedGemm
from hwmodels.pim import (
    Pim,
    PimMemory,
    at_once,
    command_interval,
    gemm_joules,
    gemm_seconds,
    host_bandwidth,
    in_turns,
    interleaved_read_power,
    load_pim,
    peak_bandwidth,
    peak_flops,
    pim_names,
    pim_processor,
    streaming_power,
    sustained_bandwidth,
)
from hwmodels.pim.streaming import available, row_cycle, row_energy, timed_interval
from simulator.offload import Offload
from simulator.site_costs import SiteCosts, site_costs
from simulator.sites import SiteProblem, assign

RESULTS = Path(__file__).parent / "results" / "pim.md"
ATTACC = load_pim("attacc")
Row = list[str]
Ints = NDArray[np.int64]

ATTACC_RUNS = [  # unit, limited, tokens, width, bytes, heads of a stack, clocks, products
    ("bank", True, 256, 128, 2, 2050, 65_518, 131_216),
    ("bank", True, 2048, 128, 1, 562, 73_904, 145_680),
    ("bank", True, 2045, 160, 1, 292, 78_632, 149_520),
    ("bank_group", True, 2166, 128, 2, 188, 172_967, 413_456),
    ("bank_group", True, 4086, 128, 2, 188, 325_445, 778_256),
    ("bank_group", False, 3983, 128, 2, 130, 163_071, 517_936),
    ("buffer", False, 2048, 128, 2, 188, 435_461, 3_112_976),
    ("buffer", False, 4096, 128, 2, 188, 871_721, 6_225_936),
    ("buffer", True, 4059, 160, 1, 157, 450_681, 3_217_566),
    ("buffer", False, 4000, 128, 2, 130, 706_165, 4_160_016),
    ("bank", True, 128, 128, 2, 2050, 38_732, 65_616),
    ("bank", True, 2064, 128, 2, 3, 4_892, 1_548),
    ("bank_group", True, 2064, 128, 2, 3, 14_779, 6_192),
    ("buffer", True, 2050, 128, 2, 3, 54_346, 49_200),
]
"""Some rows of ramulator.out in AttAcc's repository (c1540de): an attention layer's clocks, and its
products summed over 16 channels; one head per channel at a time."""
ATTACC_SPEEDS = [  # Gbit/s, then clocks: tRCD = tRP, tRAS, tRTP, tFAW, nCCDAB, nCCDSB
    (4.8, 17, 41, 8, 36, 6, 6),
    (5.2, 19, 45, 8, 39, 6, 6),
    (5.6, 20, 48, 9, 42, 6, 7),
    (6.0, 21, 51, 9, 45, 6, 7),
    (6.4, 23, 55, 10, 48, 7, 8),
]
"""Presets of HBM3-PIM.cpp with the intervals that its authors give for their limit of power."""


def table(head: str, rows: Iterable[Row]) -> list[str]:
    """Return a Markdown table; the heading's cells are separated by bars."""
    lines = [f"| {' | '.join(head.split('|'))} |", "|" + "---|" * len(head.split("|"))]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def parts() -> Iterator[Pim]:
    for name in pim_names():
        memory = load_pim(name)
        for unit in memory.units:
            yield Pim(memory, unit)


def rates() -> Iterator[Row]:
    for pim in parts():
        host, interval = host_bandwidth(pim), command_interval(pim)
        yield [
            pim.memory.name,
            pim.unit,
            f"{host / 1e9:,.1f}",
            f"{peak_bandwidth(pim) / host:.2f}",
            f"{timed_interval(pim)} -> {interval}",
            f"{row_cycle(pim, interval):.0f} / {pim.memory.organisation.columns * interval}",
            f"{sustained_bandwidth(pim) / host:.2f}",
            f"{peak_flops(pim) / 1e12:.3f}",
            f"{peak_flops(pim) / peak_bandwidth(pim):.2f}",
            pim_processor(pim).bandwidth.evidence,
            pim_processor(pim).kernel.evidence,
        ]


def energies() -> Iterator[Row]:
    for pim in parts():
        row = 8 * pim.memory.organisation.row_bytes
        limit = pim.memory.power_limit
        yield [
            pim.memory.name,
            pim.unit,
            f"{row_energy(pim) / row * 1e12:.2f}",
            f"{row_energy(pim, 'controller') / row * 1e12:.2f}",
            f"{pim.memory.energies.mac / 2 * 1e12:.2f}",
            f"{streaming_power(pim, timed_interval(pim)):.1f}",
            f"{streaming_power(pim, command_interval(pim)):.1f}",
            "none" if limit is None else f"{limit.value:.1f}",
            f"{interleaved_read_power(pim):.1f}",
        ]


def published() -> Iterator[Row]:
    """Name, what, published, derived."""
    duplex, stack = (Pim(load_pim("duplex"), "pim", n) for n in (5, 1))
    hbm, aim = Pim(load_pim("hbm-pim"), "pim"), Pim(load_pim("aim"), "aim")
    facts = [
        ("Duplex", "TFLOP/s a stack", "21.3", peak_flops(stack) / 1e12),
        ("Duplex", "bandwidth, times the stack's", "4", _times(stack)),
        ("Duplex", "FLOP per byte", "8", peak_flops(stack) / peak_bandwidth(stack)),
        ("Duplex", "device, TB/s", "13.4", peak_bandwidth(duplex) / 1e12),
        ("Duplex", "tie with the xPU, tokens", "32", peak_flops(duplex) / host_bandwidth(duplex)),
        ("HBM-PIM", "TB/s outside a stack", "0.307", host_bandwidth(hbm) / 1e12),
        ("HBM-PIM", "TB/s inside", "1.23", peak_bandwidth(hbm) / 1e12),
        ("HBM-PIM", "TFLOP/s a stack", "1.2", peak_flops(hbm) / 1e12),
        ("GDDR6-AiM", "TFLOP/s a chip", "1", peak_flops(aim) / 1e12),
        ("GDDR6-AiM", "bandwidth, times the chip's", "16", _times(aim)),
    ]
    said_of = {"bank": ("16", "9"), "bank_group": ("8", "3"), "buffer": ("1", "1")}
    for unit, (without, limited) in said_of.items():
        free, pim = Pim(unlimited(ATTACC), unit), Pim(ATTACC, unit)
        facts.append((f"AttAcc {unit}", "times the stack's, no limit", without, _times(free)))
        before = sustained_bandwidth(pim) / available(pim) / host_bandwidth(pim)
        facts.append((f"AttAcc {unit}", "under the limit, with rows' turns", limited, before))
    for name, what, said, ours in facts:
        yield [name, what, said, f"{ours:.4g}"]


def _times(pim: Pim) -> float:
    return peak_bandwidth(pim) / host_bandwidth(pim)


def unlimited(memory: PimMemory) -> PimMemory:
    return memory.model_copy(update={"power_limit": None})


def attacc_runs() -> Iterator[Row]:
    for unit, limited, tokens, width, size, heads, clocks, products in ATTACC_RUNS:
        pim = Pim(ATTACC if limited else unlimited(ATTACC), unit)
        busiest = products / heads * -(-heads // 16)
        columns = ATTACC.organisation.columns
        ours = busiest * row_cycle(pim, command_interval(pim)) / columns / available(pim)
        yield [
            unit,
            "yes" if limited else "no",
            f"{tokens:,}",
            f"{width} x {size} B",
            f"{heads:,}",
            f"{clocks:,}",
            f"{ours:,.0f}",
            f"{100 * (ours / clocks - 1):+.1f}%",
        ]


def attacc_speeds() -> Iterator[Row]:
    for rate, turn, ras, rtp, faw, all_bank, same_bank in ATTACC_SPEEDS:
        timings = ATTACC.timings.model_copy(
            update={"rcd": turn, "rp": turn, "ras": ras, "rtp": rtp, "faw": faw}
        )
        organisation = ATTACC.organisation.model_copy(update={"clock": rate / 4 * 1e9})
        memory = ATTACC.model_copy(update={"timings": timings, "organisation": organisation})
        limit = interleaved_read_power(Pim(memory, "bank"))
        assert memory.power_limit is not None
        figure = memory.power_limit.model_copy(update={"value": limit})
        memory = memory.model_copy(update={"power_limit": figure})
        ours = [command_interval(Pim(memory, unit)) for unit in ("bank", "bank_group")]
        yield [f"{rate}", f"{limit:.1f}", f"{all_bank}, {same_bank}", f"{ours[0]}, {ours[1]}"]


def expert(tokens: Iterable[int]) -> Gemm:
    """One matrix of a Mixtral expert, for so many tokens."""
    m = np.array(list(tokens))
    return Gemm(m=m, n=14336, k=4096, weight_dtype="bf16", activation_dtype="bf16")


def products() -> Iterator[Row]:
    tokens = (1, 2, 4, 8, 16, 32)
    devices = [Pim(ATTACC, unit, 5) for unit in ATTACC.units]
    devices += [Pim(load_pim(n), u, k) for n, u, k in _OTHERS]
    for pim in devices:
        seconds, joules = gemm_seconds(pim, expert(tokens)), gemm_joules(pim, expert(tokens))
        row = pim.memory.organisation.row_bytes
        bytes_ = float(expert([1]).weight_bytes()[0])
        outside = bytes_ * row_energy(pim, "controller") / row
        yield [
            pim.memory.name,
            pim.unit,
            str(pim.stacks),
            *(f"{1e6 * s:.1f}" for s in seconds),
            f"{1e6 * bytes_ / host_bandwidth(pim):.1f}",
            *(f"{1e3 * j:.2f}" for j in joules[[0, 3]]),
            f"{1e3 * outside:.2f}",
        ]


_OTHERS = (
    ("duplex", "pim", 5),
    ("hbm-pim", "pim", 4),
    ("aim", "aim", 16),
    ("monde", "ndp", 1),
    ("cxl-pnm", "ndp", 1),
)


def sharing() -> Iterator[Row]:
    duplex, hbm = Pim(load_pim("duplex"), "pim", 5), Pim(load_pim("hbm-pim"), "pim", 4)
    for banks in (8, 16, 24):
        yield _shared(f"Duplex, {banks} of 32 banks, host at full load", duplex, banks, 1.0)
    for unit in ATTACC.units:
        for load in (0.0, 0.5, 1.0):
            if unit == "bank":
                continue
            pim = Pim(ATTACC, unit, 5)
            yield _shared(f"AttAcc {unit}, 16 of 32 banks, host at {load:.0%}", pim, 16, load)
    for share in (0.25, 0.5, 0.75):
        turns = in_turns(hbm, share, 20e-6, 1e-6)
        yield [
            f"HBM-PIM in turns of 20 us, {share:.0%} for the units, 1 us a change (assumed)",
            f"{turns.host / host_bandwidth(hbm):.2f}",
            f"{turns.units / sustained_bandwidth(hbm):.2f}",
        ]


def _shared(what: str, pim: Pim, banks: int, load: float) -> Row:
    shared = at_once(pim, load, banks)
    host, units = shared.host / host_bandwidth(pim), shared.units / sustained_bandwidth(pim)
    return [what, f"{host:.2f}", f"{units:.2f}"]


def monde() -> Iterator[Row]:
    """Split of 128 experts of NLLB-MoE, Zipf 0.8, against every cut."""
    shares = np.arange(1, 129) ** -0.8
    for step in (4, 64, 512, 2048, 8192, 32768):
        tokens = np.random.default_rng(step).multinomial(step, shares / shares.sum())
        costs = _monde_costs(int(tokens.max()))
        falling = np.sort(tokens[tokens > 0])[::-1]
        cuts = [_end(costs, falling[:h], falling[h:]) for h in range(len(falling) + 1)]
        found = float(assign("split", _problem(costs, tokens)).makespan[0])
        yield [
            f"{step:,}",
            str(len(falling)),
            str(int(np.argmin(cuts))),
            *(f"{1e3 * t:.3f}" for t in (found, min(cuts), cuts[0], cuts[-1])),
        ]


def _monde_costs(most: int) -> SiteCosts:
    op = GroupedGemm(
        tokens_per_expert=np.arange(most + 1)[None, :],
        hidden=2048,
        width=8192,
        gated=False,
        weight_dtype="bf16",
        activation_dtype="bf16",
    )
    offload = Offload.model_validate({"home": "cxl", "site": {"name": "split", "processor": "ndp"}})
    return site_costs(offload, load_cluster("monde"), op, op.bytes_per_expert())


def _end(costs: SiteCosts, hot: Ints, cold: Ints) -> float:
    link = gpu = 0.0
    for tokens in hot:
        link += costs.fetch_s
        gpu = max(gpu, link) + costs.fast_fixed + float(costs.fast_s[tokens])
    side = float(costs.side_s[cold].sum()) + costs.side_fixed * (len(cold) > 0)
    return max(gpu, side)


def _problem(costs: SiteCosts, tokens: Ints) -> SiteProblem:
    return SiteProblem(
        tokens=tokens[None, :],
        resident=np.zeros(1, dtype=np.bool_),
        fast_s=costs.fast_s[tokens][None, :],
        fetch_s=np.full((1, len(tokens)), costs.fetch_s),
        side_s=costs.side_s[tokens][None, :],
        fast_fixed=costs.fast_fixed,
        side_fixed=costs.side_fixed,
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    text = [
        "# Memories with processors",
        "",
        "Command: `python benchmarks/pim.py`. Nothing is fitted; what each figure rests on is in",
        "`hwmodels/catalog/pim/*.yaml`, what is modelled in docs/background/pim.md. One stack or",
        "chip where nothing else is said.",
        "",
        "## Rates from organisation and timings",
        "",
        "*interval*: clocks between columns, by timings -> under the limit of power; *row*: clocks",
        "from row to row / clocks of reading; *times*: of the memory's own interface.",
        "",
        *table(
            "memory|units|interface GB/s|peak, times|interval|row|sustained, times|TFLOP/s"
            "|FLOP/B|evidence of peaks|of losses",
            rates(),
        ),
        "## Published beside derived",
        "",
        *table("system|figure|published|derived", published()),
        "AttAcc's bank group: the simulator's config.py says 8, its HBM3-PIM.cpp issues a bank",
        "group's products every four clocks (nCCDSB), which is 4; we model the commands.",
        "",
        "## AttAcc: the authors' cycle-level results beside columns x row cycle",
        "",
        "Some rows of ramulator.out (it has tens of thousands): whole attention layers with",
        "softmax and moves, one head per channel at a time; ours counts the products of the",
        "busiest channel only. Softmax and moves are beside products of other heads where there",
        "are many and long ones; with few heads (3), an odd number per channel (130 on 16) or",
        "short ones (128 tokens) they show in their clocks, and not in ours.",
        "",
        *table("units|limit of power|tokens|head|heads|their clocks|ours|error", attacc_runs()),
        "The limit: both ranks activate four rows in each tFAW, the interface streams (IDD7's",
        "pattern). It gives AttAcc's intervals at the speed that it is evaluated at, 5.2 Gbit/s;",
        "at the other speeds of its file it does not: theirs follow from another rule or budget.",
        "",
        *table("Gbit/s|limit, W|their clocks: bank, bank group|ours", attacc_speeds()),
        "## Energy and power",
        "",
        *table(
            "memory|units|pJ/bit to the units|to the host|pJ/FLOP|W at the timings"
            "|W at the interval|limit|interleaved reads",
            energies(),
        ),
        "Dynamic only: no standby, no refresh. Duplex's four times the bandwidth would draw 70 W",
        "a stack at these energies, 2.7 times what interleaved reads do; the paper's TSVs shorten",
        "ways that are counted in full here.",
        "",
        "## One matrix of a Mixtral expert: 14336 x 4096 in 16 bits",
        "",
        "Time by tokens, beside the bytes over the memory's own interface; energy for 1 and 8",
        "tokens, beside reading the bytes to the host.",
        "",
        *table(
            "memory|units|stacks|1: us|2|4|8|16|32|interface|1: mJ|8|to the host",
            products(),
        ),
        "## A memory that both sides use",
        "",
        "Shares of what each has alone.",
        "",
        *table("case|host|units", sharing()),
        "## MoNDE's split at its assumed figures",
        "",
        "128 experts of NLLB-MoE, Zipf 0.8, nothing resident; H hottest experts are copied to the",
        "A100, the others computed in the device. All figures of the device are assumed.",
        "",
        *table(
            "tokens in the step|active|H|split, ms|best of all cuts|H = 0|H = all", monde()
        ),
    ]  # fmt: skip
    RESULTS.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
