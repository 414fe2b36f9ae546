"""What a memory's units are as an ordinary processor, in the catalog and through `price`."""

import numpy as np
import pytest
import yaml

from hwmodels import Processor, check_cluster, load_cluster
from hwmodels.cost import price
from hwmodels.figures import KernelCost
from hwmodels.ops import AttentionDecode, Gemm, GroupedGemm
from hwmodels.pim import (
    Pim,
    gemm_seconds,
    load_pim,
    pim_processor,
    processor_fields,
    processor_yaml,
)
from hwmodels.pim.processor import KERNELS

DERIVED = [  # cluster, processor, memory, units, stacks
    ("attacc", "pim-bank", "attacc", "bank", 5),
    ("attacc", "pim-bank-group", "attacc", "bank_group", 5),
    ("attacc", "pim-buffer", "attacc", "buffer", 5),
    ("hbm-pim", "pim", "hbm-pim", "pim", 4),
    ("aimx", "pim", "aim", "aim", 16),
]


def _costs(processor: Processor) -> list[KernelCost]:
    costs = [by["bf16"] for name, by in processor.kernels.items() if name in KERNELS]
    return [c for c in costs if isinstance(c, KernelCost)]


@pytest.mark.parametrize(("cluster", "name", "memory", "unit", "stacks"), DERIVED)
def test_the_catalogs_figures_are_the_derived_ones(
    cluster: str, name: str, memory: str, unit: str, stacks: int
) -> None:
    """As ``processor_yaml`` writes them; the memory's own bandwidth is that of its interface."""
    found, pim = load_cluster(cluster), Pim(load_pim(memory), unit, stacks)
    processor, figures = found.processor(name), pim_processor(pim)
    assert processor.bandwidth is not None
    assert processor.bandwidth.value == pytest.approx(figures.bandwidth.value, rel=1e-4)
    assert processor.bandwidth.evidence == figures.bandwidth.evidence
    assert processor.flops["bf16"].value == pytest.approx(figures.flops.value, rel=1e-4)
    assert processor.compute_units is not None
    assert processor.compute_units.value == figures.compute_units.value
    costs = _costs(processor)
    assert len(costs) == len(KERNELS)
    for cost in costs:
        kernel = figures.kernel
        assert cost.launch == pytest.approx(kernel.launch)
        assert cost.compute_efficiency == pytest.approx(kernel.compute_efficiency, abs=1e-4)
        assert cost.memory_efficiency == pytest.approx(kernel.memory_efficiency, abs=1e-4)
        assert (cost.tile_rows, cost.evidence) == (kernel.tile_rows, kernel.evidence)
    outside = found.memory(processor.memory).bandwidth.value
    times = figures.bandwidth.value / outside
    o, t = pim.memory.organisation, pim.memory.timings
    interval = t.ccd_short if pim.units.streams == 1 else t.ccd_long
    assert times == pytest.approx(pim.units.streams * t.ccd_short / interval, rel=2e-3)
    assert o.channels * stacks * pim.units.streams == processor.compute_units.value
    assert check_cluster(found) == []


def test_the_files_of_duplex_and_of_near_memories_state_the_same_peaks() -> None:
    """Duplex's published figures, MoNDE's assumed ones, and a CXL device's 1.1 TB/s."""
    for cluster, name, memory, stacks, tolerance in (
        ("duplex-4", "pim", "duplex", 5, 1e-4),
        ("monde", "ndp", "monde", 1, 1e-9),
        ("gpu-cxl-ndp", "ndp", "cxl-pnm", 1, 0.01),
    ):
        found, pim = load_cluster(cluster), Pim(load_pim(memory), name, stacks)
        figures = pim_processor(pim)
        assert found.bandwidth(name).value == pytest.approx(figures.bandwidth.value, rel=tolerance)
        flops = found.processor(name).flops["bf16"].value
        assert flops == pytest.approx(figures.flops.value, rel=tolerance)
        stated = _costs(found.processor(name))[0].memory_efficiency
        assert name == "pim" or stated <= figures.kernel.memory_efficiency


