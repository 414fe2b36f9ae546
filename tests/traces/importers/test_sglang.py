"""SGLang's answers: starts, shapes that only the model tells, and damage."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.sglang import FORMATS_SGLANG
from traces.routing_trace import RoutingTrace

(R3,) = FORMATS_SGLANG
Join = Callable[[Any], RoutingTrace]


def one_line(engines: Any, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = engines.write("sglang-r3 generate", folder)
    values = [json.loads(line) for line in path.read_text().splitlines()]
    change(values[0])
    return Path(engines.lines(path, values))


@pytest.mark.parametrize("beside", [True, False])
def test_a_start(engines: Any, joined: Join, tmp_path: Path, beside: bool) -> None:
    source = engines.source()
    text = base64.b64encode(source.rows(0)[3:].astype("<i4").tobytes()).decode()

    def change(answer: dict[str, Any]) -> None:
        answer["meta_info"]["routed_experts"] = text
        (answer["meta_info"] if beside else answer)["routed_experts_start_len"] = 3

    found = joined(R3.read(one_line(engines, tmp_path, change), engines.asked()))
    kept = (source.trace.request_id > 0) | (source.trace.position >= 3)
    assert np.array_equal(found.experts, source.trace.experts[kept])
    assert np.array_equal(found.position, source.trace.position[kept])
    assert np.array_equal(found.decode, source.trace.decode[kept])


def test_a_batch_is_one_line(engines: Any, joined: Join, tmp_path: Path) -> None:
    source = engines.source()
    path = engines.write("sglang-r3 generate", tmp_path, source)
    values = [json.loads(line) for line in path.read_text().splitlines()]
    engines.lines(path, [values[:2], values[2]])
    found = joined(R3.read(path, engines.asked()))
    assert np.array_equal(found.experts, source.trace.experts)


def cut(bytes_left: int) -> Callable[[dict[str, Any]], None]:
    def change(answer: dict[str, Any]) -> None:
        data = base64.b64decode(answer["meta_info"]["routed_experts"])[:bytes_left]
        answer["meta_info"]["routed_experts"] = base64.b64encode(data).decode()

    return change


ROW = 6 * 2 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut(8 * ROW - 4), "380 bytes of routing are no whole rows of 6 layers x top-2 int32"),
        (
            cut(7 * ROW),
            r"line 1: 7 rows from position 0 on for 5 prompt and 4 generated .* -- 8, a",
        ),
        (lambda a: a["meta_info"].update(routed_experts="x"), "no base64 text"),
        (lambda a: a["meta_info"].update(routed_experts=["AAAA"] * 2), "2 choices in an answer"),
        (lambda a: a["meta_info"].update(prompt_tokens="5"), "prompt_tokens: '5' -- a whole"),
        (lambda a: a["meta_info"].update(routed_experts_start_len=-1), "start_len: -1 -- a whole"),
    ],
)
def test_damage(
    engines: Any,
    joined: Join,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], Any],
    message: str,
) -> None:
    path = one_line(engines, tmp_path, change)
    with pytest.raises(InputError, match=message):
        joined(R3.read(path, engines.asked()))


def test_an_answer_without_routing_is_noted(engines: Any, joined: Join, tmp_path: Path) -> None:
    source = engines.source()
    path = one_line(engines, tmp_path, lambda a: a["meta_info"].update(routed_experts=None))
    tokens = R3.read(path, engines.asked())
    found = joined(tokens)
    assert np.array_equal(found.experts, source.trace.experts[source.trace.request_id > 0])
    assert "1 answers carry no routing and are left out" in tokens.notes


def test_a_list_of_one_choice(engines: Any, joined: Join, tmp_path: Path) -> None:
    source = engines.source()

    def change(answer: dict[str, Any]) -> None:
        answer["meta_info"]["routed_experts"] = [answer["meta_info"]["routed_experts"]]

    found = joined(R3.read(one_line(engines, tmp_path, change), engines.asked()))
    assert np.array_equal(found.experts, source.trace.experts)
