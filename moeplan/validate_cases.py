"""The steps on which prediction and measurement meet: batches, loads, contexts, and expert ids.

A case is a step of so many tokens under one load, in several windows of different tokens. The ids
of every window are rows of one trace: they are forced on the real run and counted by the
prediction. Loads differ in the routing alone: ``trace`` takes decode steps of the later half of
the requests, composed as `traces.batches` does; ``balanced`` gives each token experts a fixed
stride apart; ``power law 1.2`` draws distinct experts with popularity rank^-1.2 (Plackett-Luce).
Both are permuted anew in each layer. A window's requests are drawn from one set of cached ones,
whose contexts are evenly spaced quantiles of the trace's. T tokens, L MoE layers, K choices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from simulator.batches import StepBatch
from traces.batches import Phase, decode_batches, phase_rows
from traces.model_spec import ModelSpec
from traces.routing_trace import RoutingTrace, check_against_model
from traces.splits import split_requests
from traces.synth import zipf_shares

Ints = NDArray[np.int64]
Load = Literal["balanced", "trace", "power law 1.2"]
LOADS: tuple[Load, ...] = get_args(Load)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPTS = (64, 256, 512)
"""Tokens of a prefill step: consecutive tokens of the later half, run as one prompt."""
_EXPONENT = 1.2
_MOST_WINDOWS, _FILL = 4, 64  # windows of a case at most; small steps take so many tokens in all


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """One step of a case."""

    batch: StepBatch
    """Its rows are those of `Cases.trace`."""
    requests: Ints
    """Of decode, the cached request of each token, [T]; of prefill, the one prompt, [1]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Steps of one phase, size and load."""

    phase: Literal["decode", "prefill"]
    tokens: int
    load: Load
    windows: tuple[Window, ...]

    @property
    def label(self) -> str:
        """Such as ``decode 64, balanced``."""
        return f"{self.phase} {self.tokens}, {self.load}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cases:
    """All cases, and what their windows point to."""

    trace: RoutingTrace
    """One row per token of every window."""
    contexts: Ints
    """Tokens that each cached request has once its next one is in, [requests]."""
    all: tuple[Case, ...]

    def experts(self, window: Window) -> Ints:
        """Logical experts of a window's tokens, [L, T, K]."""
        return self.trace.experts[window.batch.rows].swapaxes(0, 1).astype(np.int64)


def make_cases(
    model: ModelSpec,
    trace: RoutingTrace,
    *,
    batches: Sequence[int] = BATCHES,
    prompts: Sequence[int] = PROMPTS,
    loads: Sequence[Load] = LOADS,
    context: int = 512,
    windows: int = 2,
    seed: int = 0,
) -> Cases:
    """Make the cases of a model.

    Parameters
    ----------
    model
    trace
        Its later half (`traces.splits`) is used; without decode rows, the others stand in.
    batches
        Tokens of the decode steps.
    prompts
        Tokens of the prefill steps, under the trace's load.
    loads
        Of the decode steps.
    context
        Contexts of the decode steps are at most so many tokens.
    windows
        Of each case; steps of few tokens, which differ most and cost least, get up to 4.
    seed
        Of everything drawn.

    Raises
    ------
    InputError
        If trace and model disagree, a number is below 1, a load is unknown, there is no case, or
        the trace is too short for a prompt.
    """
    check_against_model(trace, model)
    _check(batches, prompts, loads, context=context, windows=windows)
    late = split_requests(trace, "early_late")[1]
    make = _Maker(model, late, max(batches, default=1), context, seed)
    cases = [make.decode(tokens, load, windows) for tokens in batches for load in loads]
    cases += [make.prefill(tokens, windows) for tokens in prompts]
    return Cases(trace=make.trace(), contexts=make.contexts, all=tuple(cases))


