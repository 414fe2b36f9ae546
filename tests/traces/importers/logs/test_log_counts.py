"""Totals per layer and expert."""

from pathlib import Path

import pytest

from basis.errors import InputError
from traces.counts_trace import CountsTrace, read_counts
from traces.importers.base import Asked
from traces.importers.formats import Imported, import_file
from traces.importers.log_counts import FORMATS_COUNTS


def do_import(text: str, tmp_path: Path, asked: Asked) -> tuple[Imported, CountsTrace]:
    source, target = tmp_path / "counts.txt", tmp_path / "c.parquet"
    source.write_text(text)
    return import_file(source, target, asked=asked, formats=FORMATS_COUNTS), read_counts(target)


@pytest.mark.parametrize(
    "text",
    [
        "expert_id,layer_id,counts\n3,1,4\n0,1,2\n7,2,6\n",
        "\ufefflayer,expert,count\r\n1,3,4\r\n1,0,2\r\n\r\n2,7,6.0\r\n",
        '"layer","expert","count"\n1,"3",4\n1,0,2\n2,7,6\n2,1,0\n',
        '{"1": {"3": 4, "0": 2}, "2": {"7": 6}}',
        '{"layer_2": {"expert_7": 6}, "layer_1": {"expert_3": 4, "expert_0": 2}}',
    ],
)
def test_spellings(text: str, tmp_path: Path) -> None:
    found, counts = do_import(text, tmp_path, Asked())
    assert counts.moe_layer_ids == (1, 2)
    assert counts.loads.tolist() == [[2, 0, 0, 4, 0, 0, 0, 0], [0] * 7 + [6]]
    assert counts.top_k is None
    assert any("no higher id is listed" in note for note in found.notes)


def test_a_model_says_experts_top_k_and_layers(tmp_path: Path, asked: Asked) -> None:
    found, counts = do_import("layer,expert,count\n0,3,4\n2,1,7\n", tmp_path, asked)
    assert (counts.num_experts, counts.top_k, counts.moe_layer_ids) == (8, 2, (1, 3))
    assert [note.split(" ", 1)[0] for note in found.notes] == ["layers", "layers", "sums"]
    assert "layers counted 4 to 7 choices" in found.notes[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,expert,count\n1,3,4\n1,3,5\n", "layer 1, expert 3 comes twice"),
        ("layer,expert,count\n1,3\n", "line 2: .*cut off"),
        ("layer,expert,count\n1,3,-1\n", "line 2: layer '1', expert '3', count '-1'"),
        ("layer,expert,count\n1,3,0.5\n", "whole numbers"),
        ("layer,expert,count\n1,3,nan\n", "whole numbers"),
        ("layer,expert,count\n1,3,1e300\n", "whole numbers"),
        ("layer,expert,count\n1,x,1\n", "whole numbers"),
        ("layer,expert,count\n1,8,1\n", "expert 8; .* has 8 experts"),
        ("layer,expert,count\n9,1,1\n", "layers 9; .* has 3 MoE layers"),
        ("layer,expert,count\n1,999999,1\n", "no model has as many"),
        ("layer,expert,count\n1,1000000000,1\n", r"layers up to 4095 and experts up to 65534"),
        ("layer,expert,count\n1000000000,1,1\n", r"layers up to 4095 and experts up to 65534"),
        ("layer,expert,count\n4096,1,1\n", "layers up to 4095"),
        ("layer,expert,count\n1,1,9e18\n", r"count '9e18' -- .* counts up to 2\^53"),
        ("layer,expert,count\n1,3,0\n", "no count above 0"),
        ("layer,expert,count\n", "no count above 0"),
        ('{"1": {"3": 4}, "2": [1, 2]}', "layer '2' is no mapping"),
        ('{"1": {"3": 4, "4": "x"}}', "whole numbers"),
        ('{"1": {"3": 4, ', "not JSON"),
    ],
)
def test_bad_totals(text: str, message: str, tmp_path: Path, asked: Asked) -> None:
    with pytest.raises(InputError, match=message):
        do_import(text, tmp_path, asked)
    assert not (tmp_path / "c.parquet").exists()
