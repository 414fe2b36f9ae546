"""The steps of the cases run for real on one process, again and again, and timed.

Rounds run every case in another random order, so that drift meets all alike, and each of its
windows once; a short step is run once more before, uncounted, as the step before it in a decode
loop. The time of a step is taken without laps; rounds with laps, which say where it goes, are mixed
in between. A first round is thrown away. Seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from moeplan.reference import import_kernels, uncollected
from moeplan.validate_cases import Case, Cases, Window
from traces.model_spec import ModelSpec

if TYPE_CHECKING:
    from kernels_ref import Decoder, StepSeconds

Floats = NDArray[np.float64]
_Key = TypeVar("_Key")
Run = Callable[[Case, Window, bool], "StepSeconds"]
"""Runs one step of a case, with laps or without."""
ROUNDS, LAP_ROUNDS = 5, 5
_SHORT = 64  # tokens below which the step before still shows in the caches
_LEAST = 5  # fewer have no quartiles


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One case; arrays are [rounds, windows], the last three of the rounds with laps."""

    total_s: Floats
    """Without laps."""
    lapped_s: Floats
    """With laps."""
    stage_s: dict[str, Floats]
    kernel_s: dict[str, Floats]

    @property
    def lap_cost(self) -> float:
        """What the laps add to a step, relative."""
        plain, lapped = (np.median(s, axis=0).mean() for s in (self.total_s, self.lapped_s))
        return float(lapped / plain - 1)


def measure_steps(
    model: ModelSpec,
    cases: Cases,
    *,
    threads: int,
    device: str = "cpu",
    rounds: int = ROUNDS,
    lap_rounds: int = LAP_ROUNDS,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Measured, ...]:
    """Run and time every case with random weights, all experts in memory.

    Parameters
    ----------
    model, cases
    threads
        Pinned threads of torch.
    device
        ``cpu`` or a CUDA device.
    rounds, lap_rounds
        Counted rounds without and with laps, at least 5 each.
    seed
        Of weights, token ids and orders.
    tell
        Is told what begins.

    Returns
    -------
    tuple of Measured
        In the order of ``cases.all``.

    Raises
    ------
    InputError
        If torch is missing, the decoder does not run the model, or rounds are too few.
    """
    kernels = import_kernels()
    with kernels.pinned(threads):
        tell(f"making {model.name}: {model.total_params / 1e6:.0f} M random parameters")
        run = DecoderRun(model, cases, device=device, seed=seed)
        return time_cases(
            cases.all, run, rounds=rounds, lap_rounds=lap_rounds, seed=seed, tell=tell
        )


def time_cases(
    cases: Sequence[Case],
    run: Run,
    *,
    rounds: int = ROUNDS,
    lap_rounds: int = LAP_ROUNDS,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Measured, ...]:
    """Time cases in interleaved rounds; parameters as `measure_steps`."""
    if min(rounds, lap_rounds) < _LEAST:
        raise InputError(
            f"{rounds} rounds and {lap_rounds} with laps -- at least {_LEAST} each, fewer have no "
            "quartiles -- raise them"
        )
    rng = np.random.default_rng(seed)
    kinds = rng.permutation([False] * rounds + [True] * lap_rounds).tolist()
    taken: dict[bool, list[list[list[StepSeconds]]]] = {False: [], True: []}
    with uncollected():
        tell(f"real steps: a first round of {len(cases)} cases, thrown away")
        for case in cases:
            run(case, case.windows[0], False)
        for number, laps in enumerate(kinds, start=1):
            tell(f"real steps: round {number} of {len(kinds)}")
            found: list[list[StepSeconds]] = [[] for _ in cases]
            for at in rng.permutation(len(cases)).tolist():
                case = cases[at]
                if case.tokens < _SHORT:
                    run(case, case.windows[-1], laps)
                found[at] = [run(case, window, laps) for window in case.windows]
            taken[laps].append(found)
    return tuple(
        _measured([f[at] for f in taken[False]], [f[at] for f in taken[True]])
        for at in range(len(cases))
    )


class DecoderRun:
    """Decoders of random weights that run windows: one for decode, one for prompts.

    Every cached request keeps its context: a step adds a token to some, and is taken back.
    """

    def __init__(self, model: ModelSpec, cases: Cases, *, device: str, seed: int) -> None:
        kernels = import_kernels()
        dtype = _one_dtype(model)
        try:
            kernels.check_runs(model)
        except ValueError as error:
            raise InputError(str(error)) from error
        self._model, self._cases = model, cases
        self._rng = np.random.default_rng(seed)
        weights = kernels.Weights.random(model, dtype=dtype, seed=seed, device=device)
        in_order = np.tile(np.arange(model.num_experts), (model.num_moe_layers, 1))
        slots = kernels.expert_slots(model, in_order, dtype=dtype, seed=seed, device=device)
        experts = kernels.ResidentExperts(model, in_order, slots)
        requests, prompt = len(cases.contexts), 1
        for case in cases.all:
            prompt = max(prompt, case.tokens if case.phase == "prefill" else 1)
        longest = int(cases.contexts.max())
        self._decoder: Decoder = kernels.Decoder(
            model, weights, experts, requests=requests, context=longest
        )
        self._prompts: Decoder = kernels.Decoder(
            model, weights, experts, requests=1, context=prompt
        )
        self._held = (cases.contexts - 1).tolist()
        self._decoder.warm_cache(self._held, seed=seed)

    def __call__(self, case: Case, window: Window, laps: bool) -> "StepSeconds":
        """Run a step and return its times; the caches are as before."""
        tokens = self._rng.integers(self._model.vocab_size, size=case.tokens)
        slots = self._cases.experts(window)  # experts lie in order: their ids are their slots
        requests = window.requests.tolist()
        if case.phase == "decode":
            self._decoder.clock.laps = laps
            self._decoder.decode(tokens, requests, slots)
            self._decoder.rewind(self._held)
            return self._decoder.clock.seconds()
        self._prompts.clock.laps = laps
        self._prompts.prefill([tokens], requests, slots)
        self._prompts.rewind([0])
        return self._prompts.clock.seconds()


def _one_dtype(model: ModelSpec) -> object:
    """Return torch's type of the one format of all numbers."""
    import torch

    known = {"fp32": torch.float32, "bf16": torch.bfloat16}
    formats = {model.weight_dtype, model.expert_dtype, model.activation_dtype, model.kv_dtype}
    if len(formats) > 1 or not formats <= known.keys():
        raise InputError(
            f"{model.name} has numbers in {', '.join(sorted(formats))} -- the decoder runs one of "
            f"{', '.join(known)} throughout -- set torch_dtype, and no quantisation"
        )
    return known[formats.pop()]


def _measured(
    plain: Sequence[Sequence["StepSeconds"]], lapped: Sequence[Sequence["StepSeconds"]]
) -> Measured:
    """Put the steps [rounds][windows] of a case into arrays."""
    stages = [[step.stage_s for step in windows] for windows in lapped]
    kernels = [[step.kernel_s for step in windows] for windows in lapped]
    return Measured(
        total_s=np.array([[step.total_s for step in windows] for windows in plain]),
        lapped_s=np.array([[step.total_s for step in windows] for windows in lapped]),
        stage_s={stage.value: _each(stages, stage) for stage in stages[0][0]},
        kernel_s={kernel: _each(kernels, kernel) for kernel in kernels[0][0]},
    )


def _each(rounds: Sequence[Sequence[Mapping[_Key, float]]], key: _Key) -> Floats:
    return np.array([[step[key] for step in windows] for windows in rounds])
