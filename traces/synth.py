"""Synthetic expert loads and traces, for benchmarks and tests; never a model's real routing.

Loads are shares of a layer's choices (sum 1 over its experts). `synthetic_step_counts` draws
loads only; `synthetic_trace` draws tokens with distinct experts. Neither has co-activation or
layer-to-layer structure; reuse between the tokens of a request only where it is asked for. What
they can show is balance and cache mechanics, not affinity; a generator fitted to a recorded trace
(`traces.synth_fit`) has both.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from basis.errors import InputError
from traces.parquet_columns import Columns
from traces.routing_trace import RoutingTrace, TraceMeta

Floats = NDArray[np.float64]
_CHUNK_CLOCKS = 2**22  # random clocks drawn at a time: 32 MiB
_TOP = 32  # experts in the "top 32 share" of the statistics file
_PERSISTENCE = 0.97  # of the slow part of router scores from token to token: about 30 tokens
_MOST_LAYERS = 4096
_MARGIN = 0.01  # of a bin's width that loads keep from its edges
_BIN = "gpqa_experts_with_load_over_mean_in_"


def zipf_shares(num_experts: int, exponent: float, layers: int, seed: int) -> Floats:
    """Return shares ``[L, E]`` proportional to rank^-exponent, permuted anew in each layer."""
    rng = np.random.default_rng(seed)
    ranked = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    return rng.permuted(np.tile(ranked / ranked.sum(), (layers, 1)), axis=1)


def synthetic_step_counts(
    shares: Floats, *, steps: int, tokens: int, top_k: int, seed: int
) -> NDArray[np.int32]:
    """Draw the load of each step: multinomial of ``tokens * top_k`` choices by the shares.

    Load level only: there are no tokens behind the counts, and where a share is above
    ``1 / top_k`` an expert gets more choices than there are tokens, which no model can do.

    Parameters
    ----------
    shares : float array ``[L, E]``
    steps, tokens, top_k : int
    seed : int

    Returns
    -------
    int32 array ``[S, L, E]``; every layer of every step sums to ``tokens * top_k``.
    """
    rng = np.random.default_rng(seed)
    _check_shares(shares)
    counts = np.empty((steps, *shares.shape), np.int32)
    for layer, share in enumerate(shares):
        counts[:, layer] = rng.multinomial(tokens * top_k, share, size=steps)
    return counts


def synthetic_trace(
    shares: Floats,
    *,
    tokens: int,
    requests: int,
    top_k: int,
    seed: int,
    model: str = "synthetic",
    candidates: int = 0,
    reuse: float = 0.0,
) -> RoutingTrace:
    """Draw a decode trace whose expected loads are the shares, with distinct experts per token.

    Each expert has an exponential clock of rate w, the first ``top_k`` clocks are the token's
    experts (Gumbel top-k). With w = -log(1 - top_k * share) an expert is among them with
    probability close to ``top_k * share`` (B. Rosen, "Asymptotic theory for order sampling",
    1997). Layers and tokens are independent.

    With ``candidates`` or ``reuse`` the clocks are -log Phi(z) of normal z, so the expected loads
    stay the same; z is a slow part that drifts along a request (correlation 0.97 between
    consecutive tokens, an assumption) plus a part that is new for each token. A router
    score is proportional to 1 / clock (its log has Gumbel noise: Plackett-Luce), and the sum over
    all experts is 1: the ``top_k`` are the first candidates, and the router weights are
    their scores over the sum of these.

    Parameters
    ----------
    shares : float array ``[L, E]``
        Each below ``1 / top_k``.
    tokens, requests : int
        T rows in ``requests`` requests of nearly equal length.
    top_k, seed : int
    model : str
        Name for the metadata, which also says ``synthetic``.
    candidates : int
        Best experts M of each token and layer to record, with their scores and the router
        weights; 0 = the chosen experts only.
    reuse : float
        Share of the variance of z that is in the slow part, from 0 to 1.

    Raises
    ------
    InputError
        If the shares cannot be those of distinct experts, or a count is impossible.
    """
    _check_draw(shares, tokens, requests, top_k, reuse)
    layers, experts = shares.shape
    with np.errstate(divide="ignore"):
        mean_clock = -1 / np.log1p(-top_k * shares)  # infinite where the share is zero
    request = np.arange(tokens) * requests // tokens
    position = np.arange(tokens) - np.searchsorted(request, request)
    note = "independent tokens and layers; only the loads mean anything"
    if reuse:
        note = f"independent layers; reuse {reuse} between the tokens of a request is made up"
    meta = TraceMeta(
        model=model, num_experts=experts, top_k=top_k, moe_layer_ids=tuple(range(layers)),
        source=f"traces.synth.synthetic_trace, seed {seed}", licence="Apache-2.0",
        synthetic=True, note=note, num_candidates=candidates,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    if candidates or reuse:
        cells = _scored_cells(mean_clock, position, meta, reuse, rng)
    else:
        cells = {"experts": _fastest(mean_clock, tokens, top_k, rng)}
    return RoutingTrace(
        meta=meta,
        request_id=request.astype(np.int32),
        position=position.astype(np.int32),
        decode=np.ones(tokens, np.bool_),
        step=position.astype(np.int32),
        domain=np.zeros(tokens, np.int16),
        domains=("synthetic",),
        **cells,
    )


def _fastest(
    mean_clock: Floats, tokens: int, top_k: int, rng: np.random.Generator
) -> NDArray[np.uint16]:
    """Draw the experts ``[T, L, K]`` of independent tokens, in no order."""
    picked = np.empty((tokens, len(mean_clock), top_k), np.uint16)
    rows = max(_CHUNK_CLOCKS // mean_clock.size, 1)
    for start in range(0, tokens, rows):
        part = picked[start : start + rows]
        clocks = rng.standard_exponential((len(part), *mean_clock.shape)) * mean_clock
        part[:] = np.argpartition(clocks, top_k - 1, axis=-1)[..., :top_k]
    return picked


def _scored_cells(
    mean_clock: Floats, position: NDArray[Any], meta: TraceMeta, reuse: float,
    rng: np.random.Generator,
) -> Columns:  # fmt: skip
    """Draw experts and weights ``[T, L, K]``, and candidates with scores ``[T, L, M]``.

    Requests lie one after the other; they are drawn side by side, position by position.
    """
    best = max(meta.num_candidates, meta.top_k)
    ids = np.empty((len(position), len(mean_clock), best), np.uint16)
    scores = np.empty(ids.shape, np.float64)
    starts = np.flatnonzero(position == 0)
    lengths = np.diff([*starts, len(position)])
    group = max(_CHUNK_CLOCKS // mean_clock.size, 1)
    for first in range(0, len(starts), group):
        start, length = starts[first : first + group], lengths[first : first + group]
        slow = rng.standard_normal((len(start), *mean_clock.shape))
        for place in range(int(length.max())):
            if place:
                step = rng.standard_normal(slow.shape)
                slow = _PERSISTENCE * slow + np.sqrt(1 - _PERSISTENCE**2) * step
            z = np.sqrt(reuse) * slow + np.sqrt(1 - reuse) * rng.standard_normal(slow.shape)
            clocks = -log_ndtr(z) * mean_clock
            order = np.argsort(clocks, axis=-1)[..., :best]
            share = 1 / clocks
            share /= share.sum(axis=-1, keepdims=True)
            running = place < length
            rows = (start + place)[running]
            ids[rows] = order[running]
            scores[rows] = np.take_along_axis(share, order, axis=-1)[running]
    chosen = scores[..., : meta.top_k]
    cells: Columns = {
        "experts": ids[..., : meta.top_k].copy(),
        "weights": (chosen / chosen.sum(axis=-1, keepdims=True)).astype(np.float16),
    }
    if meta.num_candidates:
        cells |= {"candidates": ids, "candidate_scores": scores.astype(np.float16)}
    return cells


def shares_from_loadstats(csv_path: Path, num_experts: int, seed: int) -> Floats:
    """Build shares that have the statistics of a per-layer load file.

    The file gives, per layer, the largest load over the mean, the share of the 32 busiest
    experts, and how many experts have a load (over the mean) in each of some bins. The loads
    returned have exactly that maximum, that histogram and a sum of 1, and that top-32 share
    as far as the bins allow; inside a bin they follow a power law. Experts are permuted at
    random in each layer, because the file does not say which expert is which.

    Parameters
    ----------
    csv_path : Path
        One row per MoE layer; columns ``gpqa_max_over_mean``, ``gpqa_top32_share_pct`` (percent)
        and ``gpqa_experts_with_load_over_mean_in_<low>_<high>`` (experts), and for
        `loadstats_layers` ``layer``. Others are ignored; all cells are numbers.
    num_experts : int
        E; must be the sum of every row's histogram.
    seed : int

    Returns
    -------
    float64 array ``[L, E]``

    Raises
    ------
    InputError
        If the file or its columns are missing, a figure is impossible, or a histogram does not
        sum to E.
    """
    table = _read_table(Path(csv_path))
    bins = [name for name in table if name.startswith(_BIN)]
    missing = {"gpqa_max_over_mean", "gpqa_top32_share_pct"} - table.keys()
    if missing or not bins:
        raise InputError(f"{csv_path}: columns {sorted(missing) or [_BIN + '*']} are missing")
    for name in bins:
        _check_range(csv_path, name, table[name], 0, num_experts)
    _check_range(csv_path, "gpqa_max_over_mean", table["gpqa_max_over_mean"], 1, num_experts)
    _check_range(csv_path, "gpqa_top32_share_pct", table["gpqa_top32_share_pct"], 0, 100)
    try:
        edges = np.array([[float(edge) for edge in name.split("_")[-2:]] for name in bins])
    except ValueError:
        raise InputError(f"{csv_path}: columns {bins} -- {_BIN}<low>_<high>, numbers") from None
    counts = np.stack([table[name] for name in bins], axis=1).astype(np.int64)
    if num_experts <= _TOP or (counts.sum(axis=1) != num_experts).any():
        raise InputError(
            f"{csv_path}: histograms sum to {sorted(set(counts.sum(axis=1).tolist()))} -- must be "
            f"num_experts ({num_experts}), and more than {_TOP}"
        )
    rng = np.random.default_rng(seed)
    top = table["gpqa_top32_share_pct"] / 100 * num_experts
    rows = zip(counts, table["gpqa_max_over_mean"], top, strict=True)
    loads = np.array([_layer_loads(*row, edges) for row in rows])
    return rng.permuted(loads / loads.sum(axis=1, keepdims=True), axis=1)


def loadstats_layers(csv_path: Path) -> tuple[int, ...]:
    """Return the model's layer index of each row of a per-layer load file (column ``layer``).

    Raises
    ------
    InputError
        If the file or the column is missing, or it does not list layers, ascending.
    """
    table = _read_table(Path(csv_path))
    if "layer" not in table:
        raise InputError(f"{csv_path}: column layer is missing -- the model's layer of each row")
    layers = table["layer"]
    _check_range(csv_path, "layer", layers, 0, _MOST_LAYERS - 1)
    if (layers % 1).any() or (np.diff(layers) <= 0).any():
        raise InputError(f"{csv_path}: layer {layers.tolist()} -- whole numbers, ascending")
    return tuple(layers.astype(int).tolist())


def _read_table(path: Path) -> dict[str, Floats]:
    """Read a CSV of numbers, column by column."""
    if not path.is_file():
        raise InputError(f"{path}: no such file -- give a per-layer load statistics CSV")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
        if not rows:
            raise ValueError("no rows")
        for number, row in enumerate(rows, 1):
            if len(row) != len(header):
                raise ValueError(f"row {number} has {len(row)} cells, the header {len(header)}")
        return dict(zip(header, np.array(rows, dtype=np.float64).T, strict=True))
    except (ValueError, csv.Error) as error:
        raise InputError(
            f"{path}: not a table of numbers ({error}) -- a header, then a row per MoE layer; was "
            "it cut off?"
        ) from error


def _check_range(path: Path, name: str, values: Floats, low: float, high: float) -> None:
    wrong = values[~((values >= low) & (values <= high))]  # NaN too
    if len(wrong):
        raise InputError(f"{path}: {name} {wrong[0]:g} -- from {low:g} to {high:g}")


def _layer_loads(counts: NDArray[np.int64], largest: float, top: float, edges: Floats) -> Floats:
    """Return one layer's loads over the mean, ascending; they sum to the number of experts.

    The 32 busiest experts and the others share one bin; where it is cut decides whether both
    sums can be met. The cut nearest to an even spread for which they can is taken.
    """
    order = np.repeat(np.arange(len(counts)), counts)  # bin of each expert, ascending
    low, high = edges[order].T
    high = np.where(order == order[-1], largest, high)
    low, high = low + _MARGIN * (high - low), high - _MARGIN * (high - low)
    low[-1] = high[-1] = largest
    split = len(order) - _TOP
    shared = order[split]
    inside = order == shared
    rank = np.count_nonzero(inside[:split]) / np.count_nonzero(inside)
    best, best_miss = low, np.inf
    for cut in sorted(np.linspace(0.02, 0.98, 49), key=lambda c: abs(c - rank)):
        at = low[split] + cut * (high[split] - low[split])
        floor, ceiling = low.copy(), high.copy()
        ceiling[:split][inside[:split]] = at
        floor[split:][inside[split:]] = np.maximum(floor[split:][inside[split:]], at)
        upper = _fill(floor[split:], ceiling[split:], order[split:], top)
        rest = _fill(floor[:split], ceiling[:split], order[:split], len(order) - upper.sum())
        loads = np.concatenate([rest, upper])
        miss = abs(loads.sum() - len(order)) + abs(upper.sum() - top)
        if miss < best_miss:
            best, best_miss = loads, miss
        if miss < 1e-9 * len(order):
            break
    return best


def _fill(low: Floats, high: Floats, group: NDArray[np.int64], total: float) -> Floats:
    """Place values between ``low`` and ``high``, ascending in each group, to sum to ``total``.

    Within a group they are ``low + (high - low) * u ** gamma`` at even u; gamma is solved for,
    and stays at its limit where no gamma reaches the sum.
    """
    size = np.bincount(group)[group]
    start = np.searchsorted(group, group)
    even = (np.arange(len(group)) - start + 0.5) / size

    def values(log_gamma: float) -> Floats:
        return low + (high - low) * even ** np.exp(log_gamma)

    many, few = -6.0, 6.0  # the sum falls as gamma grows
    for _ in range(60):
        middle = (many + few) / 2
        many, few = (middle, few) if values(middle).sum() > total else (many, middle)
    return values((many + few) / 2)


def _check_shares(shares: NDArray[Any]) -> None:
    if shares.ndim != 2 or (shares < 0).any() or not np.allclose(shares.sum(axis=1), 1):
        raise InputError(f"shares {list(shares.shape)} -- [layers, experts], each row sums to 1")


def _check_draw(shares: Floats, tokens: int, requests: int, top_k: int, reuse: float) -> None:
    _check_shares(shares)
    if top_k < 1:
        raise InputError(f"top_k {top_k} -- at least 1")
    if not 1 <= requests <= tokens:
        raise InputError(f"requests {requests} -- must be between 1 and tokens ({tokens})")
    if shares.max() * top_k >= 1:
        raise InputError(
            f"largest share {shares.max():.3f} -- with top-{top_k} distinct experts a share is "
            f"below 1/{top_k}; use synthetic_step_counts, or a smaller skew"
        )
    if top_k > np.count_nonzero(shares, axis=1).min():
        raise InputError(f"top_k {top_k} -- at most the experts with a positive share")
    if not 0 <= reuse <= 1:
        raise InputError(f"reuse {reuse} -- a share of the variance, from 0 to 1")
