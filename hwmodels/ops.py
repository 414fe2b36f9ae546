"""What work there is: the operations of one MoE transformer step, as columns.

One row of a column class is one operation on one rank (a collective: on all ranks at once);
counts are in tokens, elements or bytes as each field says. The same value is priced by
`hwmodels.cost` and executed by the reference kernels, so both speak of the same work.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from basis.dtypes import DTYPES, bytes_of
from basis.errors import InputError

Floats = NDArray[np.float64]
Column = NDArray[Any] | int
"""One number per row, or one number for all rows; an array of equal length after construction."""


class Stage(StrEnum):
    """Where in a step an operation belongs; the causes in a result's breakdown."""

    EMBED = "embed"
    ATTENTION = "attention"
    ROUTER = "router"
    DISPATCH = "dispatch"
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared_experts"
    DENSE_FFN = "dense_ffn"
    COMBINE = "combine"
    HEAD = "head"
    OTHER = "other"
    FETCH = "fetch"
    """Weights copied into the memory where they are used."""
    TENSOR_PARALLEL = "tensor_parallel"
    """Sums and gathers over the ranks that share a layer's attention, dense parts or head."""
    TRANSFER = "transfer"
    """Activations copied between memories or pipeline stages."""


class _Columns:
    """Shared checks of the column classes."""

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self.__dataclass_fields__))))  # type: ignore[attr-defined]

    def _settle(self, *names: str) -> None:
        """Broadcast the named fields to one length and refuse negative or fractional shapes."""
        arrays = [np.atleast_1d(np.asarray(getattr(self, name))) for name in names]
        for name, array in zip(names, arrays, strict=True):
            self._refuse(name, array, ndim=1)
        try:
            settled = np.broadcast_arrays(*arrays)
        except ValueError:
            sizes = ", ".join(f"{n} has {len(a)}" for n, a in zip(names, arrays, strict=True))
            raise InputError(
                f"{type(self).__name__}: columns of different length ({sizes}) -- "
                "give one number per row, or one for all rows"
            ) from None
        for name, array in zip(names, settled, strict=True):
            object.__setattr__(self, name, array)

    def _refuse(self, name: str, array: NDArray[Any], *, ndim: int) -> None:
        where = f"{type(self).__name__}.{name}"
        if array.ndim != ndim:
            raise InputError(f"{where}: shape {array.shape} -- {ndim} dimension(s) are expected")
        if not np.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
            raise InputError(f"{where}: {array.dtype} -- numbers are expected")
        if array.size and not (array.min() >= 0 and np.isfinite(array).all()):
            raise InputError(f"{where}: smallest {array.min()} -- every value is finite and >= 0")

    def _check_dtypes(self, *names: str) -> None:
        for name in names:
            dtype = getattr(self, name)
            if dtype not in DTYPES:
                raise InputError(
                    f"{type(self).__name__}.{name}: unknown dtype {dtype!r} -- "
                    f"known are {', '.join(DTYPES)}"
                )


