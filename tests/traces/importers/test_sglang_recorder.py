"""SGLang's per-token records: slots to experts, requests, padding, and what is refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.sglang_recorder import FORMATS_SGLANG_RECORDER
from traces.routing_trace import RoutingTrace

(PER_TOKEN,) = FORMATS_SGLANG_RECORDER
Join = Callable[[Any], RoutingTrace]


def requests_of(trace: RoutingTrace) -> Counter[tuple[bytes, ...]]:
    """Each request's positions, phases and experts, whatever its number."""
    found: Counter[tuple[bytes, ...]] = Counter()
    for number in np.unique(trace.request_id):
        mine = trace.request_id == number
        parts = trace.position[mine], trace.decode[mine], trace.experts[mine]
        found[tuple(part.tobytes() for part in parts)] += 1
    return found


@pytest.mark.parametrize("chunk", [3, 6, 100])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_requests_come_back(
    engines: Any, joined: Join, tmp_path: Path, chunk: int, mixed: bool, padding: int
) -> None:
    source = engines.source(prompts=(5, 4, 9, 20), outputs=(4, 2, 6, 3))
    path = engines.per_token(source, tmp_path, chunk=chunk, mixed=mixed, padding=padding)
    tokens = PER_TOKEN.read(path, engines.asked())
    found = joined(tokens)
    passes = engines.token_passes(source, chunk=chunk, mixed=mixed, padding=padding)
    assert "; 0 decode rows" in tokens.notes[0]
    assert requests_of(found) == requests_of(source.trace)
    assert found.step.max() == len(passes) - 1
    blank = sum(tokens.dropped.values())
    assert blank == padding * len(passes)


def record(engines: Any, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    data = {
        "records": engines.token_passes(engines.source()),
        "last_physical_to_logical_map": engines.slot_map(),
    }
    change(data)
    return Path(engines.save_torch(data, folder / "x.pt"))


def in_pass(number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["records"][number].update(values)


def set_ids(number: int, place: Any, value: int) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["records"][number]["topk_ids_of_layer"][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_ids(0, (1, 0, 0), 16), "pass 0: slots -1 to 16 out of range -- 0 to 15"),
        (set_ids(0, (1, 0, 0), -2), "slots -2 to"),
        (set_ids(0, (1, 0, 2), 3), "pass 0: 3 experts per token and layer, small has top-2"),
        (set_ids(0, (0, 0, 0), 3), "recorded in layers 0, which are dense in small"),
        (set_ids(0, (2, 0, 1), -1), r"1 expert ids out of range \(first: -1, row 0, layer 2\)"),
        (in_pass(1, positions=[1]), "pass 1: ids of 6 layers and 8 tokens, .* 1 positions"),
        (in_pass(0, positions="x"), "positions: a list of whole numbers"),
        (in_pass(0, extend_seq_lens=[4]), "extend_seq_lens add up to 4, 6 of 8 rows"),
        (in_pass(0, extend_seq_lens=[2, 4]), r"extend_seq_lens \[2, 4\] do not fit"),
        (in_pass(0, extend_seq_lens=[1.5]), "extend_seq_lens: a list of whole numbers"),
        (in_pass(0, topk_ids_of_layer=[1]), "topk_ids_of_layer: a list -- a plain tensor"),
        (in_pass(0, topk_ids_of_layer=np.zeros((6, 8, 8))), "float64.* -- integers in 3"),
        (lambda data: data.update(records=[]), "no forward pass was recorded"),
        (lambda data: data.update(records=[1]), "no records"),
        (lambda data: data.pop("last_physical_to_logical_map"), "a NoneType -- a plain tensor"),
        (
            lambda data: data.update(last_physical_to_logical_map=engines_map()[:5]),
            "ids of 6 layers and 8 tokens, 5 layers in the map of slots",
        ),
        (
            lambda data: data.update(last_physical_to_logical_map=engines_map() - 1),
            "slots of experts -1 to 10 -- 0 to 11",
        ),
    ],
)
def test_damage(
    engines: Any,
    joined: Join,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], Any],
    message: str,
) -> None:
    path = record(engines, tmp_path, change)
    with pytest.raises(InputError, match=message):
        joined(PER_TOKEN.read(path, engines.asked()))


def engines_map() -> np.ndarray:
    return np.tile(np.arange(16) % 12, (6, 1))


def test_other_passes_are_dropped_and_counted(engines: Any, joined: Join, tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        idle = dict(data["records"][-1], forward_mode=4, extend_seq_lens=None)
        data["records"] += [idle, dict(idle, forward_mode=5), dict(idle, positions=[])]

    tokens = PER_TOKEN.read(record(engines, tmp_path, change), engines.asked())
    assert requests_of(joined(tokens)) == requests_of(engines.source().trace)
    reasons = {name.split()[2]: rows for name, rows in tokens.dropped.items()}
    assert reasons["idle"] == reasons["other"] > 0


def test_a_model_with_more_experts_than_fit(engines: Any, tmp_path: Path) -> None:
    path = engines.write("sglang-per-token", tmp_path)
    with pytest.raises(InputError, match="small has top-9, this recorder keeps 8"):
        PER_TOKEN.read(path, engines.asked(top_k=9))


def test_requests_that_began_before(engines: Any, joined: Join, tmp_path: Path) -> None:
    path = record(engines, tmp_path, lambda data: data["records"].pop(0))
    tokens = PER_TOKEN.read(path, engines.asked())
    joined(tokens)
    assert any("begin after position 0" in note for note in tokens.notes)
