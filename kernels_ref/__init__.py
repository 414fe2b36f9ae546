"""Reference kernels: the operators of an MoE transformer step in plain torch, and a clock.

Each reads next to its formula. They say what an operator computes (checked against float64) and
how long real hardware takes for it. This is the only package that imports torch.
"""

from kernels_ref.attention import (
    append_kv,
    attention_decode,
    attention_decode_ragged,
    attention_prefill,
    write_kv,
)
from kernels_ref.capacity import (
    CapacityRouting,
    ExpertChoice,
    drop_over_capacity,
    reroute_over_capacity,
    route_expert_choice,
)
from kernels_ref.collectives import (
    Exchange,
    all_gather,
    all_reduce,
    all_to_all_rows,
    combine_ranks,
    dispatch,
    plan_exchange,
    plan_known_exchange,
    reduce_scatter,
)
from kernels_ref.copies import copy_host, to_device
from kernels_ref.decoder import Decoder
from kernels_ref.decoder_experts import (
    CachedExperts,
    ParallelExperts,
    ResidentExperts,
    RoutedExperts,
)
from kernels_ref.decoder_kv import KvCache, Segment
from kernels_ref.decoder_weights import (
    FfnWeights,
    LayerWeights,
    SlotWeights,
    Weights,
    check_runs,
    check_slot_map,
    expert_record,
    expert_records,
    expert_slots,
)
from kernels_ref.dense import AddNorm, add_rms_norm, linear, rms_norm, rope, rope_table, silu_mul
from kernels_ref.exchange_sweep import (
    ExchangeCase,
    ExchangeRow,
    check_sweep,
    exchange_cases,
    exchange_ops,
    sweep_exchange,
)
from kernels_ref.expert_cache import Access, ExpertCache, recorded_policy
from kernels_ref.expert_file import ExpertFile, write_expert_file
from kernels_ref.expert_homes import FileHome, MemoryHome
from kernels_ref.experts import (
    PaddedRows,
    experts_loop,
    experts_padded,
    experts_sorted,
    gated_ffn,
    grouped_ffn,
    padded_ffn,
    plain_ffn,
    shared_experts,
    zero_experts,
)
from kernels_ref.machine import Machine, last_level_cache, pinned, this_machine
from kernels_ref.measure import (
    Noise,
    Timing,
    measure_interleaved,
    noise,
    refuse_noisy,
    time_after,
    time_calls,
)
from kernels_ref.mla import mla_decode, mla_prefill
from kernels_ref.operands import Operands, Rotation
from kernels_ref.parallel_steps import (
    MovableExperts,
    PlacedSteps,
    TogetherClock,
    time_parallel_steps,
)
from kernels_ref.peaks import Peaks, measure_peaks
from kernels_ref.permute import Permutation, combine, permute, sort_by_expert
from kernels_ref.prepare import Prepared, prepare
from kernels_ref.processes import crowding, run_processes
from kernels_ref.quantised import (
    Quantised,
    dequantise,
    dequantised_linear,
    pack_int4,
    quantise,
    unpack_int4,
)
from kernels_ref.router import (
    RaggedRouting,
    Routing,
    route_group_limited,
    route_recorded,
    route_sigmoid,
    route_top_p,
    route_topk,
    route_topk_logits,
)
from kernels_ref.stage_clock import StageClock, StepSeconds
from kernels_ref.sweep import Case, Sample, draw_cases, measure_cases
from kernels_ref.sweep_tables import tables_of
from kernels_ref.tier_sweep import Fetch, NearUse, sweep_fetches, sweep_near_uses, time_lookup

__all__ = [
    "Access",
    "AddNorm",
    "CachedExperts",
    "CapacityRouting",
    "Case",
    "Decoder",
    "Exchange",
    "ExchangeCase",
    "ExchangeRow",
    "ExpertCache",
    "ExpertChoice",
    "ExpertFile",
    "Fetch",
    "FfnWeights",
    "FileHome",
    "KvCache",
    "LayerWeights",
    "Machine",
    "MemoryHome",
    "MovableExperts",
    "NearUse",
    "Noise",
    "Operands",
    "PaddedRows",
    "ParallelExperts",
    "Peaks",
    "Permutation",
    "PlacedSteps",
    "Prepared",
    "Quantised",
    "RaggedRouting",
    "ResidentExperts",
    "Rotation",
    "RoutedExperts",
    "Routing",
    "Sample",
    "Segment",
    "SlotWeights",
    "StageClock",
    "StepSeconds",
    "Timing",
    "TogetherClock",
    "Weights",
    "add_rms_norm",
    "all_gather",
    "all_reduce",
    "all_to_all_rows",
    "append_kv",
    "attention_decode",
    "attention_decode_ragged",
    "attention_prefill",
    "check_runs",
    "check_slot_map",
    "check_sweep",
    "combine",
    "combine_ranks",
    "copy_host",
    "crowding",
    "dequantise",
    "dequantised_linear",
    "dispatch",
    "draw_cases",
    "drop_over_capacity",
    "exchange_cases",
    "exchange_ops",
    "expert_record",
    "expert_records",
    "expert_slots",
    "experts_loop",
    "experts_padded",
    "experts_sorted",
    "gated_ffn",
    "grouped_ffn",
    "last_level_cache",
    "linear",
    "measure_cases",
    "measure_interleaved",
    "measure_peaks",
    "mla_decode",
    "mla_prefill",
    "noise",
    "pack_int4",
    "padded_ffn",
    "permute",
    "pinned",
    "plain_ffn",
    "plan_exchange",
    "plan_known_exchange",
    "prepare",
    "quantise",
    "recorded_policy",
    "reduce_scatter",
    "refuse_noisy",
    "reroute_over_capacity",
    "rms_norm",
    "rope",
    "rope_table",
    "route_expert_choice",
    "route_group_limited",
    "route_recorded",
    "route_sigmoid",
    "route_top_p",
    "route_topk",
    "route_topk_logits",
    "run_processes",
    "shared_experts",
    "silu_mul",
    "sort_by_expert",
    "sweep_exchange",
    "sweep_fetches",
    "sweep_near_uses",
    "tables_of",
    "this_machine",
    "time_after",
    "time_calls",
    "time_lookup",
    "time_parallel_steps",
    "to_device",
    "unpack_int4",
    "write_expert_file",
    "write_kv",
    "zero_experts",
]
