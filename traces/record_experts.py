"""What one forward pass of a torch model chose: hooks on its experts and on its routers.

The choice is read from the *input of the experts*: every fused experts module of Hugging Face
transformers 5 is named ``...layers.N...experts`` and is called as ``experts(hidden_states,
top_k_index, top_k_weights)``, while routers differ from model to model. Only models whose experts
get every token (Llama 4) and the best candidates need what the router returned.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from basis.errors import InputError
from traces.parquet_columns import Columns
from traces.record_choice import Floats, Ints, check_choice, choice, to_numpy
from traces.record_layers import MoeLayer, layer_experts, moe_layers
from traces.record_scores import BestOfLayer, Candidates

if TYPE_CHECKING:
    from torch import nn


class ExpertsHooks:
    """Hooks that turn each forward pass into rows of a trace.

    Parameters
    ----------
    model
        A torch module whose MoE layers have a submodule named ``experts`` below a numbered layer.
    num_experts
        Experts per layer; if None, what the experts modules say.
    num_candidates
        Best candidates M to read of each token and layer; 0 for none.
    begins
        Called before each forward pass with the model's inputs by name.
    ends
        Called after it with its output and the number of tokens T, padding included; returns what
        is known of them by field of a trace, ``[T]`` each, and which are real, ``[T]``.
    took
        Called last with the real tokens: these fields, and `experts`, `weights` and maybe
        `candidates` and `candidate_scores` as a trace has them.

    Raises
    ------
    InputError
        When the model cannot be recorded.
    """

    def __init__(
        self,
        model: "nn.Module",
        *,
        num_experts: int | None,
        num_candidates: int = 0,
        begins: Callable[[Mapping[str, Any]], None],
        ends: Callable[[Any, int], tuple[Columns, NDArray[np.bool_]]],
        took: Callable[[Columns], None],
    ) -> None:
        self._model = model
        self.layers = moe_layers(model)
        self.num_experts = num_experts or layer_experts(self.layers)
        self._candidates = Candidates(num_candidates, self.num_experts) if num_candidates else None
        if self._candidates and any(layer.router is None for layer in self.layers):
            raise InputError(
                "candidates need the router's scores, but no module named gate or router is beside "
                "the experts -- record without candidates"
            )
        self._begins, self._ends, self._took = begins, ends, took
        self._names = list(inspect.signature(model.forward).parameters)
        self._running = False
        self._routed: dict[int, Any] = {}
        self._seen: dict[int, tuple[Ints, Floats, BestOfLayer | None]] = {}

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Index of each MoE layer in the model, ascending."""
        return tuple(layer.number for layer in self.layers)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks in the model while the block lasts."""
        with ExitStack() as handles:
            add = handles.enter_context  # a handle takes its hook out again
            for layer in self.layers:
                hook = self._experts_hook(layer)
                add(layer.experts.register_forward_pre_hook(hook, with_kwargs=True))
                if layer.router is not None:
                    add(layer.router.register_forward_hook(self._router_hook(layer)))
            add(self._model.register_forward_pre_hook(self._pass_begins, with_kwargs=True))
            add(self._model.register_forward_hook(self._pass_ends))
            yield

    def _pass_begins(self, _: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._begins(dict(zip(self._names, args, strict=False)) | kwargs)
        self._seen.clear()
        self._routed.clear()
        self._running = True

    def _router_hook(self, layer: MoeLayer) -> Any:
        def hook(_: "nn.Module", args: tuple[Any, ...], output: Any) -> None:
            self._routed[layer.number] = output

        return hook

    def _experts_hook(self, layer: MoeLayer) -> Any:
        def hook(_: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._running:
                raise InputError(
                    f"the experts of layer {layer.number} were called outside a forward pass of "
                    "the recorded model -- each pass has to go through it -- record the model that "
                    "you call, without gradient checkpointing"
                )
            if layer.number in self._seen:
                raise InputError(
                    f"layer {layer.number} was seen twice in one forward pass -- once is allowed "
                    "-- record without gradient checkpointing"
                )
            routed = self._routed.pop(layer.number, None)
            ids, weights = choice(layer, args, kwargs, routed)
            best = None
            if self._candidates:
                best = self._candidates.read(routed, ids, weights, layer.number)
            self._seen[layer.number] = (to_numpy(ids), to_numpy(weights), best)

        return hook

    def _pass_ends(self, _: "nn.Module", args: tuple[Any, ...], output: Any) -> None:
        self._running = False
        missing = [layer.number for layer in self.layers if layer.number not in self._seen]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(self.layers)} MoE layers were not seen in a forward "
                f"pass (first: layer {missing[0]}) -- each must be -- check that the model calls "
                "its experts modules (transformers 5 or later) and is not compiled"
            )
        seen = [self._seen[layer.number] for layer in self.layers]
        shapes = {ids.shape for ids, _, _ in seen}
        if len(shapes) > 1:
            raise InputError(
                f"layers choose differently: [tokens, top_k] is {sorted(shapes)} -- one top-k for "
                "all layers is allowed -- this model cannot be recorded"
            )
        columns, real = self._ends(output, len(seen[0][0]))
        columns = {name: column[real] for name, column in columns.items()}
        ids = np.stack([ids[real] for ids, _, _ in seen], axis=1)
        weights = np.stack([weights[real] for _, weights, _ in seen], axis=1)
        check_choice(ids, weights, self.num_experts)
        columns |= {"experts": ids.astype(np.uint16), "weights": weights.astype(np.float16)}
        if self._candidates:
            best = [best for *_, best in seen if best]
            ids, scores = self._candidates.scored(best, weights, real)
            columns |= {"candidates": ids, "candidate_scores": scores}
        self._took(columns)
