"""A small but genuine MoE decoder, driven by recorded routing, every kernel timed by itself.

Pre-norm residual layers of grouped-query attention over a KV cache, with routed experts (and
shared ones) or a dense gated network. Kernels, their order and their names are those that
`simulator.lowering` writes for a rank whose attention is its own, unfused; where that has one
kernel for several torch calls ("rope and kv write", "router"), one lap takes them together. The
router is computed in earnest; recorded slots then take the place of its choice, with the real
probabilities of the experts in them.
Shape suffixes: T tokens of a step, B requests of a step, L MoE layers, K choices per token, D model
width, Q rows of the fused projection, H query heads, G key/value heads, J = H + G, C channels of a
head, R = C / 2, E experts, S slots of all ranks, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hwmodels.ops import Stage
from kernels_ref.decoder_experts import Forced, RoutedExperts
from kernels_ref.decoder_kv import KvCache, Segment
from kernels_ref.decoder_weights import FfnWeights, Ids, LayerWeights, Weights, check_runs
from kernels_ref.dense import add_rms_norm, linear, rms_norm, rope, rope_table, silu_mul
from kernels_ref.router import route_recorded, route_topk
from kernels_ref.stage_clock import StageClock
from traces.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class _Step:
    """What a step needs, ready before its clock starts."""

    segments: list[Segment]
    decode: bool
    tokens_T: Tensor
    request_T: Tensor
    position_T: Tensor
    last_B: Tensor
    """Row of each request's last token."""
    slots: tuple[Tensor, ...]
    """Forced slots ``[T, K]`` of each MoE layer; none: the router's own choice."""
    experts: tuple[Tensor, ...]
    """Their logical experts, likewise."""


