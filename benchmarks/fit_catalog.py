"""Fit the catalog's kernel and link parameters on measured tables; score them on unseen shapes.

    python benchmarks/fit_catalog.py --gpu h100    # print
    python benchmarks/fit_catalog.py --write       # all GPUs: update the results and the catalog

A quarter of the shapes (by hash) is held out; the objective is the mean |log(predicted/measured)|
over the others. Rows faster than the data sheet allows, or over ten times slower than it explains,
are left out by rule and counted. The interval of a fit is the 10th to 90th percentile of
measured / predicted on the held-out rows.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import silicon_tables as tables
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from basis import Evidence
from hwmodels import Device, KernelCost, load_device
from hwmodels.cost_compute import roofline

CATALOG = Path(__file__).parent.parent / "hwmodels" / "catalog"
RESULTS = Path(__file__).parent / "results" / "fit_catalog.md"
KERNEL_DTYPES = {
    "gemm": ("bf16", "fp8", "fp8_block", "nvfp4"),
    "grouped_gemm": ("bf16", "fp8", "fp8_block", "mxfp4", "nvfp4"),
    "attention_decode": ("bf16", "fp8"),
    "attention_prefill": ("bf16", "fp8"),
}
CONTINUED = " " * 6
TILED = ("gemm", "grouped_gemm")
PERMUTE_LAUNCH = 2e-6  # s; of a fused expert layer only the sum of launches can be measured
BOARDS = {"a100": "hgx-a100-8", "h100": "hgx-h100-8", "h200": "hgx-h200-8", "b200": "hgx-b200-8"}
BOARDS |= {"gb200": "gb200-nvl72", "l40s": "l40s-8"}
PORTS = {"a100": 300e9, "h100": 450e9, "h200": 450e9, "b200": 900e9, "gb200": 900e9, "l40s": 31.5e9}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Parameters of one model, how it did on held-out rows, and the rows that it was given."""

    params: dict[str, float]
    ratios: NDArray[np.float64]  # measured / predicted on the held-out rows
    fitted_median: float
    rows: int
    dropped: int = 0
    by_engine: str = ""
    permute: float = 0.0  # memory efficiency of the permutations, fitted beside
    spread: NDArray[np.float64] | None = None  # ratios of wider use, which the interval covers too

    @property
    def errors(self) -> NDArray[np.float64]:
        """|predicted / measured - 1| on the held-out rows."""
        return np.abs(1 / self.ratios - 1)

    def interval(self) -> tuple[float, float]:
        """Return the 10th and 90th percentile of measured / predicted, around one."""
        rows = [self.ratios, self.ratios if self.spread is None else self.spread]
        ends = np.array([np.quantile(ratios, [0.1, 0.9]) for ratios in rows])
        return min(float(ends[:, 0].min()), 1.0), max(float(ends[:, 1].max()), 1.0)


