"""The key/value cache of a decoder: one row per request, and what each row holds by now.

Keys lie transposed, ``[B, G, C, L]``, values as ``[B, G, L, C]``: see
`kernels_ref.attention_decode_ragged`. All of it is reserved once.
Shape suffixes: B requests, G key/value heads, C channels of a head, L positions, T new tokens, H
query heads, S tokens of one request.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels_ref.attention import attention_decode_ragged, attention_prefill, write_kv
from traces.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Segment:
    """New tokens of one request."""

    request: int
    """Row of the cache."""
    past: int
    """Tokens that it holds already."""
    tokens: int


class KvCache:
    """Keys and values of every layer, for ``requests`` rows of ``context`` positions."""

    def __init__(
        self,
        model: ModelSpec,
        requests: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if requests < 1 or context < 1:
            raise ValueError(
                f"KV cache of {requests} requests x {context} positions -- both at least 1 -- "
                "raise them"
            )
        a = model.attention
        self._windows = [window or 0 for window in a.windows]
        row = (requests, a.num_kv_heads)
        self._keys, self._values = (
            [torch.zeros(*row, *sides, dtype=dtype, device=device) for _ in a.windows]
            for sides in ((a.head_dim, context), (context, a.head_dim))
        )
        self._key_rows = [keys_BGCL.unbind() for keys_BGCL in self._keys]
        self._value_rows = [values_BGLC.unbind() for values_BGLC in self._values]
        self.context = context
        self.lengths = [0] * requests
        """Tokens that each row holds."""

    def warm(self, lengths: Sequence[int], seed: int) -> None:
        """Fill the first rows with random numbers, as if they had tokens; the others are empty."""
        self.lengths = self._fitting(lengths)
        generator = torch.Generator(self._keys[0].device).manual_seed(seed)
        for tensor in (*self._keys, *self._values):
            tensor[: len(lengths)].uniform_(-1, 1, generator=generator)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what each row holds beyond a length."""
        shorter = self._fitting(lengths)
        if any(new > old for new, old in zip(shorter, self.lengths, strict=True)):
            raise ValueError(
                f"rewind to {shorter} tokens, the rows hold {self.lengths} -- at most these -- "
                "fill them first"
            )
        self.lengths = shorter

    def segments(self, requests: Sequence[int], counts: Sequence[int]) -> list[Segment]:
        """Say where new tokens go: so many for each request.

        Raises
        ------
        ValueError
            If a request is named twice or has no row, gets no token, or more than fit.
        """
        rows = len(self.lengths)
        if len(set(requests)) != len(requests) or not all(0 <= r < rows for r in requests):
            raise ValueError(
                f"requests {list(requests)} -- distinct, from 0 to {rows - 1} -- name rows of the "
                "cache, each once"
            )
        segments = [
            Segment(request=request, past=self.lengths[request], tokens=count)
            for request, count in zip(requests, counts, strict=True)
        ]
        for s in segments:
            if s.tokens < 1 or s.past + s.tokens > self.context:
                raise ValueError(
                    f"request {s.request} has {s.past} tokens and gets {s.tokens} -- at least 1, "
                    f"and {self.context} in all -- send fewer, or reserve more context"
                )
        return segments

    def write(
        self, layer: int, k_TGC: Tensor, v_TGC: Tensor, request_T: Tensor, position_T: Tensor
    ) -> None:
        """Put the new tokens' keys and values in."""
        write_kv(self._keys[layer], self._values[layer], k_TGC, v_TGC, request_T, position_T)

    def decode(self, layer: int, q_THC: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Attention of one new token per request, ``[T, H, C]``; it is written already."""
        keys, values = self._key_rows[layer], self._value_rows[layer]
        if not segments:
            return q_THC
        return attention_decode_ragged(
            q_THC,
            [keys[s.request] for s in segments],
            [values[s.request] for s in segments],
            [s.past + 1 for s in segments],
            window=self._windows[layer],
        )

    def prefill(self, layer: int, q_THC: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Causal attention of each request's new tokens, ``[T, H, C]``; they are written."""
        out, chunks = [], torch.split(q_THC, [s.tokens for s in segments])
        for q_SHC, s in zip(chunks, segments, strict=True):
            end = s.past + s.tokens
            k_BLGC = self._keys[layer][s.request, :, :, :end].permute(2, 0, 1).unsqueeze(0)
            v_BLGC = self._values[layer][s.request, :, :end].transpose(0, 1).unsqueeze(0)
            window = self._windows[layer]
            out.append(attention_prefill(q_SHC.unsqueeze(0), k_BLGC, v_BLGC, window=window)[0])
        return torch.cat(out) if out else q_THC

    def advance(self, segments: Sequence[Segment]) -> None:
        """Count the new tokens as held."""
        for s in segments:
            self.lengths[s.request] = s.past + s.tokens

    def _fitting(self, lengths: Sequence[int]) -> list[int]:
        rows = len(self.lengths)
        if len(lengths) > rows or not all(0 <= n <= self.context for n in lengths):
            raise ValueError(
                f"lengths {list(lengths)} -- at most {rows} of 0 to {self.context} tokens -- "
                "reserve more requests or context"
            )
        return [*lengths, *[0] * (rows - len(lengths))]
