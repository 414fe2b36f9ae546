"""Small generators with random loadings, for the tests of the synthesis."""

from collections.abc import Callable

import numpy as np
import pytest

from traces.meta import TraceMeta
from traces.synth_kinds import ONE_KIND, Kinds, stationary
from traces.synth_model import Process, SynthFit

PARTS = (("request", 1.0, 0.15), ("slow", 0.95, 0.2), ("quick", 0.5, 0.2), ("token", 0.0, 0.45))


@pytest.fixture(scope="session")
def make_fit() -> Callable[..., SynthFit]:
    """Return a maker of generators; four fifths of every process are common factors."""

    def make(
        *,
        layers: int,
        experts: int,
        top_k: int = 1,
        spread: float = 0.5,
        prompt_share: float = 0.0,
        seed: int = 0,
        kinds: int = 1,
        first: int = 0,
    ) -> SynthFit:
        rng = np.random.default_rng(seed)
        cells = layers * experts
        processes = []
        for name, decay, variance in PARTS:
            loadings = rng.standard_normal((cells, 3))
            loadings *= np.sqrt(0.8 * variance / np.square(loadings).sum(axis=1, keepdims=True))
            processes.append(
                Process(
                    name=name, decay=decay, loadings=loadings.astype(np.float32),
                    own=np.full(cells, 0.2 * variance, np.float32),
                )
            )  # fmt: skip
        return SynthFit(
            meta=TraceMeta(
                model="made up", num_experts=experts, top_k=top_k,
                moe_layer_ids=tuple(range(layers)), synthetic=True,
                note="synthetic: made for tests",
            ),
            kinds=make_kinds(kinds, rng),
            means=spread * rng.standard_normal((kinds + first, cells)),
            processes=tuple(processes),
            lengths=np.array([20.0, 40.0, 80.0]),
            prompt_share=prompt_share,
        )  # fmt: skip

    return make


def make_kinds(count: int, rng: np.random.Generator) -> Kinds:
    """Return kinds with random transitions, which requests prefer in different ways."""
    if count == 1:
        return ONE_KIND
    transitions = rng.dirichlet(np.ones(count), count)
    return Kinds(
        share=stationary(transitions[None])[0], transitions=transitions,
        loadings=0.5 * rng.standard_normal((count, 2)), own=np.full(count, 0.1),
    )  # fmt: skip
