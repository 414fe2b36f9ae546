"""The least time per token of a served run, against sums by hand."""

import numpy as np
import pytest

from hwmodels.silicon.served_rows import Ranks, ServedRow
from moeplan.served_bound import decoding, impossible, least_tpot, touched

pytest.importorskip("aiconfigurator_core")

from moeplan.served_models import model_of


def _row(**changed: object) -> ServedRow:
    base = {
        "name": "run",
        "family": "gpt-oss",
        "checkpoint": "openai/gpt-oss-120b",
        "precision": "fp4",
        "system": "h100_sxm",
        "engine": "vllm",
        "version": "1",
        "inputs": 1000,
        "outputs": 1001,
        "concurrency": 1,
        "ranks": Ranks(2, 1, 2, 1),
        "drafts": 0,
        "ttft": 1e-9,
        "tpot": 0.01,
    }
    return ServedRow(**(base | changed))  # type: ignore[arg-type]


def test_requests_decode_for_their_share_of_the_stay() -> None:
    row = _row(concurrency=512, ttft=15.0, tpot=0.005)  # 15 s of 20 s are waited
    assert decoding(row) == pytest.approx(512 * 5 / 20)


def test_one_request_reads_its_experts_the_rest_and_its_cache_once() -> None:
    model = model_of("gpt-oss", "fp4", "h100_sxm")
    assert touched(model, 1) == pytest.approx(4, rel=1e-6)  # top-4
    # mxfp4: 4 bits and a byte for 32; biases, attention and head in bf16; no input embedding
    expert = 3 * 2880 * 2880 * (0.5 + 1 / 32) + 2 * (2 * 2880 + 2880)
    embedding = 2 * 201088 * 2880
    outside = model.bytes_outside_experts - embedding
    cache = 2 * 2 * 8 * 64 * (18 * 1000 + 18 * 128)  # every other layer sees 128 tokens
    moved = 36 * 4 * expert + outside + cache
    assert least_tpot(_row()) == pytest.approx(moved / (2 * 3.35e12), rel=1e-6)
    assert least_tpot(_row(drafts=1)) == pytest.approx(moved / (2 * 3.35e12) / 2, rel=1e-6)


def test_more_tokens_touch_more_experts_up_to_all() -> None:
    model = model_of("gpt-oss", "fp4", "h100_sxm")
    counts = [touched(model, n) for n in (1, 2, 8, 64, 2048)]
    assert np.all(np.diff(counts) > 0)
    assert counts[1] <= 8
    assert 127 < counts[-1] <= 128


def test_a_run_below_the_bound_is_impossible() -> None:
    bound = least_tpot(_row())
    rows = [_row(name="below", tpot=0.99 * bound), _row(name="above", tpot=1.01 * bound)]
    assert impossible(rows) == {"below"}
