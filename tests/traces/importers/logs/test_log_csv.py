"""CSV per prompt, and dense CSV per layer."""

from pathlib import Path

import numpy as np
import pytest

from basis.errors import InputError
from traces.importers.base import Asked
from traces.importers.formats import Imported, import_file
from traces.importers.log_prompt_csv import FORMATS_PROMPT_CSV
from traces.importers.log_score_csv import FORMATS_SCORE_CSV
from traces.routing_trace import RoutingTrace, read_trace

HEADER = "Layer ID,Batch Number,Token,Activated Expert IDs\n"
SCORES = "layer_id,token_id," + ",".join(f"expert_{i}" for i in range(8)) + "\n"


def do_import(source: Path, asked: Asked) -> tuple[Imported, RoutingTrace]:
    target = source.parent / "a.parquet"
    formats = (*FORMATS_PROMPT_CSV, *FORMATS_SCORE_CSV)
    return import_file(source, target, asked=asked, formats=formats), read_trace(target)


def prompt(tmp_path: Path, text: str, name: str = "p.csv") -> Path:
    (tmp_path / name).write_text(HEADER + text)
    return tmp_path / name


def test_several_long_batches_are_requests(tmp_path: Path, asked: Asked) -> None:
    rows = [
        f'{layer},{batch},t{batch}{token},"[{batch}, {token + 4}]"\n'
        for layer in (1, 2, 3)
        for batch in (0, 1)
        for token in range(3)
    ]
    _, trace = do_import(prompt(tmp_path, "".join(rows)), asked)
    assert trace.request_id.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 2]
    assert trace.experts[:, 2].tolist() == [[b, t + 4] for b in (0, 1) for t in range(3)]


def test_a_prompt_that_does_not_line_up_is_left_out(tmp_path: Path, asked: Asked) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    lines = [f'{layer},0,t{t},"[0, {t + 1}]"\n' for layer in (1, 2, 3) for t in range(4)]
    prompt(folder, "".join(lines), "a.csv")
    prompt(folder, "".join(lines[:5] + lines[6:]), "b.csv")  # the second layer lost a row
    prompt(folder, "".join(lines[:8]), "c.csv")  # the third layer is absent
    prompt(folder, "".join(lines), "d.csv")
    found, trace = do_import(folder, asked)
    assert found.dropped == {
        "tokens of prompts whose layers do not line up": 4,
        "tokens with a missing layer": 4,
    }
    assert trace.num_tokens == 8
    assert len(set(trace.request_id.tolist())) == 2


def test_a_prompt_of_other_tokens_in_each_layer_is_refused(tmp_path: Path, asked: Asked) -> None:
    lines = [f'{layer},0,t{t + layer},"[0, {t + 1}]"\n' for layer in (1, 2, 3) for t in range(4)]
    with pytest.raises(InputError, match=r"4 tokens of prompts .* line up, only 0 others"):
        do_import(prompt(tmp_path, "".join(lines)), asked)


def test_a_row_lost_at_the_end_drops_one_token(tmp_path: Path, asked: Asked) -> None:
    lines = [f'{layer},0,t{t},"[0, {t + 1}]"\n' for layer in (1, 2, 3) for t in range(4)]
    found, trace = do_import(prompt(tmp_path, "".join(lines[:-1])), asked)
    assert found.dropped == {"tokens with a missing layer": 1}
    assert trace.num_tokens == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('1,0,x,"[1, 2, 3]"', "has 3 values, 2 are right"),
        ('1,0,x,"[1, 8]"', "expert 8 in layer 1"),
        ('1,0,x,"[1; 2]"', "are no list"),
        ('1,0,x,"[]"', "not readable as CSV"),
        ('1,0,x,"[1, 99999999999]"', "not readable as CSV"),
        ('one,0,x,"[1, 2]"', "not readable as CSV"),
        ('1,0,x,y,"[1, 2]"', "not readable as CSV.*token not quoted"),
        ("1,0,x", "not readable as CSV.*cut off"),
        ('9,0,x,"[1, 2]"', "layers 1, 9; .* has 3 MoE layers"),
    ],
)
def test_bad_rows(row: str, message: str, tmp_path: Path, asked: Asked) -> None:
    with pytest.raises(InputError, match=message):
        do_import(prompt(tmp_path, f'1,0,a,"[0, 1]"\n{row}\n'), asked)