Fits = dict[tuple[str, str, str], Fit]
"""By GPU, kernel and format."""
Seen = dict[tuple[str, str, str], tables.Rows]
"""Held-out rows by GPU, kernel and format."""
Links = dict[str, dict[str, Fit]]
"""By GPU and transfer."""
Spread = dict[tuple[str, str], NDArray[np.float64]]
"""Measured / predicted by kernel and format."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="update the catalog")
    parser.add_argument("--gpu", nargs="*", default=list(tables.GPUS))
    args = parser.parse_args()
    if args.write and set(args.gpu) != set(tables.GPUS):
        parser.error("--write needs all GPUs: the transfers are medians over them")
    fits: Fits = {}
    seen: Seen = {}
    for gpu in args.gpu:
        fit_gpu(gpu, fits, seen)
    links = {gpu: fit_links(gpu) for gpu in args.gpu}
    across = pd.concat([tables.deepep("h200", n) for n in (2, 4, 8)], ignore_index=True)
    network = fit_transfer(across.assign(group=0), 50e9)
    spread = leave_one_out(fits, seen)
    text = report(fits, links, network, spread)
    print(text)
    if args.write:
        RESULTS.write_text(text)
        write_devices(fits, spread)
        write_links(links, network)


def fit_gpu(gpu: str, fits: Fits, seen: Seen) -> None:
    """All kernels and formats of one GPU that have a table."""
    device = load_device(gpu)
    permute = 0.0
    for kernel, dtypes in KERNEL_DTYPES.items():
        for dtype in dtypes:
            rows = read(gpu, kernel, dtype)
            if rows is None:
                continue
            keep = tables.believable(rows, device, peak_format(kernel, dtype))
            kept = rows.take(keep)
            fit = fit_kernel(kernel, dtype, kept, device, permute)
            if kernel == "grouped_gemm" and dtype == "bf16":
                permute = fit.permute
            fits[gpu, kernel, dtype] = Fit(**{**fit.__dict__, "dropped": int((~keep).sum())})
            seen[gpu, kernel, dtype] = kept.take(kept.held_out)


def read(gpu: str, kernel: str, dtype: str) -> tables.Rows | None:
    parts = []
    for engine in tables.ENGINES:
        if kernel == "gemm":
            part = tables.gemm(gpu, engine, dtype)
        elif kernel == "grouped_gemm":
            part = tables.moe(gpu, engine, dtype)
        else:
            phase = "generation" if kernel == "attention_decode" else "context"
            part = tables.attention(gpu, engine, phase, dtype)
        if part is not None:
            parts.append(part)
    return tables.join(parts)


def peak_format(kernel: str, dtype: str) -> str:
    """Attention multiplies in bf16 whatever its cache is stored in."""
    return dtype if kernel in TILED else "bf16"


def predict(
    rows: tables.Rows, cost: KernelCost, device: Device, dtype: str, permute: float
) -> NDArray[np.float64]:
    """Price rows by the package's roofline; whole expert layers have two permutations beside."""
    bandwidth = device.memory.bandwidth.value
    moved = rows.moved + rows.blocks * cost.ramp_bytes
    flops = rows.padded[tables.TILES.index(cost.tile_rows)]
    seconds = roofline(flops, moved, cost, device.flops(dtype).value, bandwidth)
    around = 2 * (PERMUTE_LAUNCH + rows.permuted / (permute or 1.0) / bandwidth)
    return seconds + np.where(rows.permuted > 0, around, 0.0)


def fit_kernel(kernel: str, dtype: str, rows: tables.Rows, device: Device, permute: float) -> Fit:
    """Search the tile on a grid, the rest by Nelder-Mead; ``permute`` is fitted where it is 0."""
    seen, unseen = rows.take(~rows.held_out), rows.take(rows.held_out)
    peak = peak_format(kernel, dtype)
    free = kernel == "grouped_gemm" and not permute

    def of(x: NDArray[np.float64], tile: int) -> tuple[KernelCost, float]:
        share = expit(x)
        cost = KernelCost.model_construct(
            launch=float(np.exp(x[0])),
            compute_efficiency=float(share[1]),
            memory_efficiency=float(share[2]),
            ramp_bytes=float(np.exp(x[3])) if kernel in TILED else 0.0,
            tile_rows=tile,
        )
        return cost, float(share[4]) if free else permute

    def loss(x: NDArray[np.float64], tile: int) -> float:
        cost, around = of(x, tile)
        predicted = predict(seen, cost, device, peak, around)
        return float(np.abs(np.log(predicted / seen.seconds)).mean())

    start = [np.log(8e-6), 0.7, 0.7, np.log(1e5), 0.5]
    found = [
        (minimize(loss, start, (tile,), method="Nelder-Mead",
                  options={"maxiter": 1000, "xatol": 1e-3, "fatol": 1e-5}), tile)
        for tile in (tables.TILES if kernel in TILED else (1,))
    ]  # fmt: skip
    best, tile = min(found, key=lambda pair: pair[0].fun)
    cost, around = of(best.x, tile)
    ratios = unseen.seconds / predict(unseen, cost, device, peak, around)
    engines = {e: np.median(np.abs(1 / ratios[unseen.engine == e] - 1)) for e in set(unseen.engine)}
    names = ("launch", "compute_efficiency", "memory_efficiency", "tile_rows", "ramp_bytes")
    shown = seen.seconds / predict(seen, cost, device, peak, around)
    return Fit(
        params={n: getattr(cost, n) for n in names},
        ratios=ratios,
        fitted_median=float(np.median(np.abs(1 / shown - 1))),
        rows=len(rows.seconds),
        by_engine=", ".join(f"{e} {v:.1%}" for e, v in sorted(engines.items())),
        permute=around,
    )


