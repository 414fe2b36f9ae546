"""Wrong device and cluster files: each is refused or warned of, with exactly this message."""

from pathlib import Path

import pytest

from basis import InputError
from hwmodels import check_hardware, load_hardware

FILES = Path(__file__).parent / "wrong_devices"
SAID = {
    "sparse-rate": [
        "error: processors.gpu.flops.bf16: 1979 TFLOP/s is 2.00 x what the units do dense "
        "(989.4 TFLOP/s): looks like the sparse figure -- dense rates only -- halve it, or prove "
        "it dense with compute_units, clock and flops_per_clock_per_unit"
    ],
    "sparse-without-units": [
        "error: processors.gpu.flops.fp8: fp8 is 4.00 x bf16 -- between 0.9 and 2.3 is expected "
        "of dense rates -- fp8 looks like the sparse figure: give the dense one"
    ],
    "two-way-link": [
        "error: node.interconnect.bandwidth: 900 GB/s is the sum of both directions of nvlink4 "
        "-- one direction of one rank is expected -- write 450 GB/s"
    ],
    "bits-for-bytes": [
        "error: network.bandwidth: 400 GB/s is eight times what infiniband-ndr carries -- bits "
        "taken for bytes -- write 400 Gbit/s"
    ],
    "decimal-capacity": [
        "warning: memories.hbm.capacity: 80 GB are the stacks' 80 GiB with the wrong unit, 7 % "
        "less -- give what the driver reports, or GiB"
    ],
    "decimal-stacks": [
        "error: memories.hbm.stack_capacity: 16 GB is 14.9 GiB -- DRAM stacks, chips and modules "
        "come in halves of a GiB -- write GiB (2^30)"
    ],
    "bandwidth-above-pins": [
        "error: memories.hbm.bandwidth: 33.5 TB/s is 10.01 x stacks x bus x pin rate (3.347 TB/s) "
        "-- 0.9 to 1.03 is possible -- correct the one that is wrong"
    ],
    "pins-above-physics": [
        "error: memories.hbm.pin_rate: 12 Gbit/s -- a pin of HBM3 carries 3.2 to 6.6 -- bandwidth "
        "above physics: correct the rate or the kind"
    ],
    "two-sockets": [
        "error: memories.host.bandwidth: 921.6 GB/s is 2.00 x stacks x bus x pin rate "
        "(460.8 GB/s) -- 0.9 to 1.03 is possible -- correct the one that is wrong"
    ],
    "memory-clock": [
        "warning: memories.host.pin_rate: 2.4 Gbit/s -- a pin of DDR5 carries 3.2 to 9.2 -- data "
        "rates are twice the clock (DDR) -- give transfers",
        "error: memories.host.numa: 3 domains over 8 channels -- they share the channels evenly "
        "-- correct one of them",
    ],
    "kilowatts": [
        "error: power: 700000 W is 1.41 GFLOP/s of dense bf16 per W -- 5 GFLOP/s to 4 TFLOP/s is "
        "known of any chip -- check W against kW, and whose power it is"
    ],
    "drive-above-lanes": [
        "error: node.memories.nvme.bandwidth: 29.6 GB/s -- its lanes carry 15.76 GB/s -- give the "
        "drive's sequential read, and the lanes that it has"
    ],
    "no-source": [
        "warning: memories.hbm.capacity: evidence measured without a source -- every figure that "
        "is not assumed names one -- add source, or write evidence: assumed"
    ],
    "fit-without-error": [
        "warning: processors.gpu.kernels.gemm.bf16: fitted without its error -- a fit is scored "
        "on shapes that it did not see -- add held_out, or write evidence: assumed"
    ],
}


@pytest.mark.parametrize("name", SAID)
def test_a_wrong_file_is_found_out(name: str) -> None:
    path = FILES / f"{name}.yaml"
    found = check_hardware(path)
    assert [f"{f.level}: {f.where}: {f.message}" for f in found] == SAID[name]
    errors = [f"{f.where}: {f.message}" for f in found if f.level == "error"]
    if not errors:
        load_hardware(path)
        return
    with pytest.raises(InputError) as refused:
        load_hardware(path)
    assert str(refused.value).splitlines()[1:] == [f"  {line}" for line in errors]


def test_an_efficiency_above_one_does_not_fit_the_schema() -> None:
    path = FILES / "efficiency-above-one.yaml"
    with pytest.raises(InputError) as refused:
        check_hardware(path)
    assert str(refused.value) == (
        f"{path}: 1 error\n  processors.gpu.kernels.gemm.bf16.compute_efficiency: "
        "Input should be less than or equal to 1 (got 1.4)"
    )


def test_every_wrong_file_is_tested() -> None:
    assert {p.stem for p in FILES.glob("*.yaml")} == {*SAID, "efficiency-above-one"}