def scores(tmp_path: Path, layer: int, rows: list[list[float]], tokens: list[int]) -> None:
    path = tmp_path / "scores" / f"Layer_{layer}" / f"run_1_layer{layer}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"0,{t},{','.join(map(str, row))}\n" for t, row in zip(tokens, rows, strict=True)]
    path.write_text(SCORES + "".join(lines))


def dense(*chosen: int) -> list[float]:
    return [0.25 if expert in chosen else 0.0 for expert in range(8)]


def test_rows_without_exactly_k_scores_are_dropped(tmp_path: Path, asked: Asked) -> None:
    for layer in (1, 2, 3):
        rows = [dense(0, layer), dense(3, 4), dense(5, 6), dense(6, 7)]
        if layer == 2:
            rows[1] = dense(3)
        scores(tmp_path, layer, rows, [0, 1, 2, 3])
    found, trace = do_import(tmp_path / "scores", asked)
    assert found.dropped == {"tokens with more or fewer than top-k scores in a layer": 1}
    assert trace.position.tolist() == [0, 2, 3]
    assert trace.experts[0].tolist() == [[0, 1], [0, 2], [0, 3]]


def test_the_layer_is_read_from_the_column_where_the_path_has_none(
    tmp_path: Path, asked: Asked
) -> None:
    (tmp_path / "s.csv").write_text(SCORES + "2,0," + ",".join(map(str, dense(1, 5))) + "\n")
    _, trace = do_import(tmp_path / "s.csv", asked)
    assert trace.meta.moe_layer_ids == (2,)


def test_a_file_alone_is_told_by_its_folder(tmp_path: Path, asked: Asked) -> None:
    path = tmp_path / "Layer_3" / "scores.csv"
    path.parent.mkdir()
    path.write_text(SCORES + "0,0," + ",".join(map(str, dense(1, 5))) + "\n")
    for source in (path, path.parent):
        target = tmp_path / "a.parquet"
        import_file(source, target, asked=asked, formats=FORMATS_SCORE_CSV)
        assert read_trace(target).meta.moe_layer_ids == (3,)


def test_without_a_model_top_k_is_what_rows_have(tmp_path: Path) -> None:
    for layer in (4, 6):
        scores(tmp_path, layer, [dense(0, 1, 2), dense(3, 4), dense(5, 6, 7)], [0, 1, 2])
    found, trace = do_import(tmp_path / "scores", Asked())
    assert (trace.meta.num_experts, trace.meta.top_k) == (8, 3)
    assert trace.meta.moe_layer_ids == (4, 6)
    assert any("top-3 is what most rows" in note for note in found.notes)


def test_layers_of_other_tokens_are_refused(tmp_path: Path, asked: Asked) -> None:
    scores(tmp_path, 1, [dense(0, 1)] * 3, [0, 1, 2])
    scores(tmp_path, 2, [dense(0, 1)] * 2, [0, 1])
    with pytest.raises(InputError, match=r"2 tokens that are not those of .*\(3\)"):
        do_import(tmp_path / "scores", asked)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.5, 0.5, 0.0], "not readable as CSV of 8 scores"),
        ([-0.5, *dense(1, 2)[1:]], "negative or not finite"),
        (["nan", *dense(1, 2)[1:]], "negative or not finite"),
        (["x", *dense(1, 2)[1:]], "not readable as CSV of 8 scores"),
    ],
)
def test_bad_scores(row: list[float], message: str, tmp_path: Path, asked: Asked) -> None:
    scores(tmp_path, 1, [dense(1, 2), row], [0, 1])
    with pytest.raises(InputError, match=message):
        do_import(tmp_path / "scores", asked)


def test_two_files_of_one_layer(tmp_path: Path, asked: Asked) -> None:
    scores(tmp_path, 1, [dense(1, 2)], [0])
    path = tmp_path / "scores" / "Layer-1" / "run_1_layer1.csv"
    path.parent.mkdir()
    path.write_bytes((tmp_path / "scores" / "Layer_1" / path.name).read_bytes())
    with pytest.raises(InputError, match="layer 1 again"):
        do_import(tmp_path / "scores", asked)


def test_blocks_of_any_size(tmp_path: Path, asked: Asked) -> None:
    """More rows than one block of the reader holds."""
    rng = np.random.default_rng(0)
    chosen = rng.random((3000, 3, 8)).argsort(axis=-1)[..., :2]
    for place, layer in enumerate((1, 2, 3)):
        scores(tmp_path, layer, [dense(*row) for row in chosen[:, place]], list(range(3000)))
    _, trace = do_import(tmp_path / "scores", asked)
    assert np.array_equal(np.sort(trace.experts, axis=-1), np.sort(chosen, axis=-1))