class Decoder:
    """A decoder with a KV cache, ready to run steps.

    Parameters
    ----------
    model
        Geometry; number formats are those of the weights.
    weights
        `Weights.random` of this geometry; their device and dtype are the decoder's.
    experts
        `ResidentExperts`, `ParallelExperts` or `CachedExperts`.
    requests, context
        Rows of the KV cache, and tokens that each can hold.
    laps
        Time every kernel; False: the total of each step only. ``decoder.clock`` has the seconds.
    renormalise
        Whether a token's combine weights sum to one (Mixtral, Qwen3-MoE; not OLMoE, Qwen2-MoE).

    Raises
    ------
    ValueError
        If the geometry has parts that are not run, or a size is below 1.
    """

    def __init__(
        self,
        model: ModelSpec,
        weights: Weights,
        experts: RoutedExperts,
        *,
        requests: int,
        context: int,
        laps: bool = False,
        renormalise: bool = True,
    ) -> None:
        check_runs(model)
        self.model, self._weights, self._experts = model, weights, experts
        self._device, dtype = weights.embedding_VD.device, weights.embedding_VD.dtype
        self.clock = StageClock(self._device, laps=laps)
        self._renormalise = renormalise
        self._kv = KvCache(model, requests, context, dtype, self._device)
        positions = torch.arange(context, device=self._device)
        self._cos_PR, self._sin_PR = rope_table(positions, model.attention.head_dim, dtype=dtype)
        self._moe_layer = {layer: at for at, layer in enumerate(model.moe_layer_ids)}
        slots_LE = [_first_slots(row, model.num_experts) for row in experts.slot_map_LS]
        self._without_slot = sorted({int(e) for row_E in slots_LE for e in np.where(row_E < 0)[0]})
        self._slot_of_expert = [torch.from_numpy(row_E).to(self._device) for row_E in slots_LE]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each request holds."""
        return tuple(self._kv.lengths)

    @torch.inference_mode()
    def warm_cache(self, lengths: Sequence[int], *, seed: int = 0) -> None:
        """Fill the first requests' cache with random numbers, as if they had so many tokens.

        For measuring decode at a context; the others are emptied.

        Raises
        ------
        ValueError
            If there are more lengths than requests, or a length is above the context.
        """
        self._kv.warm(lengths, seed)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what the first requests hold beyond a length, the others altogether.

        Raises
        ------
        ValueError
            If a request holds less.
        """
        self._kv.rewind(lengths)

    def prefill(
        self,
        tokens: Sequence[Ids],
        requests: Sequence[int],
        slot_ids_LTK: Forced = None,
    ) -> Tensor:
        """Run prompts, or further chunks of them, and fill the cache.

        Parameters
        ----------
        tokens
            Token ids of each request's new tokens, one array each.
        requests
            Row of the cache of each.
        slot_ids_LTK
            Forced slots of the tokens, one request after the other; see `Forced`.

        Returns
        -------
        Tensor
            Logits after each request's last token, ``[B, V]``.

        Raises
        ------
        ValueError
            If ids do not exist, shapes disagree, or a request's cache is full.
        """
        return self._run(tokens, requests, slot_ids_LTK, decode=False)

    def decode(self, tokens_B: Ids, requests: Sequence[int], slot_ids_LBK: Forced = None) -> Tensor:
        """Run one new token of each request; parameters and errors as `prefill`.

        A rank of a group may have none: it still serves the others with its experts.
        """
        return self._run([*tokens_B[:, None]], requests, slot_ids_LBK, decode=True)

    @torch.inference_mode()
    def _run(
        self, tokens: Sequence[Ids], requests: Sequence[int], forced: Forced, *, decode: bool
    ) -> Tensor:
        step = self._prepare(tokens, requests, forced, decode)
        self.clock.start()
        logits_BV = self._forward(step)
        self.clock.stop()
        self._kv.advance(step.segments)
        return logits_BV

    def _prepare(
        self, tokens: Sequence[Ids], requests: Sequence[int], forced: Forced, decode: bool
    ) -> _Step:
        """Check and upload what a step needs."""
        if len(tokens) != len(requests):
            raise ValueError(
                f"tokens of {len(tokens)} requests, {len(requests)} rows -- as many -- give each "
                "request its tokens"
            )
        counts = [len(each) for each in tokens]
        segments = self._kv.segments(requests, counts)
        none = np.zeros(0, dtype=np.int64)
        tokens_T = np.concatenate([none, *tokens]).astype(np.int64)
        _check_ids("tokens", tokens_T, self.model.vocab_size)
        positions = [np.arange(s.past, s.past + s.tokens) for s in segments]
        slots_LTK = self._experts.prepare(forced)
        slots, experts = self._forced(slots_LTK, len(tokens_T))
        return _Step(
            segments=segments,
            decode=decode,
            tokens_T=self._upload(tokens_T),
            request_T=self._upload(np.repeat(np.array(requests, dtype=np.int64), counts)),
            position_T=self._upload(np.concatenate([none, *positions])),
            last_B=self._upload(np.cumsum(np.array(counts, dtype=np.int64)) - 1),
            slots=slots,
            experts=experts,
        )

    def _forced(
        self, slots_LTK: Ids | None, tokens: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the forced slots and their logical experts, layer by layer."""
        if slots_LTK is None:
            if missing := self._without_slot:
                raise ValueError(
                    f"expert {missing[0]} of some MoE layer has no slot -- the router may choose "
                    "any -- force slots, or give every expert one"
                )
            return (), ()
        shape = (self.model.num_moe_layers, tokens, self.model.top_k)
        if slots_LTK.shape != shape:
            raise ValueError(
                f"slot ids of shape {list(slots_LTK.shape)} -- {list(shape)} (MoE layers, tokens, "
                "choices) -- give one slot for each choice"
            )
        map_LS = self._experts.slot_map_LS
        _check_ids("slot ids", slots_LTK, map_LS.shape[1])
        experts = [map_S[slots_TK] for map_S, slots_TK in zip(map_LS, slots_LTK, strict=True)]
        return tuple(map(self._upload, slots_LTK)), tuple(map(self._upload, experts))

    def _upload(self, array: Ids) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self._device)

    def _forward(self, step: _Step) -> Tensor:
        weights, lap = self._weights, self.clock.lap
        residual_TD = weights.embedding_VD[step.tokens_T]
        lap(Stage.EMBED, "embedding")
        rotary = self._cos_PR[step.position_T], self._sin_PR[step.position_T]
        delta_TD: Tensor | None = None
        for at, layer in enumerate(weights.layers):
            residual_TD, x_TD = _normed(delta_TD, residual_TD, layer.attention_norm_D)
            lap(Stage.OTHER, "attention norm")
            delta_TD = self._attention(at, layer, x_TD, rotary, step)
            residual_TD, x_TD = _normed(delta_TD, residual_TD, layer.ffn_norm_D)
            if at in self._moe_layer:
                lap(Stage.OTHER, "moe norm")
                delta_TD = self._moe(self._moe_layer[at], layer, x_TD, residual_TD, step)
            else:
                lap(Stage.OTHER, "ffn norm")
                assert layer.ffn is not None
                inner_TF = self._ffn_inner("ffn", Stage.DENSE_FFN, layer.ffn, x_TD)
                delta_TD = linear(inner_TF, layer.ffn.w2_DF)
                lap(Stage.DENSE_FFN, "ffn down")
        _, x_TD = _normed(delta_TD, residual_TD, weights.final_norm_D)
        lap(Stage.OTHER, "final norm")
        logits_BV = linear(x_TD[step.last_B], weights.head_VD)
        lap(Stage.HEAD, "lm head")
        return logits_BV

    def _attention(
        self, at: int, layer: LayerWeights, x_TD: Tensor, rotary: tuple[Tensor, Tensor], step: _Step
    ) -> Tensor:
        a, lap = self.model.attention, self.clock.lap
        qkv_TQ = linear(x_TD, layer.qkv_QD)
        lap(Stage.ATTENTION, "qkv")
        heads = a.num_heads + a.num_kv_heads
        widths = [heads * a.head_dim, a.num_kv_heads * a.head_dim]
        qk_TQ, v_TQ = torch.split(qkv_TQ, widths, dim=1)
        qk_TJC = rope(torch.unflatten(qk_TQ, 1, (heads, a.head_dim)), *rotary)
        q_THC, k_TGC = torch.split(qk_TJC, [a.num_heads, a.num_kv_heads], dim=1)
        v_TGC = torch.unflatten(v_TQ, 1, (a.num_kv_heads, a.head_dim))
        self._kv.write(at, k_TGC, v_TGC, step.request_T, step.position_T)
        lap(Stage.ATTENTION, "rope and kv write")
        attend = self._kv.decode if step.decode else self._kv.prefill
        out_THC = attend(at, q_THC, step.segments)
        lap(Stage.ATTENTION, "attention")
        delta_TD = linear(out_THC.flatten(1), layer.o_DO)
        lap(Stage.ATTENTION, "o")
        return delta_TD

    def _moe(
        self, at: int, layer: LayerWeights, x_TD: Tensor, residual_TD: Tensor, step: _Step
    ) -> Tensor:
        """Run an MoE layer; shared experts add to the residual stream themselves."""
        lap = self.clock.lap
        slots_TK, weights_TK = self._route(at, layer, x_TD, step)
        lap(Stage.ROUTER, "router")
        if layer.ffn is not None:
            inner_TF = self._ffn_inner("shared experts", Stage.SHARED_EXPERTS, layer.ffn, x_TD)
            residual_TD.addmm_(inner_TF, layer.ffn.w2_DF.t())
            lap(Stage.SHARED_EXPERTS, "shared experts down")
        return self._experts.run(at, x_TD, slots_TK, weights_TK, self.clock)

    def _route(
        self, at: int, layer: LayerWeights, x_TD: Tensor, step: _Step
    ) -> tuple[Tensor, Tensor]:
        """Slots and combine weights, ``[T, K]`` each."""
        assert layer.router_ED is not None
        renormalise = self._renormalise
        if step.slots:
            router_ED, experts_TK = layer.router_ED, step.experts[at]
            return step.slots[at], route_recorded(
                x_TD, router_ED, experts_TK, renormalise=renormalise
            )[1]
        routing = route_topk(x_TD, layer.router_ED, self.model.top_k, renormalise=renormalise)
        return self._slot_of_expert[at][routing.topk_ids_TK], routing.topk_weights_TK

    def _ffn_inner(self, name: str, stage: Stage, ffn: FfnWeights, x_TD: Tensor) -> Tensor:
        gate_up_TG = linear(x_TD, ffn.w13_GD)
        self.clock.lap(stage, f"{name} up")
        inner_TF = silu_mul(gate_up_TG)
        self.clock.lap(stage, f"{name} activation")
        return inner_TF


def _normed(delta_TD: Tensor | None, residual_TD: Tensor, gains_D: Tensor) -> tuple[Tensor, Tensor]:
    """Return the residual stream with the last block's output, and its norm; the first has none."""
    if delta_TD is None:
        return residual_TD, rms_norm(residual_TD, gains_D)
    return add_rms_norm(delta_TD, residual_TD, gains_D)


def _first_slots(map_S: Ids, experts: int) -> Ids:
    """Return the first slot of each logical expert, int64 [E]; -1: it has none."""
    slots_E = np.full(experts, -1, dtype=np.int64)
    slots_E[map_S[::-1]] = np.arange(len(map_S))[::-1]
    return slots_E


def _check_ids(what: str, ids: Ids, end: int) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < end:
        raise ValueError(
            f"{what} from {ids.min()} to {ids.max()} -- 0 to {end - 1} -- correct them"
        )
