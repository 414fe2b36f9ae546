"""Nothing that was there is lost: outputs over inputs are refused, failed writes change nothing."""

import os
from pathlib import Path

import pytest

from basis.errors import InputError
from basis.files import check_file, check_target, refuse_same, replacing


def test_a_target_is_no_source_by_any_name(tmp_path: Path) -> None:
    source, linked, hard = (tmp_path / name for name in ("a", "soft", "hard"))
    source.write_text("data")
    linked.symlink_to(source)
    hard.hardlink_to(source)
    (tmp_path / "sub").mkdir()
    for name in (source, linked, hard, tmp_path / "sub" / ".." / "a"):
        with pytest.raises(InputError, match="source and target are the same file"):
            refuse_same([None, name], [None, source])
    refuse_same([tmp_path / "b", None], [source])


def test_a_target_does_not_lie_in_a_folder_that_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"new\.npz: the target lies in .* which is read"):
        refuse_same([tmp_path / "deep" / "new.npz"], [tmp_path])
    refuse_same([tmp_path / "new.npz"], [tmp_path / "absent"])


def test_two_targets_are_two_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="z: named twice as a target"):
        refuse_same([tmp_path / "z", tmp_path / "." / "z"], [])


def test_files_to_read_and_to_write(tmp_path: Path) -> None:
    for path, problem in ((tmp_path, "a folder -- give a plan"), (tmp_path / "x", "no such file")):
        with pytest.raises(InputError, match=problem):
            check_file(path, "a plan")
    for path, problem in (
        (tmp_path, "a folder -- name a file"),
        (tmp_path / "absent" / "x", "absent: no such folder"),
    ):
        with pytest.raises(InputError, match=problem):
            check_target(path)
    check_target(tmp_path / "x")


def test_a_file_is_replaced_when_all_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "a", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    with replacing(link) as file:
        file.write_text("after")
        assert target.read_text() == "before"
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert set(tmp_path.iterdir()) == {target, link}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, InputError])
def test_what_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a"
    target.write_text("before")

    def write() -> None:
        with replacing(target) as file:
            file.write_text("half of")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("before")
    with (
        pytest.raises(InputError, match=r"/a: not written \(File too large\)"),
        replacing(target) as file,
    ):
        file.write_bytes(bytes(10_000))
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_of_another_file_is_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), replacing(tmp_path / "a"):
        (tmp_path / "absent").read_text()


def test_a_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder -- name a file to write"), replacing(tmp_path):
        raise AssertionError("not reached")
    assert not list(tmp_path.parent.glob("*.partial"))


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(pipe) as file:
        file.write_text("text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