class _Maker:
    """Makes one case after another; their rows collect in one trace."""

    def __init__(
        self, model: ModelSpec, late: RoutingTrace, requests: int, context: int, seed: int
    ) -> None:
        self._model, self._late, self._seed = model, late, seed
        self._rng = np.random.default_rng(seed)
        self._phase: Phase = "decode" if late.decode.any() else "any"
        shares = zipf_shares(model.num_experts, _EXPONENT, model.num_moe_layers, seed)
        self._popularity_LE = np.log(shares)
        seen = np.sort(np.minimum(late.position[phase_rows(late, self._phase)] + 1, context))
        even = (np.arange(requests) + 0.5) / requests * len(seen)
        self.contexts: Ints = self._rng.permutation(seen[even.astype(np.int64)].astype(np.int64))
        self._experts: list[NDArray[np.uint16]] = []
        self._rows = 0

    def decode(self, tokens: int, load: Load, windows: int) -> Case:
        """Decode steps of one size and load."""
        draw: dict[Load, Callable[[int], NDArray[np.uint16]]] = {
            "balanced": self._balanced,
            "trace": self._recorded,
            "power law 1.2": self._skewed,
        }
        count = max(windows, min(_MOST_WINDOWS, _FILL // tokens))
        made = [self._decode_window(draw[load](tokens)) for _ in range(count)]
        return Case(phase="decode", tokens=tokens, load=load, windows=tuple(made))

    def prefill(self, tokens: int, windows: int) -> Case:
        """Prompts of one length, one after another in the trace."""
        rows = phase_rows(self._late, "any")
        if len(rows) < tokens:
            raise InputError(
                f"prefill of {tokens} tokens -- the later half of the trace has {len(rows)} -- ask "
                "for shorter prompts, or give a longer trace"
            )
        starts = np.arange(windows) * tokens % (len(rows) - tokens + 1)
        made = [self._prefill_window(rows[start : start + tokens]) for start in starts.tolist()]
        return Case(phase="prefill", tokens=tokens, load="trace", windows=tuple(made))

    def trace(self) -> RoutingTrace:
        """Return the rows of all cases so far."""
        count = np.arange(self._rows)
        note = "steps of moeplan validate: recorded rows, balanced and power-law choices"
        return RoutingTrace(
            meta=replace(self._late.meta, synthetic=True, note=note, num_candidates=0),
            request_id=count.astype(np.int32),
            position=np.zeros(self._rows, dtype=np.int32),
            decode=np.ones(self._rows, dtype=np.bool_),
            step=np.zeros(self._rows, dtype=np.int32),
            domain=np.zeros(self._rows, dtype=np.int16),
            domains=("validate",),
            experts=np.concatenate(self._experts),
        )

    def _decode_window(self, experts_TLK: NDArray[np.uint16]) -> Window:
        tokens = len(experts_TLK)
        requests = self._rng.permutation(len(self.contexts))[:tokens]
        batch = StepBatch(
            rows=self._keep(experts_TLK),
            context=self.contexts[requests],
            home=np.zeros(tokens, dtype=np.int64),
            last=np.ones(tokens, dtype=np.bool_),
        )
        return Window(batch=batch, requests=requests)

    def _prefill_window(self, rows: Ints) -> Window:
        position = np.arange(len(rows))
        batch = StepBatch(
            rows=self._keep(self._late.experts[rows]),
            context=position + 1,
            home=np.zeros(len(rows), dtype=np.int64),
            last=position == len(rows) - 1,
        )
        return Window(batch=batch, requests=np.zeros(1, dtype=np.int64))

    def _keep(self, experts_TLK: NDArray[np.uint16]) -> Ints:
        """Add rows to the trace; returns where they are."""
        rows = np.arange(self._rows, self._rows + len(experts_TLK))
        self._experts.append(experts_TLK)
        self._rows += len(experts_TLK)
        return rows

    def _recorded(self, tokens: int) -> NDArray[np.uint16]:
        self._seed += 1  # other requests in every window
        found = decode_batches(
            self._late, batch=tokens, steps=1, seed=self._seed, phase=self._phase
        )
        return self._late.experts[found.rows[0]]

    def _balanced(self, tokens: int) -> NDArray[np.uint16]:
        experts, top_k = self._model.num_experts, self._model.top_k
        first = self._rng.integers(experts) + np.arange(tokens)
        ids_TK = (first[:, None] + np.arange(top_k) * (experts // top_k)) % experts
        layers = [self._rng.permutation(experts)[ids_TK] for _ in range(len(self._popularity_LE))]
        return np.stack(layers, axis=1).astype(np.uint16)

    def _skewed(self, tokens: int) -> NDArray[np.uint16]:
        noise_TLE = self._rng.gumbel(size=(tokens, *self._popularity_LE.shape))
        order = np.argsort(-(self._popularity_LE + noise_TLE), axis=-1)
        return order[..., : self._model.top_k].astype(np.uint16)


def _check(
    batches: Sequence[int], prompts: Sequence[int], loads: Sequence[str], **counts: int
) -> None:
    numbers = {f"batch {n}": n for n in batches} | {f"prompt {n}": n for n in prompts}
    numbers |= {f"{name} {n}": n for name, n in counts.items()}
    if wrong := [name for name, n in numbers.items() if n < 1]:
        raise InputError(f"{', '.join(wrong)} -- at least 1 -- raise it")
    if unknown := sorted(set(loads) - set(LOADS)):
        raise InputError(f"load {unknown[0]!r} -- one of {', '.join(LOADS)} -- name one of these")
    if not prompts and not (batches and loads):
        raise InputError("no steps to validate -- at least one batch or prompt -- name some")
