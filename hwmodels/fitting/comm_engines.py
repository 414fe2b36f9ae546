"""Which fitted collective an engine uses for what: the entries of its fitted file.

All-reduce by the engine's own kernel as it runs in a CUDA graph, gathers and plain all-to-all by
the library, dispatch and combine by the engine's exchange: DeepEP's low-latency kernels for few
tokens and the normal ones for many, TensorRT-LLM's NVLink kernels where they were measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from basis.evidence import weakest
from hwmodels.fitting.comm import CommFit, fit_comm
from hwmodels.kernels.collective import CollectiveCost
from hwmodels.kernels.exchange import ByTokens, ChannelExchange, TokenExchange
from hwmodels.link import Transfer
from hwmodels.ops import PHASES
from hwmodels.silicon.comm import CommTable, engine_tables, library_tables
from hwmodels.silicon.comm_moe import ACROSS, deepep_tables, exchange_tables

Costs = dict[Transfer, CollectiveCost]
GRAPH = {
    "trtllm": ("TRTLLM",),
    "sglang": ("SGLang_CustomAllReduce_graph",),
    "vllm": ("vLLM_custom_graph",),
}
"""Each engine's own all-reduce, as decode runs it."""
MODES = {
    "sglang": ("deepep_ll", "deepep_normal"),
    "trtllm": ("trtllm_deepep_ll", "trtllm_deepep_ht"),
    "vllm": ("deepep_ll", "deepep_ht"),
}
"""Each engine's exchange for few tokens, and for many."""
MOST_TOKENS = {"sglang": 128, "trtllm": 256, "vllm": 256}
"""Tokens of a rank up to which the first is taken: SGLang's default buffer
(SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK), and the most that was measured."""
_NVLINK = "NVLinkTwoSided"


@dataclass(frozen=True)
class EngineComm:
    """An engine's collectives on one device."""

    interconnect: Costs = field(default_factory=dict)
    """Inside a node."""
    network: Costs = field(default_factory=dict)
    """Across nodes; of H200 and NDR InfiniBand, a transfer for other devices."""
    fits: tuple[CommFit, ...] = ()
    """All fits behind them, for the report."""


def engine_comm(device: str, engine: str, units: float) -> EngineComm:
    """Fit what an engine uses.

    Parameters
    ----------
    device : str
        Catalog name of a GPU with tables.
    engine : str
        trtllm, sglang or vllm.
    units : float
        Units (SMs) of the device.

    Returns
    -------
    EngineComm
        What was not measured is left out, so that a cluster keeps its own figures.

    Raises
    ------
    InputError
        If the wheel is not installed or has no tables of the device.
    """
    across = (
        [t for t in deepep_tables(ACROSS) if t.level == "network"] if engine == "sglang" else []
    )
    fits = fit_comm(reads_by(device, engine), units)
    network = fit_comm(across, units)
    interconnect: Costs = {fit.table.op: fit.cost for fit in fits}  # the engine's own come last
    return EngineComm(
        interconnect=interconnect | halves(_by_kernel(fits), engine),
        network=_transferred(halves(_by_kernel(network), engine), device),
        fits=(*fits, *network),
    )


def reads_by(device: str, engine: str) -> list[CommTable]:
    """Return the tables behind an engine's entries in a node; of all-reduces, its own come last."""
    library = [table for table in library_tables(device) if table.dtype == "bf16"]
    own = [
        table
        for table in engine_tables(device)
        if table.source.engine == engine and table.kernel in GRAPH[engine]
    ]
    used = (*MODES[engine], _NVLINK)
    moe = deepep_tables(device) if engine == "sglang" else exchange_tables(device)
    return [*library, *own, *(t for t in moe if _inside(t, engine) and t.kernel in used)]


def _inside(table: CommTable, engine: str) -> bool:
    return table.level == "node" and table.source.engine == engine


def _by_kernel(fits: Sequence[CommFit]) -> dict[tuple[Transfer, str], CollectiveCost]:
    return {(fit.table.op, fit.table.kernel): fit.cost for fit in fits}


def halves(costs: Mapping[tuple[Transfer, str], CollectiveCost], engine: str) -> Costs:
    """Return dispatch and combine of an engine, by tokens where both its kernels are known.

    Parameters
    ----------
    costs : mapping
        Cost models by use and kernel.
    engine : str
        trtllm, sglang or vllm.
    """
    found: Costs = {}
    for phase in PHASES:
        few, many = (costs.get((phase, kernel)) for kernel in MODES[engine])
        if (phase, _NVLINK) in costs:
            found[phase] = costs[phase, _NVLINK]
        elif isinstance(few, TokenExchange) and isinstance(many, (TokenExchange, ChannelExchange)):
            found[phase] = _by_tokens(few, many, MOST_TOKENS[engine])
        elif (only := few or many) is not None:
            found[phase] = only
    return found


def _by_tokens(few: TokenExchange, many: TokenExchange | ChannelExchange, most: int) -> ByTokens:
    """Join two kernels; the errors stated are those of the worse."""
    errors = [cost.held_out for cost in (few, many) if cost.held_out is not None]
    return ByTokens.model_construct(
        few=few,
        many=many,
        most_tokens=most,
        low=min(few.low, many.low),
        high=max(few.high, many.high),
        evidence=weakest([few.evidence, many.evidence]),
        source="few and many",
        held_out=max(errors, key=lambda error: error.median, default=None),
    )


def _transferred(costs: Costs, device: str) -> Costs:
    if device == ACROSS:
        return costs
    return {name: cost.model_copy(update={"evidence": "transfer"}) for name, cost in costs.items()}
