"""Recording of routing from a torch model: which experts each token visited in each layer.

Forward hooks read the *input of the experts*, not the router: every fused experts module of Hugging
Face transformers 5 is named ``...layers.N...experts`` and is called as ``experts(hidden_states,
top_k_index, top_k_weights)``, while routers differ from model to model. Torch is not imported
here; the tensors come from the model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from basis import InputError
from traces.routing_trace import RoutingTrace, TraceMeta

if TYPE_CHECKING:
    from torch import Tensor, nn

IntArray = npt.NDArray[np.integer[Any]]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What the caller said of the next forward pass; arrays broadcast to ``[B, S]``."""

    rows: int
    """Requests, B."""
    columns: dict[str, npt.NDArray[Any]]
    """By field of a trace: request_id, decode, step, domain and, if it was given, position."""
    mask: BoolArray

    def flat(self, tokens: int) -> tuple[dict[str, npt.NDArray[Any]], BoolArray]:
        """Columns and mask, ``[T]`` each, of a pass over T tokens, padding included."""
        if tokens % self.rows:
            raise InputError(
                f"the experts got {tokens} tokens for {self.rows} requests -- begin() must name "
                "every row of the batch -- describe the batch that the model gets"
            )
        shape = (self.rows, tokens // self.rows)
        mask = _grid(self.mask, shape, "mask")
        counted = {"position": np.cumsum(mask, axis=1) - 1}  # padding may be on either side
        columns = {
            name: _grid(values, shape, name).ravel()
            for name, values in (counted | self.columns).items()
        }
        return columns, mask.ravel()


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """The real tokens of one forward pass; T rows."""

    columns: dict[str, npt.NDArray[Any]]
    """request_id, position, decode, step, domain: ``[T]`` each."""
    experts: npt.NDArray[np.uint16]
    """``[T, L, K]``."""
    weights: npt.NDArray[np.float16]
    """``[T, L, K]``."""


class RoutingRecorder:
    """Records the routing of a model's forward passes; use as a context manager.

    Before each forward pass `begin` says whose tokens these are; `trace` gives everything recorded.

    Parameters
    ----------
    model
        A torch module whose MoE layers have a submodule named ``experts`` below a numbered layer.
    num_experts
        Experts per layer; an id outside ``0..num_experts - 1`` is an error.

    Raises
    ------
    InputError
        When the model has no such module, or two of one layer.

    Examples
    --------
    >>> with RoutingRecorder(model, num_experts=32) as recorder:  # doctest: +SKIP
    ...     recorder.begin(request_ids=[0, 1], phase="prefill", step=0, domains=["code", "prose"])
    ...     model(input_ids)
    """

    def __init__(self, model: "nn.Module", *, num_experts: int) -> None:
        self._model = model
        self._num_experts = num_experts
        self._modules = _experts_by_layer(model)
        self._handles: list[Any] = []
        self._batch: _Batch | None = None
        self._seen: dict[int, tuple[IntArray, npt.NDArray[np.floating[Any]]]] = {}
        self._recorded: list[_Recorded] = []
        self._domains: dict[str, int] = {}

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Index of each MoE layer in the model, ascending."""
        return tuple(self._modules)

    def __enter__(self) -> Self:
        for layer, module in self._modules.items():
            self._handles.append(
                module.register_forward_pre_hook(self._experts_hook(layer), with_kwargs=True)
            )
        self._handles.append(self._model.register_forward_pre_hook(self._forward_begins))
        self._handles.append(self._model.register_forward_hook(self._forward_ends))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._batch = None

    def begin(
        self,
        *,
        request_ids: Sequence[int],
        phase: str | npt.ArrayLike,
        step: npt.ArrayLike,
        domains: Sequence[str],
        positions: npt.ArrayLike | None = None,
        mask: npt.ArrayLike = True,
    ) -> None:
        """Describe the next forward pass, of B requests with S tokens each, padding included.

        Parameters
        ----------
        request_ids
            Request of each row of the batch, length B.
        phase
            ``"prefill"`` or ``"decode"``, for all tokens or an array of these words, ``[B, S]``.
        step
            Step of the engine, a number or ``[B, S]``; 0 for the prefill of a request.
        domains
            Kind of text of each request, length B.
        positions
            Position of each token in its request, ``[B, S]``; if absent, the real tokens of a row
            are counted from 0.
        mask
            True for real tokens, ``[B, S]``; what is False (padding) is not recorded.

        Raises
        ------
        InputError
            When a phase is unknown or a domain missing; other shapes are checked in the pass.
        """
        if not request_ids or len(domains) != len(request_ids):
            raise InputError(
                f"begin() got {len(request_ids)} requests and {len(domains)} domains -- each "
                "request needs one -- name the domain of every row"
            )
        codes = [self._domains.setdefault(domain, len(self._domains)) for domain in domains]
        columns: dict[str, npt.ArrayLike] = {
            "request_id": np.asarray(request_ids)[:, None],
            "decode": _is_decode(phase),
            "step": step,
            "domain": np.asarray(codes)[:, None],
        }
        if positions is not None:
            columns["position"] = positions
        self._batch = _Batch(
            rows=len(request_ids),
            columns={name: np.asarray(values) for name, values in columns.items()},
            mask=np.asarray(mask, dtype=bool),
        )

    def trace(self, *, model: str, source: str, licence: str, note: str = "") -> RoutingTrace:
        """Everything recorded so far, sorted by request and position.

        Parameters
        ----------
        model, source, licence, note
            Go into the trace's metadata as they are.

        Returns
        -------
        RoutingTrace
            One row per real token, with weights.

        Raises
        ------
        InputError
            When nothing was recorded.
        """
        if not self._recorded:
            raise InputError(
                "no forward pass was recorded (0 tokens) -- at least one is needed -- call the "
                "model inside the recorder's with block, after begin()"
            )
        experts = np.concatenate([part.experts for part in self._recorded])
        column = {
            name: np.concatenate([part.columns[name] for part in self._recorded])
            for name in self._recorded[0].columns
        }
        meta = TraceMeta(
            model=model,
            num_experts=self._num_experts,
            top_k=experts.shape[2],
            moe_layer_ids=self.moe_layer_ids,
            source=source,
            licence=licence,
            synthetic=False,
            note=note,
        )
        trace = RoutingTrace(
            meta=meta,
            request_id=column["request_id"].astype(np.int32),
            position=column["position"].astype(np.int32),
            decode=column["decode"],
            step=column["step"].astype(np.int32),
            domain=column["domain"].astype(np.int16),
            domains=tuple(self._domains),
            experts=experts,
            weights=np.concatenate([part.weights for part in self._recorded]),
        )
        return trace.select(np.lexsort((trace.position, trace.request_id)))

    def _experts_hook(self, layer: int) -> Any:
        def hook(module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False))
            call = named | kwargs
            if "top_k_index" not in call or "top_k_weights" not in call:
                raise InputError(
                    f"the experts of layer {layer} were called without top_k_index and "
                    "top_k_weights -- the recorder reads those two -- use transformers 5 or later"
                )
            if layer in self._seen:
                raise InputError(
                    f"layer {layer} was seen twice in one forward pass -- once is allowed -- "
                    "record without gradient checkpointing"
                )
            self._seen[layer] = (_to_numpy(call["top_k_index"]), _to_numpy(call["top_k_weights"]))

        return hook

    def _forward_begins(self, module: "nn.Module", args: tuple[Any, ...]) -> None:
        if self._batch is None:
            raise InputError(
                "a forward pass without begin() -- each needs its requests -- call begin() before"
            )
        self._seen.clear()

    def _forward_ends(self, module: "nn.Module", args: tuple[Any, ...], output: object) -> None:
        batch, self._batch = self._batch, None
        assert batch is not None  # _forward_begins refused otherwise
        missing = [layer for layer in self._modules if layer not in self._seen]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(self._modules)} MoE layers were not seen in a forward "
                f"pass (first: layer {missing[0]}) -- each must be -- check that the model calls "
                "its experts modules and is not compiled"
            )
        ids, weights = (
            np.stack([self._seen[layer][part] for layer in self._modules], axis=1)
            for part in (0, 1)
        )
        _check_ids(ids, self._num_experts)
        columns, real = batch.flat(len(ids))
        self._recorded.append(
            _Recorded(
                columns={name: column[real] for name, column in columns.items()},
                experts=ids[real].astype(np.uint16),
                weights=weights[real].astype(np.float16),
            )
        )


def _experts_by_layer(model: "nn.Module") -> "dict[int, nn.Module]":
    """Experts modules by layer index (the first number of the module's path), ascending."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", f".{name}.")
        if not f".{name}".endswith(".experts") or number is None:
            continue
        layer = int(number.group(1))
        if layer in found:
            raise InputError(
                f"two experts modules in layer {layer} ({name}) -- one per layer is allowed -- "
                "record a part of the model"
            )
        found[layer] = module
    if not found:
        raise InputError(
            "the model has 0 modules named '....N....experts' -- the recorder needs at least one "
            "-- use a Hugging Face MoE model, or name the experts modules so"
        )
    return dict(sorted(found.items()))


def _to_numpy(tensor: "Tensor") -> npt.NDArray[Any]:
    """Copy to the host; bfloat16, which numpy lacks, becomes float32."""
    plain = tensor.detach().cpu()
    array: npt.NDArray[Any] = (plain.float() if plain.is_floating_point() else plain).numpy()
    return array.copy()  # the model may reuse its buffer


def _grid(values: npt.NDArray[Any], shape: tuple[int, int], name: str) -> npt.NDArray[Any]:
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        raise InputError(
            f"{name} has shape {values.shape} -- allowed is what broadcasts to {shape}, requests "
            "by tokens -- check the batch"
        ) from None


def _is_decode(phase: str | npt.ArrayLike) -> BoolArray:
    words = np.asarray(phase)
    unknown = sorted(set(words.ravel().tolist()) - {"prefill", "decode"})
    if unknown:
        raise InputError(
            f"phase {unknown[0]!r} -- allowed are 'prefill' and 'decode' -- name one of these"
        )
    decode: BoolArray = words == "decode"
    return decode


def _check_ids(ids: IntArray, num_experts: int) -> None:
    """Check the ids ``[T, L, K]`` of a forward pass."""
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(
            f"top_k_index is {ids.dtype} of shape {ids.shape[:1] + ids.shape[2:]} -- allowed are "
            "whole numbers [tokens, top_k] -- this model's experts are called in another way"
        )
    if ids.min() < 0 or ids.max() >= num_experts:
        raise InputError(
            f"expert ids {ids.min()} to {ids.max()} -- allowed are 0 to {num_experts - 1} -- "
            "give the model's own num_experts"
        )
