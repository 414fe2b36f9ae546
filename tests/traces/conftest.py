"""Small random traces for the tests of `traces`."""

from collections.abc import Callable

import numpy as np
import pytest

from traces.routing_trace import RoutingTrace, TraceMeta


@pytest.fixture(scope="session")
def make_trace() -> Callable[..., RoutingTrace]:
    """Return a maker of random valid traces; requests are interleaved as an engine runs them."""

    def make(
        *,
        lengths: tuple[int, ...] = (7, 4, 9),
        layers: int = 3,
        experts: int = 8,
        top_k: int = 2,
        prompt: int = 2,
        weights: bool = True,
        seed: int = 0,
    ) -> RoutingTrace:
        rng = np.random.default_rng(seed)
        request = np.repeat(np.arange(len(lengths)), lengths)
        position = np.concatenate([np.arange(n) for n in lengths])
        order = np.lexsort((request, np.maximum(position - prompt + 1, 0)))
        request, position = request[order], position[order]
        tokens = len(request)
        chosen = rng.random((tokens, layers, experts)).argsort(axis=-1)[..., :top_k]
        return RoutingTrace(
            meta=TraceMeta(
                model="random", num_experts=experts, top_k=top_k,
                moe_layer_ids=tuple(range(layers)), synthetic=True,
            ),
            # ids need not start at 0 nor ascend
            request_id=((len(lengths) - request) * 10).astype(np.int32),
            position=position.astype(np.int32),
            decode=position >= prompt,
            step=np.maximum(position - prompt + 1, 0).astype(np.int32),
            domain=(request % 2).astype(np.int16),
            domains=("prose", "code", "unused"),
            experts=chosen.astype(np.uint16),
            weights=rng.random((tokens, layers, top_k)).astype(np.float16) if weights else None,
        )  # fmt: skip

    return make