def fit_transfer(frame: pd.DataFrame, port: float) -> Fit:
    """Fit t = startup + bytes / (efficiency x port) on the largest group, efficiency at most one.

    The error is that of the largest group's held-out rows; the interval covers all groups.
    """
    seconds, size = frame.seconds.to_numpy(), frame.bytes.to_numpy()
    held, large = frame.held_out.to_numpy(dtype=bool), (frame.group == frame.group.max()).to_numpy()

    def model(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(x[0]) + size / (port * expit(x[1]))

    def loss(x: NDArray[np.float64]) -> float:
        return float(np.abs(np.log(model(x) / seconds))[~held & large].mean())

    best = minimize(loss, [np.log(1e-5), 0.5], method="Nelder-Mead")
    ratios = seconds / model(best.x)
    startup, efficiency = float(np.exp(best.x[0])), float(expit(best.x[1]))
    return Fit(
        params={"startup": startup, "efficiency": efficiency},
        ratios=ratios[held & large],
        fitted_median=float(np.median(np.abs(1 / ratios[~held & large] - 1))),
        rows=int(large.sum()),
        spread=ratios[held],
    )


def fit_links(gpu: str) -> dict[str, Fit]:
    """All-to-all by the MoE engines' own kernels where measured, by NCCL elsewhere.

    The halves of an all-reduce are NCCL's; the all-reduce itself is TensorRT-LLM's own.
    """
    exchange = (
        tables.nvlink_alltoall(gpu).assign(group=0) if gpu == "gb200" else tables.deepep(gpu, 1)
    )
    if exchange.empty:
        exchange = tables.collective(gpu, "all_to_all")
    rings = {n: tables.collective(gpu, n) for n in ("all_reduce", "all_gather", "reduce_scatter")}
    return {
        "all_to_all": fit_transfer(exchange, PORTS[gpu]),
        **{name: fit_transfer(ring, PORTS[gpu]) for name, ring in rings.items()},
    }


def median_of(fits: Fits, kernel: str, dtype: str, without: str = "") -> Fit | None:
    """Parameters for an unmeasured GPU: medians over the others."""
    others = [f for (g, k, d), f in fits.items() if (k, d) == (kernel, dtype) and g != without]
    if not others:
        return None
    params = {n: float(np.median([f.params[n] for f in others])) for n in others[0].params}
    params["tile_rows"] = min(tables.TILES, key=lambda t: abs(t - params["tile_rows"]))
    permute = float(np.median([f.permute for f in others]))
    return Fit(params=params, ratios=np.ones(1), fitted_median=0.0, rows=0, permute=permute)


def leave_one_out(fits: Fits, seen: Seen) -> Spread:
    """Measured / predicted of each GPU from the medians of the others, pooled by kernel."""
    pooled: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for (gpu, kernel, dtype), rows in seen.items():
        guess = median_of(fits, kernel, dtype, without=gpu)
        if guess is None:
            continue
        params: dict[str, Any] = guess.params
        cost = KernelCost.model_construct(**params)
        device = load_device(gpu)
        predicted = predict(rows, cost, device, peak_format(kernel, dtype), guess.permute)
        pooled.setdefault((kernel, dtype), []).append(rows.seconds / predicted)
    return {key: np.concatenate(parts) for key, parts in pooled.items()}


# ---- what is written -------------------------------------------------------------------------


def report(fits: Fits, links: Links, network: Fit, spread: Spread) -> str:
    lines = [
        "# Fit of the catalog's parameters",
        "",
        "Made by `python benchmarks/fit_catalog.py` from the kernel tables of the wheel",
        "aiconfigurator-core 0.12.0 (Apache-2.0), TensorRT-LLM and SGLang, their newest versions;",
        "at most 6,000 rows of a table, drawn by hash. Held out: a quarter of the shapes. Errors",
        "are |predicted / measured - 1|. A whole expert layer is permute + grouped GEMM + permute.",
        "",
        "## Kernels",
        "",
        "| GPU | kernel | format | launch us | compute | memory | tile | ramp kB | rows | left out "
        "| fitted median | held-out median | held-out mean | p10 - p90 of measured / predicted "
        "| held-out median by engine |",
        "|" + "---|" * 15,
    ]
    for (gpu, kernel, dtype), fit in fits.items():
        p, (low, high) = fit.params, np.quantile(fit.ratios, [0.1, 0.9])
        lines.append(
            f"| {gpu} | {kernel} | {dtype} | {p['launch'] * 1e6:.1f} | "
            f"{p['compute_efficiency']:.2f} | {p['memory_efficiency']:.2f} | {p['tile_rows']} | "
            f"{p['ramp_bytes'] / 1e3:.0f} | {fit.rows} | {fit.dropped} | {fit.fitted_median:.1%} | "
            f"{np.median(fit.errors):.1%} | {fit.errors.mean():.1%} | {low:.2f} - {high:.2f} | "
            f"{fit.by_engine} |"
        )
    shares = ", ".join(
        f"{g} {f.permute:.2f}"
        for (g, k, d), f in fits.items()
        if (k, d) == ("grouped_gemm", "bf16")
    )
    lines += ["", f"Memory efficiency of the permutations, fitted beside bf16: {shares}.", ""]
    lines += ["## A GPU from the medians of the others (leave one out, held-out rows)", ""]
    lines += ["| kernel | format | median | mean | p10 - p90 |", "|---|---|---|---|---|"]
    for (kernel, dtype), ratios in spread.items():
        errors, (low, high) = np.abs(1 / ratios - 1), np.quantile(ratios, [0.1, 0.9])
        lines.append(
            f"| {kernel} | {dtype} | {np.median(errors):.1%} | {errors.mean():.1%} | "
            f"{low:.2f} - {high:.2f} |"
        )
    lines += ["", "## Links", ""]
    lines += [
        "| GPU | transfer | startup us | efficiency | rows | held-out median | mean | p10 - p90 |"
    ]
    lines += ["|" + "---|" * 8]
    named = [(g, n, f) for g, both in links.items() for n, f in both.items()]
    for gpu, name, fit in [*named, ("h200", "all_to_all over NDR, 2 to 8 nodes", network)]:
        low, high = np.quantile(fit.ratios, [0.1, 0.9])
        lines.append(
            f"| {gpu} | {name} | {fit.params['startup'] * 1e6:.1f} | "
            f"{fit.params['efficiency']:.2f} | {fit.rows} | {np.median(fit.errors):.1%} | "
            f"{fit.errors.mean():.1%} | {low:.2f} - {high:.2f} |"
        )
    return "\n".join(lines) + "\n"


def kernel_line(fit: Fit, evidence: Evidence, interval: tuple[float, float]) -> str:
    p = fit.params
    held = f", {held_line(fit)}" if evidence == "fitted" else ""
    ramp = f", ramp_bytes: {p['ramp_bytes'] / 1e3:.0f} kB" if p["ramp_bytes"] >= 500 else ""
    tile = f", tile_rows: {p['tile_rows']}" if p["tile_rows"] > 1 else ""
    return (
        f"{{launch: {p['launch'] * 1e6:.1f} us, compute_efficiency: {p['compute_efficiency']:.3f}, "
        f"memory_efficiency: {p['memory_efficiency']:.3f}{tile}{ramp},\n{CONTINUED}"
        f"low: {interval[0]:.2f}, high: {interval[1]:.2f}, evidence: {evidence}, "
        f"source: tables{held}}}"
    )


def held_line(fit: Fit) -> str:
    median, mean = np.median(fit.errors), fit.errors.mean()
    return f"held_out: {{median: {median:.3f}, mean: {mean:.3f}, rows: {len(fit.ratios)}}}"


def write_devices(fits: Fits, spread: Spread) -> None:
    for gpu in ("a100", "h100", "h200", "b200", "gb200", "l40s", "rtx4090", "mi300x"):
        lines = ["kernels:"]
        base: Fit | None = None
        for kernel, dtypes in KERNEL_DTYPES.items():
            lines.append(f"  {kernel}:")
            for dtype in dtypes:
                fit, evidence, interval = chosen(gpu, kernel, dtype, fits, spread)
                if fit is None:
                    continue
                lines.append(f"    {dtype}: {kernel_line(fit, evidence, interval)}")
                if (kernel, dtype) == ("gemm", "bf16"):
                    base = fit
        assert base is not None
        whole, evidence, interval = chosen(gpu, "grouped_gemm", "bf16", fits, spread)
        assert whole is not None
        lines += untabled_lines(base, whole, evidence, interval)
        splice(CATALOG / "devices" / f"{gpu}.yaml", "kernels", lines)


def chosen(
    gpu: str, kernel: str, dtype: str, fits: Fits, spread: Spread
) -> tuple[Fit | None, Evidence, tuple[float, float]]:
    """Own fit; for a GPU without tables its sibling's (Ada) or the medians, as a transfer."""
    if (gpu, kernel, dtype) in fits:
        fit = fits[gpu, kernel, dtype]
        return fit, "fitted", fit.interval()
    if gpu in tables.GPUS or (kernel, dtype) not in spread or dtype == "nvfp4":
        return None, "assumed", (1.0, 1.0)
    sibling = fits.get(("l40s", kernel, dtype)) if gpu == "rtx4090" else None
    low, high = np.quantile(spread[kernel, dtype], [0.1, 0.9])
    interval = (min(float(low), 1.0), max(float(high), 1.0))
    return sibling or median_of(fits, kernel, dtype), "transfer", interval


def untabled_lines(
    base: Fit, experts: Fit, evidence: Evidence, interval: tuple[float, float]
) -> list[str]:
    """Routing and elementwise work have no table; permutations are fitted with the experts."""
    launch, share = base.params["launch"], base.params["memory_efficiency"]
    compute = base.params["compute_efficiency"]
    held = f", {held_line(experts)}" if evidence == "fitted" else ""
    return [
        "  route:",
        f"    bf16: {{launch: {2e6 * launch:.1f} us, compute_efficiency: {compute:.3f}, "
        f"memory_efficiency: {share:.3f}, evidence: assumed, source: two-kernels}}",
        "  permute:",
        f"    bf16: {{launch: {PERMUTE_LAUNCH * 1e6:.1f} us, compute_efficiency: 1, "
        f"memory_efficiency: {experts.permute:.3f},\n{CONTINUED}"
        f"low: {interval[0]:.2f}, high: {interval[1]:.2f}, evidence: {evidence}, "
        f"source: split{held}}}",
        "  stream:",
        f"    bf16: {{launch: {1e6 * launch:.1f} us, compute_efficiency: 1, "
        f"memory_efficiency: {share:.3f}, evidence: assumed, source: like-gemm}}",
    ]


def write_links(links: Links, network: Fit) -> None:
    boards: list[tuple[str, dict[str, Fit], Evidence]]
    boards = [(board, links[gpu], "fitted") for gpu, board in BOARDS.items()]
    boards.append(("rtx4090-8", links["l40s"], "transfer"))
    for board, both, evidence in boards:
        lines = ["costs:"]
        lines += [f"  {name}: {transfer_line(fit, evidence)}" for name, fit in both.items()]
        splice(CATALOG / "clusters" / f"{board}.yaml", "interconnect", lines)
    for gpu, board in BOARDS.items():
        if gpu != "l40s":
            evidence = "fitted" if gpu == "h200" else "transfer"
            lines = ["costs:", f"  all_to_all: {transfer_line(network, evidence, 'deepep-nodes')}"]
            splice(CATALOG / "clusters" / f"{board}.yaml", "network", lines)


def transfer_line(fit: Fit, evidence: Evidence, source: str = "tables") -> str:
    low, high = fit.interval()
    if evidence == "transfer":  # assumed: other hardware is off by this much more
        low, high = 0.7 * low, 1.5 * high
    return (
        f"{{startup: {fit.params['startup'] * 1e6:.1f} us, "
        f"efficiency: {fit.params['efficiency']:.3f}, low: {low:.2f}, high: {high:.2f},\n"
        f"{CONTINUED}evidence: {evidence}, source: {source}, {held_line(fit)}}}"
    )


def splice(path: Path, tag: str, lines: list[str]) -> None:
    """Replace what stands between ``# fit: TAG`` and ``# end fit`` in a catalog file."""
    old = path.read_text().splitlines()
    begin = next(i for i, line in enumerate(old) if line.strip().startswith(f"# fit: {tag}"))
    end = next(i for i in range(begin, len(old)) if old[i].strip() == "# end fit")
    indent = " " * (len(old[begin]) - len(old[begin].lstrip()))
    made = "\n".join(lines).splitlines()
    new = [*old[: begin + 1], *(indent + line for line in made), *old[end:]]
    path.write_text("\n".join(new) + "\n")


if __name__ == "__main__":
    main()
