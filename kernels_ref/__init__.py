"""Reference kernels: the operators of an MoE transformer step in plain torch.

Each reads next to its formula. They say what an operator computes (checked against float64) and,
later, how long real hardware takes for it. This is the only package that imports torch.
"""

from kernels_ref.attention import append_kv, attention_decode, attention_prefill
from kernels_ref.experts import experts_loop, experts_sorted, gated_ffn, grouped_ffn
from kernels_ref.permute import Permutation, combine, permute, sort_by_expert
from kernels_ref.router import Routing, route_topk

__all__ = [
    "Permutation",
    "Routing",
    "append_kv",
    "attention_decode",
    "attention_prefill",
    "combine",
    "experts_loop",
    "experts_sorted",
    "gated_ffn",
    "grouped_ffn",
    "permute",
    "route_topk",
    "sort_by_expert",
]
