"""An engine's kernels in the place of a cluster's own: what changes, stays, is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from basis import InputError
from hwmodels import AllReduce, Cluster, Gemm, Permute, load_cluster, price
from hwmodels import engines as module
from hwmodels.engines import FittedFile, engines_of, load_fitted, priced_by
from hwmodels.fitting.write import write_yaml

PRODUCT = {
    "model": "gemm",
    "launch": "2 us",
    "compute_efficiency": 0.9,
    "sustained": 0.8,
    "memory_efficiency": 0.8,
    "feed": "300 GB/s",
    "step": "1 ns",
    "store": 0.5,
    "sharpness": 3.0,
    "low": 0.9,
    "high": 1.1,
    "evidence": "fitted",
    "source": "rows",
    "held_out": {"median": 0.05, "mean": 0.07, "rows": 100},
}
SLOW = PRODUCT | {"launch": "1 ms", "kernel": "slow"}
RING = {"startup": "3 us", "efficiency": 0.5, "evidence": "fitted", "source": "rows"}


def _file(device: str, **engines: Any) -> dict[str, Any]:
    return {"device": device, "sources": {"rows": "made for this test"}, "engines": engines}


@pytest.fixture
def fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fitted files of an h100 (trtllm) and of any device (sglang)."""
    own = {
        "version": "1.0",
        "kernels": {
            "gemm": {
                "bf16": PRODUCT,
                "fp8": {"model": "fastest", "of": [SLOW, PRODUCT], "evidence": "fitted"},
            },
            "permute": {"bf16": {"model": "included", "within": "grouped_gemm"}},
        },
        "interconnect": {"all_reduce": RING},
    }
    anywhere = {
        "version": "any",
        "kernels": {"gemm": {"bf16": PRODUCT | {"evidence": "transfer", "launch": "9 us"}}},
        "by_link": {"nvlink4": {"all_reduce": RING | {"startup": "8 us"}}},
    }
    (tmp_path / "h100.yaml").write_text(yaml.safe_dump(_file("h100", trtllm=own)))
    (tmp_path / "transfer.yaml").write_text(yaml.safe_dump(_file("transfer", sglang=anywhere)))

    def path(device: str) -> Path | None:
        found = tmp_path / f"{device}.yaml"
        return found if found.is_file() else None

    monkeypatch.setattr(module, "fitted_path", path)
    return tmp_path


@pytest.fixture
def cluster() -> Cluster:
    return load_cluster("hgx-h100-8")


def _gemm(dtype: str = "bf16") -> Gemm:
    return Gemm(
        m=np.array([1, 64, 4096]), n=4096, k=4096, weight_dtype=dtype, activation_dtype="bf16"
    )


@pytest.mark.usefixtures("fitted")
def test_an_engine_brings_its_kernels_and_keeps_the_rest(cluster: Cluster) -> None:
    theirs = priced_by(cluster, "trtllm")
    before, after = price(_gemm(), cluster), price(_gemm(), theirs)
    assert (before.seconds != after.seconds).all()
    np.testing.assert_allclose(after.high / after.seconds, 1.1)
    assert after.evidence == "fitted"
    moved = Permute(rows=np.array([100]), row_bytes=np.array([1000]))
    assert price(moved, theirs).seconds[0] == 0 < price(moved, cluster).seconds[0]
    kernels = cluster.device.processor.kernels
    assert theirs.device.processor.kernels["attention_decode"] == kernels["attention_decode"]
    assert theirs.device.processor.kernels["gemm"]["fp8_block"] == kernels["gemm"]["fp8_block"]
    assert load_cluster("hgx-h100-8") == cluster


@pytest.mark.usefixtures("fitted")
def test_of_several_kernels_the_fastest_counts(cluster: Cluster) -> None:
    theirs = priced_by(cluster, "trtllm")
    assert (price(_gemm("fp8"), theirs).seconds < 1e-3).all()


@pytest.mark.usefixtures("fitted")
def test_collectives_come_along_too(cluster: Cluster) -> None:
    whole = AllReduce(bytes=np.array([1e6]), ranks=tuple(range(8)))
    seconds = price(whole, priced_by(cluster, "trtllm")).seconds[0]
    assert seconds == pytest.approx(3e-6 + 2 * 7 / 8 * 1e6 / (0.5 * 450e9))
    seconds = price(whole, priced_by(cluster, "sglang", "transfer")).seconds[0]
    assert seconds == pytest.approx(8e-6 + 2 * 7 / 8 * 1e6 / (0.5 * 450e9))


@pytest.mark.usefixtures("fitted")
def test_scaling_reaches_the_physical_models(cluster: Cluster) -> None:
    theirs = priced_by(cluster, "trtllm")
    without = price(_gemm(), theirs.scaled(fixed=0.0)).seconds
    np.testing.assert_allclose(price(_gemm(), theirs).seconds - without, 2e-6)


@pytest.mark.usefixtures("fitted")
def test_modes_fall_back_only_when_they_may(cluster: Cluster) -> None:
    assert price(_gemm(), priced_by(cluster, "sglang", "auto")).evidence == "transfer"
    with pytest.raises(InputError, match="'sglang' on device h100 -- fitted are trtllm"):
        priced_by(cluster, "sglang")
    with pytest.raises(InputError, match="'vllm' on device transfer -- fitted are sglang"):
        priced_by(cluster, "vllm", "transfer")
    with pytest.raises(InputError, match="prices: 'measured' without an engine"):
        priced_by(cluster, None, "measured")
    assert priced_by(cluster, None) is cluster


def test_a_device_without_fits_is_told_so() -> None:
    with pytest.raises(InputError, match="no engine is fitted for it"):
        priced_by(load_cluster("mi300x-8"), "vllm")


def test_a_fitted_file_survives_writing(fitted: Path, tmp_path: Path) -> None:
    first = load_fitted(fitted / "h100.yaml")
    write_yaml(first, tmp_path / "again.yaml", "made by a test")
    assert load_fitted(tmp_path / "again.yaml") == first
    assert (tmp_path / "again.yaml").read_text().startswith("# made by a test\n")


def test_a_wrong_fitted_file_is_refused(tmp_path: Path) -> None:
    bad = _file(
        "h100", trtllm={"version": "1", "kernels": {"gemm": {"bf16": PRODUCT | {"fed": 1}}}}
    )
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(bad))
    with pytest.raises(
        InputError, match=r"kernels\.gemm\.bf16\.fed: unknown key -- did you mean 'feed'"
    ):
        load_fitted(path)


def test_every_fitted_file_of_the_catalog_loads() -> None:
    folder = Path(module.__file__).parent / "catalog" / "fitted"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    assert "h200" in names
    for name in names:
        file = load_fitted(folder / f"{name}.yaml")
        assert isinstance(file, FittedFile)
        assert file.device == name
        assert engines_of(name) == file.engines
        for fits in file.engines.values():
            for by_dtype in fits.kernels.values():
                for cost in by_dtype.values():
                    assert cost.evidence in ("fitted", "transfer")
                    assert cost.source.split(" ")[0] in file.sources