def _f(column: Column) -> Floats:
    return np.asarray(column, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Gemm(_Columns):
    """Dense product ``[m, k] @ [k, n]``; with m = 0 nothing runs."""

    m: Column
    """Rows of the activations (tokens)."""
    n: Column
    """Columns of the weights (output width)."""
    k: Column
    """Rows of the weights (input width)."""
    weight_dtype: str
    activation_dtype: str

    def __post_init__(self) -> None:
        self._settle("m", "n", "k")
        self._check_dtypes("weight_dtype", "activation_dtype")

    def flops(self) -> Floats:
        """2 m n k: one multiply and one add per weight and token, FLOP."""
        return 2 * _f(self.m) * _f(self.n) * _f(self.k)

    def weight_bytes(self) -> Floats:
        """Bytes of the weight matrix."""
        return _f(self.n) * _f(self.k) * bytes_of(self.weight_dtype, 1)

    def activation_bytes(self) -> Floats:
        """Bytes of activations read and written."""
        elements = _f(self.m) * (_f(self.n) + _f(self.k))
        return elements * bytes_of(self.activation_dtype, 1)

    def bytes_moved(self) -> Floats:
        """Bytes to or from memory when every operand moves once; zero without rows."""
        return np.where(_f(self.m) > 0, self.weight_bytes() + self.activation_bytes(), 0.0)


@dataclass(frozen=True, kw_only=True)
class AttentionDecode(_Columns):
    """Attention of one new token per sequence over its cache; MLA in its absorbed form.

    For absorbed MLA the heads share one latent: num_kv_heads = 1, head_dim = latent + rope,
    v_head_dim = latent, kv_elements = latent + rope.
    """

    tokens: Column
    """Sequences of the row, one query each."""
    context: Column
    """Sum over the sequences of the cached tokens each attends to (windows already applied)."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    kv_elements: int
    """Cached elements per token (of the layer)."""
    kv_dtype: str
    activation_dtype: str
    window: int = 0
    """Tokens that a sliding window leaves each query; 0: no window. ``context`` has it applied
    already; kernels skip whole blocks of keys only, so that its edges cost something."""

    def __post_init__(self) -> None:
        self._settle("tokens", "context")
        self._check_dtypes("kv_dtype", "activation_dtype")

    @property
    def latent(self) -> bool:
        """Whether keys and values are one shared latent (MLA): less is cached than K plus V."""
        return self.num_kv_heads == 1 and self.kv_elements < self.head_dim + self.v_head_dim

    def flops(self) -> Floats:
        """2 context heads (head_dim + v_head_dim): scores and weighted sum, FLOP."""
        return 2 * _f(self.context) * self.num_heads * (self.head_dim + self.v_head_dim)

    def kv_bytes(self) -> Floats:
        """Bytes of cache read."""
        return _f(self.context) * bytes_of(self.kv_dtype, self.kv_elements)

    def bytes_moved(self) -> Floats:
        """Bytes of cache, queries and outputs."""
        width = self.num_heads * (self.head_dim + self.v_head_dim)
        return self.kv_bytes() + _f(self.tokens) * bytes_of(self.activation_dtype, width)


@dataclass(frozen=True, kw_only=True)
class AttentionPrefill(_Columns):
    """Causal attention of whole prompts (or chunks of them)."""

    tokens: Column
    """Query tokens of the row."""
    pairs: Column
    """Sum over sequences of (query, key) pairs that causality and windows leave."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    kv_elements: int
    """Cached elements per token (of the layer)."""
    kv_dtype: str
    activation_dtype: str
    window: int = 0
    """Tokens that a sliding window leaves each query; 0: no window. ``pairs`` has it applied
    already; kernels skip whole blocks of keys only, so that its edges cost something."""

    def __post_init__(self) -> None:
        self._settle("tokens", "pairs")
        self._check_dtypes("kv_dtype", "activation_dtype")

    @property
    def latent(self) -> bool:
        """Whether keys were expanded from a latent (MLA): they hold the rotary part, values not."""
        return self.head_dim != self.v_head_dim

    def flops(self) -> Floats:
        """2 pairs heads (head_dim + v_head_dim), FLOP."""
        return 2 * _f(self.pairs) * self.num_heads * (self.head_dim + self.v_head_dim)

    def bytes_moved(self) -> Floats:
        """Bytes of queries, outputs, and of the prompt's own cache once."""
        width = self.num_heads * (self.head_dim + self.v_head_dim)
        per_token = bytes_of(self.activation_dtype, width) + bytes_of(
            self.kv_dtype, self.kv_elements
        )
        return _f(self.tokens) * per_token


@dataclass(frozen=True, kw_only=True)
class Route(_Columns):
    """Router: scores of all experts for each token, then its top-k."""

    tokens: Column
    hidden: int
    experts: int
    top_k: int
    activation_dtype: str

    def __post_init__(self) -> None:
        self._settle("tokens")
        self._check_dtypes("activation_dtype")
        if not 0 < self.top_k <= self.experts:
            raise InputError(
                f"Route.top_k: {self.top_k} -- between 1 and the number of experts ({self.experts})"
            )

    def flops(self) -> Floats:
        """2 tokens hidden experts, FLOP; the selection is free."""
        return 2 * _f(self.tokens) * self.hidden * self.experts

    def bytes_moved(self) -> Floats:
        """Bytes of router weights, activations, and scores written and read in fp32."""
        weights = np.where(_f(self.tokens) > 0, float(self.hidden * self.experts), 0.0)
        scores = _f(self.tokens) * (2 * self.experts + 2 * self.top_k) * 4
        activations = weights + _f(self.tokens) * self.hidden
        return activations * bytes_of(self.activation_dtype, 1) + scores


@dataclass(frozen=True, kw_only=True)
class Permute(_Columns):
    """Gather or scatter of rows: each is read once and written once."""

    rows: Column
    row_bytes: Column
    """Bytes of one row."""
    back: bool = False
    """False: tokens are copied to the rows of their experts. True: rows are weighed and added up
    per token. A processor may have a kernel of its own for the second (``unpermute``)."""

    def __post_init__(self) -> None:
        self._settle("rows", "row_bytes")

    def bytes_moved(self) -> Floats:
        """Bytes read plus written."""
        return 2 * _f(self.rows) * _f(self.row_bytes)


@dataclass(frozen=True, kw_only=True)
class GroupedGemm(_Columns):
    """The whole expert FFN of one rank: up (and gate), activation, down, for each local expert."""

    tokens_per_expert: NDArray[Any]
    """[n, slots] tokens that each local slot really gets."""
    hidden: int
    """Width of the model."""
    width: int
    """Inner width of one expert."""
    gated: bool
    """True: up and gate matrices (SwiGLU); False: up only."""
    weight_dtype: str
    activation_dtype: str
    tokens: Column | None = None
    """[n] tokens that the rank is shown, those without an expert of its own too (with an
    all-gather every rank sees all); None: each (token, expert) pair comes by itself."""
    cached: bool = False
    """Whether the processor has just copied these weights, so that its cache holds what fits."""

    def __post_init__(self) -> None:
        counts = np.asarray(self.tokens_per_expert)
        self._refuse("tokens_per_expert", counts, ndim=2)
        object.__setattr__(self, "tokens_per_expert", counts)
        if self.tokens is not None:
            shown = np.atleast_1d(np.asarray(self.tokens))
            self._refuse("tokens", shown, ndim=1)
            if len(shown) not in (1, len(counts)):
                raise InputError(
                    f"GroupedGemm.tokens: {len(shown)} numbers for {len(counts)} rows -- "
                    "give one number per row, or one for all rows"
                )
            object.__setattr__(self, "tokens", np.broadcast_to(shown, len(counts)))
        self._check_dtypes("weight_dtype", "activation_dtype")
        if self.hidden < 1 or self.width < 1:
            raise InputError(
                f"GroupedGemm: hidden {self.hidden}, width {self.width} -- both are at least 1"
            )

    @property
    def matrices(self) -> int:
        """Weight matrices of one expert: up, (gate,) down."""
        return 3 if self.gated else 2

    def rows(self) -> Floats:
        """[n] (token, expert) pairs."""
        return self.tokens_per_expert.sum(axis=1, dtype=np.float64)

    def shown(self) -> Floats:
        """[n] tokens at the layer's door, see ``tokens``."""
        return self.rows() if self.tokens is None else _f(self.tokens)

    def active(self) -> Floats:
        """[n] slots with at least one token: only their weights are read."""
        return np.count_nonzero(self.tokens_per_expert, axis=1).astype(np.float64)

    def flops_per_row(self) -> float:
        """FLOP of one (token, expert) pair."""
        return 2.0 * self.matrices * self.hidden * self.width

    def flops(self) -> Floats:
        """FLOP of the tokens that are there, without padding."""
        return self.rows() * self.flops_per_row()

    def bytes_per_expert(self) -> float:
        """Weight bytes of one expert."""
        return bytes_of(self.weight_dtype, self.matrices * self.hidden * self.width)

    def weight_bytes(self) -> Floats:
        """[n] weight bytes of the active slots."""
        return self.active() * self.bytes_per_expert()

    def activation_bytes(self) -> Floats:
        """[n] bytes in and out of both products, and of the activation between them."""
        inner = self.matrices * self.width
        return self.rows() * bytes_of(self.activation_dtype, 2 * self.hidden + inner)

    def bytes_moved(self) -> Floats:
        """[n] bytes to or from memory."""
        return self.weight_bytes() + self.activation_bytes()


Group = tuple[int, ...]
"""Distinct ranks that work on one collective."""
Phase = Literal["dispatch", "combine"]
"""Tokens to their experts, or the results back."""
PHASES: tuple[Phase, ...] = get_args(Phase)


def _groups(
    name: str, ranks: Group | tuple[Group, ...], rows: int, size: int | None = None
) -> tuple[Group, ...]:
    """Return the groups of a collective of so many rows; one may be given by itself."""
    groups = tuple(g for g in ranks if isinstance(g, tuple))
    groups = groups or (tuple(g for g in ranks if not isinstance(g, tuple)),)
    if any(not g or len(set(g)) != len(g) or min(g) < 0 for g in groups):
        raise InputError(f"{name}.ranks: {ranks} -- distinct ranks, at least one")
    sizes = {len(group) for group in groups}
    if rows % len(groups) or sizes != {size or len(groups[0])}:
        raise InputError(
            f"{name}.ranks: {rows} rows for {len(groups)} groups of {sorted(sizes)} ranks -- as "
            f"many rows for each group, all groups of {size or 'equal'} ranks"
        )
    return groups


@dataclass(frozen=True, kw_only=True)
class AllToAll(_Columns):
    """Every rank of a group sends to every other what the traffic matrix says."""

    traffic: NDArray[Any]
    """[n, l, l] bytes; row g sends to column h of the group; the diagonal is free."""
    ranks: Group | tuple[Group, ...] | None = None
    """The l ranks of the group, or several groups that the rows belong to in turn (row i to group
    i % groups); None = all ranks of the cluster. A tuple of groups after construction."""
    phase: Phase | None = None
    """Half of an expert layer's exchange, where a link's cost models differ; None: neither."""
    tokens: Column = 0
    """Tokens of the rank that has most, for kernels that work through each; 0: not stated."""
    experts: int = 0
    """Experts of the layer over all ranks, for kernels that flag each; 0: not stated."""
    row_bytes: float = 0.0
    """Bytes of one token's row; 0: not stated."""
    copies: Column = 1
    """(token, expert) pairs for each row in ``traffic``, where a token goes once to a rank: what
    kernels that send a row per expert send more."""

    def __post_init__(self) -> None:
        traffic = np.asarray(self.traffic)
        self._refuse("traffic", traffic, ndim=3)
        if traffic.shape[1] != traffic.shape[2]:
            raise InputError(f"AllToAll.traffic: shape {traffic.shape} -- [n, ranks, ranks]")
        object.__setattr__(self, "traffic", traffic)
        self._spread(len(traffic), "tokens", "copies")
        if self.ranks is not None:
            groups = _groups("AllToAll", self.ranks, *traffic.shape[:2])
            object.__setattr__(self, "ranks", groups)

    def _spread(self, rows: int, *names: str) -> None:
        for name in names:
            column = np.atleast_1d(np.asarray(getattr(self, name)))
            self._refuse(name, column, ndim=1)
            if len(column) not in (1, rows):
                raise InputError(
                    f"AllToAll.{name}: {len(column)} numbers for {rows} rows -- one for each, or "
                    "one for all"
                )
            object.__setattr__(self, name, np.broadcast_to(column, rows))


@dataclass(frozen=True, kw_only=True)
class _Ring(_Columns):
    """A collective on one tensor that a ring of ranks passes on in equal shares."""

    bytes: Column
    """Bytes of the whole tensor."""
    ranks: Group | tuple[Group, ...]
    """The ranks that take part, or several groups that the rows belong to in turn (row i to group
    i % groups). A tuple of groups after construction."""

    def __post_init__(self) -> None:
        self._settle("bytes")
        groups = _groups(type(self).__name__, self.ranks, len(self))
        object.__setattr__(self, "ranks", groups)


@dataclass(frozen=True, kw_only=True)
class AllReduce(_Ring):
    """Sum over ranks; every one ends with the whole result."""


@dataclass(frozen=True, kw_only=True)
class AllGather(_Ring):
    """Every rank brings its share of the tensor and ends with the whole."""


@dataclass(frozen=True, kw_only=True)
class ReduceScatter(_Ring):
    """Sum over ranks; each ends with its share of the result."""


@dataclass(frozen=True, kw_only=True)
class Copy(_Columns):
    """Bytes from one memory to another, over the link between them."""

    bytes: Column
    source: str
    """Name of a memory of the device or the node ("hbm", "host")."""
    target: str

    def __post_init__(self) -> None:
        self._settle("bytes")


Part = Literal["norm", "rope", "activation", "embedding"]
"""Kinds of elementwise work: residual add and norm; rotary embedding and cache write; the
activation of a feed-forward network; the lookup of embeddings."""
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class Elementwise(_Columns):
    """Norms, residual additions, activations: bytes through memory and nothing else."""

    bytes: Column
    """Bytes read plus written."""
    part: Part | None = None
    """What it is, where a processor may have a kernel of its own for it; None: a plain stream."""
    tokens: Column = 0
    """Tokens it is for, each with an equal share of the bytes; 0: not stated."""

    def __post_init__(self) -> None:
        self._settle("bytes", "tokens")

    def bytes_moved(self) -> Floats:
        """Bytes read plus written."""
        return _f(self.bytes)


Op = (
    Gemm
    | AttentionDecode
    | AttentionPrefill
    | Route
    | Permute
    | GroupedGemm
    | AllToAll
    | AllReduce
    | AllGather
    | ReduceScatter
    | Copy
    | Elementwise
)
