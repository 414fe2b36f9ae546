"""Per-request JSON with router_data."""

import json
from pathlib import Path
from typing import Any

import pytest

from basis.errors import InputError
from traces.importers.base import Asked
from traces.importers.formats import Imported, import_file
from traces.importers.log_router_json import FORMATS_ROUTER_JSON
from traces.routing_trace import RoutingTrace, read_trace


def token(first: int) -> dict[str, Any]:
    return {
        f"layer_{layer}": {"selected_experts": [first, layer + 4], "selected_probs": [0.75, 0.25]}
        for layer in (1, 2, 3)
    }


def do_import(entries: Any, tmp_path: Path, asked: Asked) -> tuple[Imported, RoutingTrace]:
    (tmp_path / "r.json").write_text(json.dumps({"prompt": "x", "router_data": entries}))
    found = import_file(
        tmp_path / "r.json", tmp_path / "a.parquet", asked=asked, formats=FORMATS_ROUTER_JSON
    )
    return found, read_trace(tmp_path / "a.parquet")


def test_numbers_are_positions(tmp_path: Path, asked: Asked) -> None:
    _, trace = do_import([{f"token_{n}": token(n - 387)} for n in (387, 388, 390)], tmp_path, asked)
    assert trace.position.tolist() == [387, 388, 390]
    assert trace.decode.all()
    assert trace.experts[:, 0, 0].tolist() == [0, 1, 3]


def test_numbers_that_restart_are_not(tmp_path: Path, asked: Asked) -> None:
    entries = [{"token_0": token(0), "token_1": token(1)}, {"token_0": token(2)}]
    _, trace = do_import(entries, tmp_path, asked)
    assert trace.position.tolist() == [0, 1, 2]
    assert trace.step.tolist() == [0, 0, 1]
    assert trace.decode.tolist() == [False, False, True]


def test_a_missing_layer_drops_the_token(tmp_path: Path, asked: Asked) -> None:
    entries = [{f"token_{n}": token(n)} for n in range(4)]
    del entries[2]["token_2"]["layer_3"]
    found, trace = do_import(entries, tmp_path, asked)
    assert found.dropped == {"tokens with a missing layer": 1}
    assert trace.position.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"selected_experts": [1]}, "1 experts, 2 in the first layer"),
        ({"selected_experts": [1, 9]}, "expert 9 in layer 2"),
        ({"selected_experts": [1, 2**70]}, "a list of expert ids"),
        ({"selected_experts": "12"}, "a list of expert ids"),
        ([1, 2], "is a list -- a mapping"),
    ],
)
def test_bad_cells(cell: Any, message: str, tmp_path: Path, asked: Asked) -> None:
    entries = [{f"token_{n}": token(n)} for n in range(3)]
    entries[1]["token_1"]["layer_2"] = cell
    with pytest.raises(InputError, match=message):
        do_import(entries, tmp_path, asked)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "has no tokens"),
        ([{"tok_1": token(1)}], "key 'tok_1' -- token_"),
        ([{"token_1": {"layer": {"selected_experts": [1, 2]}}}], "key 'layer' -- layer_"),
        ([[1]], "entry 0 is a list"),
    ],
)
def test_bad_entries(entries: Any, message: str, tmp_path: Path, asked: Asked) -> None:
    with pytest.raises(InputError, match=message):
        do_import(entries, tmp_path, asked)


def test_a_file_that_differs_from_the_first(tmp_path: Path, asked: Asked) -> None:
    folder = tmp_path / "requests"
    folder.mkdir()
    other = token(1) | {"layer_9": token(1)["layer_1"]}
    for name, tokens in (("a", token(1)), ("b", other)):
        text = json.dumps({"router_data": [{"token_0": tokens}]})
        (folder / f"{name}.json").write_text(text)
    with pytest.raises(InputError, match=r"b\.json: layer 9 is none of the layers 1, 2, 3"):
        import_file(folder, tmp_path / "a.parquet", asked=asked, formats=FORMATS_ROUTER_JSON)


def test_a_deep_document_is_refused(tmp_path: Path, asked: Asked) -> None:
    (tmp_path / "r.json").write_text('{"router_data":[' + "[" * 200_000)
    with pytest.raises(InputError, match="not JSON"):
        import_file(
            tmp_path / "r.json", tmp_path / "a.parquet", asked=asked, formats=FORMATS_ROUTER_JSON
        )