@pytest.mark.parametrize(("cluster", "name", "memory", "unit", "stacks"), DERIVED)
def test_a_large_product_costs_what_the_rows_take(
    cluster: str, name: str, memory: str, unit: str, stacks: int
) -> None:
    """The roofline with the derived efficiencies against columns and rows: 2 %, m = 1 to 4.

    AiM's inputs and results, which stop its stream, are not in the roofline: taken out here.
    """
    units = load_pim(memory).units[unit].model_copy(update={"operands": "concurrent"})
    described = load_pim(memory).model_copy(update={"units": {unit: units}})
    op = Gemm(m=np.array([1, 2, 4]), n=16384, k=16384, weight_dtype="bf16", activation_dtype="bf16")
    by_rows = gemm_seconds(Pim(described, unit, stacks), op)
    by_price = price(op, load_cluster(cluster), on=name).seconds
    np.testing.assert_allclose(by_price, by_rows, rtol=0.02)


def test_experts_and_attention_on_attaccs_banks() -> None:
    """One FLOP per byte: an expert's second token costs as much as its first, and so does the
    second query of a group; one token is half of the peak's time (rows, power, refresh: 50 %).
    """
    cluster = load_cluster("attacc")
    experts = GroupedGemm(
        tokens_per_expert=np.array([[1, 1], [2, 0], [2, 2]]), hidden=4096, width=14336,
        gated=True, weight_dtype="bf16", activation_dtype="bf16",
    )  # fmt: skip
    seconds = price(experts, cluster, on="pim-bank").seconds - 1e-6
    np.testing.assert_allclose(seconds / seconds[0], [1, 1, 2], rtol=1e-2)
    two_experts = 2 * 3 * 4096 * 14336 * 2
    assert seconds[0] == pytest.approx(two_experts / (0.5021 * 53.248e12), rel=1e-3)
    heads = {"num_kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "kv_elements": 2048}
    single, grouped = (
        price(
            AttentionDecode(
                tokens=8, context=8 * 2048, num_heads=n, kv_dtype="bf16",
                activation_dtype="bf16", **heads,
            ),
            cluster,
            on="pim-bank",
        ).seconds[0] - 1e-6
        for n in (8, 32)
    )  # fmt: skip
    assert grouped / single == pytest.approx(4, rel=0.02)


def test_wider_registers_are_a_tile() -> None:
    """Two vectors held on 32 lanes: pairs of rows are padded, and cost one pass each."""
    memory = load_pim("hbm-pim")
    units = memory.units["pim"].model_copy(update={"lanes": 32, "vectors": 2})
    pim = Pim(memory.model_copy(update={"units": {"pim": units}}), "pim", 4)
    figures = pim_processor(pim)
    assert figures.kernel.tile_rows == 2
    peak = figures.flops.value * figures.kernel.compute_efficiency
    op = Gemm(m=np.array([2, 4]), n=16384, k=16384, weight_dtype="bf16", activation_dtype="bf16")
    by_rows = gemm_seconds(pim, op) - units.launch.value
    np.testing.assert_allclose(op.flops() / peak, by_rows, rtol=1e-3)


def test_energy_per_byte_and_operation() -> None:
    """AttAcc: 0.55, 1.56 and 3.29 pJ a bit with the activation; 0.16 pJ a FLOP."""
    for unit, per_bit in (("bank", 0.55), ("bank_group", 1.56), ("buffer", 3.29)):
        figures = pim_processor(Pim(load_pim("attacc"), unit))
        assert figures.joules_per_byte.value == pytest.approx(8 * per_bit * 1e-12)
        assert figures.joules_per_flop.value == pytest.approx(0.16e-12)
        assert figures.joules_per_byte.evidence == "transfer"


@pytest.mark.parametrize(("cluster", "name", "memory", "unit", "stacks"), DERIVED)
def test_the_written_fields_are_a_processor(
    cluster: str, name: str, memory: str, unit: str, stacks: int
) -> None:
    """All digits by default; the written block is that of the catalog's file."""
    pim = Pim(load_pim(memory), unit, stacks)
    found = load_cluster(cluster).processor(name)
    exact = Processor.model_validate({"memory": "m", **processor_fields(pim, "a citation")})
    figures = pim_processor(pim)
    assert exact.bandwidth is not None
    assert exact.bandwidth.value == pytest.approx(figures.bandwidth.value, rel=1e-15)
    assert exact.flops["bf16"].value == pytest.approx(figures.flops.value, rel=1e-15)
    kernel = _costs(exact)[0]
    assert kernel.memory_efficiency == pytest.approx(figures.kernel.memory_efficiency, rel=1e-15)
    assert kernel.source == "a citation"
    written = yaml.safe_load(processor_yaml(pim, name, found.memory))
    assert list(written) == [name]
    again = Processor.model_validate(written[name])
    assert again.bandwidth == found.bandwidth
    assert again.flops == found.flops
    assert again.compute_units == found.compute_units
