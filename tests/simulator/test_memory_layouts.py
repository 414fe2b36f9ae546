"""Memory per rank of real models on layouts, against tables worked out by hand from the configs.

The tables are written out in bytes; the comments say where each comes from. Nothing of the code
under test is used in them.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from basis import InfeasibleError, InputError, validate
from hwmodels import Cluster, load_cluster
from simulator import Placement
from simulator.batches import StepBatch
from simulator.dispatch import homes
from simulator.layout import Layout
from simulator.memory import USABLE, MemoryNeed, memory_need, memory_of
from simulator.memory_fits import check_fits
from simulator.parallelism import Parallelism
from traces import ModelSpec, load_model

ModelOf = Callable[..., ModelSpec]
PlacementOf = Callable[[ModelSpec, int], Placement]


def _layout(dp: int, tp: int = 1, pp: int = 1, *, ep: int = 1, etp: int = 1) -> Parallelism:
    attention, experts = {"dp": dp, "tp": tp, "pp": pp}, {"ep": ep, "tp": etp}
    return validate({"attention": attention, "experts": experts}, Parallelism, "test")


def _config(name: str) -> ModelSpec:
    spec = find_spec("aiconfigurator_core")
    if spec is None or spec.origin is None:
        pytest.skip("install the test dependency aiconfigurator-core for its model configs")
    return load_model(Path(spec.origin).parent / "model_configs" / f"{name}_config.json")


def _by_stage(need: MemoryNeed, pp: int) -> dict[str, list[float]]:
    """Bytes of one rank of each stage; ranks of a stage are alike here."""
    found = {}
    for term in ("weights", "experts", "kv_cache", "activations", "communication"):
        table = getattr(need, term).reshape(pp, -1)
        assert (table == table[:, :1]).all()
        found[term] = table[:, 0].tolist()
    return found


# gpt-oss-20b: 24 layers, hidden 2880, 64 heads of 64, 8 KV heads, biases on q k v o, one sink per
# head; 32 experts top-4 of width 2880 in mxfp4 (4.25 bits) with biases; vocabulary 201088; bf16.
# Window 128 in every second layer. Batch: 256 sequences of 1000 tokens, one token each per step.
#
# one layer, whole:   q 2880*4096, k and v 2880*512 each, o 4096*2880           = 26 542 080
#                     biases 4096 + 512 + 512 + 2880, sinks 64, norms 2*2880    =     13 824
#                     router 32*2880 + 32                                       =     92 192
# halved over tp 2:   matrices 13 271 040; biases 2048 + 256 + 256 + 2880, sinks 32, norms 5760
#                     = 11 232; router whole
# embedding and head: 201088*2880 = 579 133 440 each; final norm 2880
# one expert slot:    3*2880*2880*4.25/8 + (2*2880 + 2880)*2 = 13 219 200 + 17 280 = 13 236 480
#   half its width:   3*2880*1440*4.25/8 + (2*1440 + 2880)*2 =  6 609 600 + 11 520 =  6 621 120
# KV of a sequence:   (12*128 + 12*1000) tokens * 8*(64 + 64)*2 bytes = 13 536*2048 = 27 721 728
GPT_OSS = {
    # 2*(24*26 648 096 + 2*579 133 440 + 2880); 24*32 slots; 256 sequences
    # activations: 256*4 rows*(2*2880 + 2*2880)*2 + 256*(3*2880 + 64*128 + 1024)*2 + 256*201088*4
    #   = 23 592 960 + 9 142 272 + 205 914 112; communication: 2*2880*256*2
    (1, 1, 1, 1, 1): {
        "weights": [3_595_648_128],
        "experts": [10_165_616_640],
        "kv_cache": [7_096_762_368],
        "activations": [238_649_344],
        "communication": [2_949_120],
    },
    # tensor parallel: 2*(24*(13 271 040 + 11 232 + 92 192) + 2*289 566 720 + 2880);
    #   24*32*6 621 120; half the KV heads
    # activations: 256*4*(2*2880 + 2*1440)*2 + 256*(3*2880 + 32*128 + 512)*2 + 205 914 112
    #   = 17 694 720 + 6 782 976 + 205 914 112
    (1, 2, 1, 1, 2): {
        "weights": [1_800_246_912],
        "experts": [5_085_020_160],
        "kv_cache": [3_548_381_184],
        "activations": [230_391_808],
        "communication": [2_949_120],
    },
    # data and expert parallel: 8 slots and 64 sequences on each rank
    # activations: 23 592 960 + 64*(8640 + 8192 + 1024)*2 + 64*201088*4
    #   = 23 592 960 + 2 285 568 + 51 478 528
    (4, 1, 1, 4, 1): {
        "weights": [3_595_648_128],
        "experts": [2_541_404_160],
        "kv_cache": [1_774_190_592],
        "activations": [77_357_056],
        "communication": [2_949_120],
    },
    # two stages of tp 2, ep 2: 12 layers each, the embedding on the first, head and norm on the
    #   last; 12*16 slots of 13 236 480; 6 windowed and 6 full layers, 4 KV heads
    # weights: 2*(12*13 374 464 + 289 566 720 [+ 2880])
    # microbatches of 128: 128*4*(5760 + 5760)*2 + 128*(8640 + 4096 + 512)*2
    #   = 11 796 480 + 3 391 488, on the last stage + 128*201088*4 = 102 957 056
    # communication: 2*2880*128*2 + a received microbatch 128*2880*2
    (1, 2, 2, 2, 1): {
        "weights": [900_120_576, 900_126_336],
        "experts": [2_541_404_160] * 2,
        "kv_cache": [1_774_190_592] * 2,
        "activations": [15_187_968, 118_145_024],
        "communication": [2_211_840] * 2,
    },
}

# DeepSeek-V3: 61 layers, the first 3 dense of width 18432, 58 with 256 experts top-8 of width 2048
# and one shared expert; hidden 7168; MLA with 128 heads of 128 + 64 (values 128), q latent 1536, KV
# latent 512 + 64; vocabulary 129280. Matrices in fp8 with an fp32 scale per 128 x 128:
# f = 1 + 4/16384 bytes; the rest, and the cache, in bf16. 2048 sequences of 4096 tokens.
#
# one layer's MLA:    q_a 7168*1536 = 11 010 048, q_b 1536*128*192 = 37 748 736, kv_a 7168*576 =
#                     4 128 768, kv_b 512*128*256 = 16 777 216, o 128*128*7168 = 117 440 512
#   whole             187 105 280;  over tp 8: 11 010 048 + 4 128 768 + 171 966 464/8 = 36 634 624
# dense FFN           3*7168*18432 = 396 361 728, an eighth of it 49 545 216
# shared expert       3*7168*2048  =  44 040 192
# vectors of a layer  2*7168 + 1536 + 512 = 16 384; router 256*7168 + 256 = 1 835 264
# vocabulary          129280*7168 = 926 679 040, an eighth of it 115 834 880
# one expert slot     44 040 192*f = 44 050 944
# KV of a token       576*2 = 1152 bytes per layer, on every rank of a tp group
DEEPSEEK = {
    # f*(61*187 105 280 + 3*396 361 728 + 58*44 040 192)
    #   + 2*(61*16 384 + 58*1 835 264 + 2*926 679 040 + 7168); 58*16 slots; 128*4096*61*1152
    # activations: 2048*8*(2*7168 + 2*2048)*2 + 128*(3*7168 + 128*320 + 576 + 2*18432)*2
    #   + 128*129280*4 = 603 979 776 + 25 575 424 + 66 191 360; communication 2*7168*2048*2
    (16, 1, 1, 16, 1): {
        "weights": [19_082_158_768],
        "experts": [40_879_276_032],
        "kv_cache": [36_842_766_336],
        "activations": [695_746_560],
        "communication": [58_720_256],
    },
    # stages of 31 and 30 layers (28 and 30 with experts), tp 8, ep 8 with 32 slots
    # first: f*(31*36 634 624 + 3*49 545 216 + 28*44 040 192)
    #   + 2*(31*16 384 + 28*1 835 264 + 115 834 880)
    # last:  f*(30*36 634 624 + 30*44 040 192) + 2*(30*16 384 + 30*1 835 264 + 115 834 880 + 7168)
    # KV: 2048*4096*1152 per layer. Microbatches of 1024:
    # activations: 1024*8*(14 336 + 4096)*2 + 1024*(3*7168 + 16*320 + 576 + 2*2304)*2
    #   = 301 989 888 + 65 142 784; inner width: max(18432/8, 2048) = 2304;
    #   on the last + 1024*129280*4 = 529 530 880
    # communication: 2*7168*1024*2 + 1024*7168*2
    (1, 8, 2, 8, 1): {
        "weights": [2_853_509_328, 2_763_618_336],
        "experts": [39_469_645_824, 42_288_906_240],
        "kv_cache": [299_573_968_896, 289_910_292_480],
        "activations": [367_132_672, 896_663_552],
        "communication": [44_040_192] * 2,
    },
    # two groups of tp 8, their 16 ranks one block of ep 16; 1024 sequences in a group
    # f*(61*36 634 624 + 3*49 545 216 + 58*44 040 192)
    #   + 2*(61*16 384 + 58*1 835 264 + 2*115 834 880 + 7168)
    # activations: 603 979 776 + 65 142 784 + 529 530 880
    (2, 8, 1, 16, 1): {
        "weights": [5_617_127_664],
        "experts": [40_879_276_032],
        "kv_cache": [294_742_130_688],
        "activations": [1_198_653_440],
        "communication": [58_720_256],
    },
}


@pytest.mark.parametrize("key", GPT_OSS)
def test_gpt_oss_20b_equals_its_table(key: tuple[int, int, int, int, int]) -> None:
    dp, tp, pp, ep, etp = key
    layout = _layout(dp, tp, pp, ep=ep, etp=etp)
    need = memory_of(
        _config("openai--gpt-oss-20b"), layout, 32, tokens=256, mean_context=1000, sequences=256
    )
    assert _by_stage(need, pp) == GPT_OSS[key]


@pytest.mark.parametrize("key", DEEPSEEK)
def test_deepseek_v3_equals_its_table(key: tuple[int, int, int, int, int]) -> None:
    dp, tp, pp, ep, etp = key
    layout = _layout(dp, tp, pp, ep=ep, etp=etp)
    need = memory_of(
        _config("deepseek-ai--DeepSeek-V3"),
        layout,
        256,
        tokens=2048,
        mean_context=4096,
        sequences=2048,
    )
    assert _by_stage(need, pp) == DEEPSEEK[key]


SOME = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _batch(tokens: int, dp: int, context: int) -> StepBatch:
    return StepBatch(
        rows=np.zeros(tokens, dtype=np.int64),
        context=np.full(tokens, context),
        home=homes(tokens, dp),
        last=np.ones(tokens, dtype=np.bool_),
    )


@SOME
@given(
    st.sampled_from([(4, 1, 1, 4, 1), (1, 4, 1, 1, 4), (2, 2, 1, 2, 2), (2, 1, 2, 2, 1)]),
    st.integers(1, 6),
    st.integers(1, 300),
)
def test_without_a_trace_it_is_what_an_even_batch_needs(
    make_model: ModelOf,
    contiguous: PlacementOf,
    key: tuple[int, int, int, int, int],
    per_group: int,
    context: int,
) -> None:
    dp, tp, pp, ep, etp = key
    model, layout = make_model(shared_expert_width=256), _layout(dp, tp, pp, ep=ep, etp=etp)
    tokens = per_group * dp * pp
    counted = memory_need(
        model,
        contiguous(model, ep),
        [_batch(tokens, dp, context)],
        Layout.of(layout, dp * tp * pp),
        [_batch(tokens // pp, dp, context)],
    )
    thought = memory_of(model, layout, 8, tokens=tokens, mean_context=context, sequences=tokens)
    for term in ("weights", "experts", "kv_cache", "activations", "communication"):
        np.testing.assert_array_equal(getattr(counted, term), getattr(thought, term))
    assert (counted.mean_context, counted.sequences) == (context, tokens)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pp", [1, 2])
def test_the_ranks_together_hold_every_weight(make_model: ModelOf, tied: bool, pp: int) -> None:
    """Cut over stages nothing is held twice but a tied embedding."""
    model = make_model(
        tie_embeddings=tied, shared_expert_width=64, moe_layer_ids=(1,), dense_width=32
    )
    need = memory_of(model, _layout(1, pp=pp), 8, tokens=1, mean_context=1, sequences=1)
    twice = 4096 * 1024 * 2 if tied and pp > 1 else 0
    assert need.weights.sum() == model.bytes_outside_experts + twice
    assert need.experts.sum() == 8 * model.bytes_per_expert


def test_layouts_that_do_not_divide_are_refused(make_model: ModelOf) -> None:
    with pytest.raises(InputError, match="experts ep 4 does not divide the slots"):
        memory_of(make_model(), _layout(4, ep=4), 9, tokens=1, mean_context=1, sequences=1)


def _small(cluster: Cluster, capacity: float) -> Cluster:
    device = cluster.device
    memory = device.memory
    figure = memory.capacity.model_copy(update={"value": capacity})
    memories = {device.processor.memory: memory.model_copy(update={"capacity": figure})}
    smaller = device.model_copy(update={"memories": device.memories | memories})
    return cluster.model_copy(update={"device": smaller})


@pytest.mark.parametrize("name", ["attention tp", "attention pp", "experts ep"])
def test_another_layout_fits_as_the_lever_says(
    make_model: ModelOf, contiguous: PlacementOf, name: str
) -> None:
    """Each rank holds everything; cutting one thing as said is enough."""
    model = make_model(num_layers=4, hidden_size=256)
    now = Layout.of(_layout(4), 4)
    batch = _batch(8, 4, 10)
    need = memory_need(model, contiguous(model, 1), [batch], now)
    other = {
        "attention tp": _layout(1, 4),
        "attention pp": _layout(2, pp=2),
        "experts ep": _layout(4, ep=2),
    }[name]
    there = memory_of(model, other, 8, tokens=8, mean_context=10, sequences=8)
    limit = there.total.max() * 1.0001
    cluster = _small(load_cluster("hgx-h100-8", gpus=4), limit / USABLE)
    with pytest.raises(InfeasibleError) as error:
        check_fits(need, model, contiguous(model, 1), cluster, 8, now)
    value = {"attention tp": 4, "attention pp": 2, "experts ep": 2}[name]
    assert f"{name} {value} on the same 4 ranks" in error.value.levers
