"""The file of experts: bytes come back exactly, its layout, and what it says of its tier."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_ref.expert_file import ExpertFile, write_expert_file

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8,
    torch.float8_e4m3fn,
]  # fmt: skip


def random_records(dtype, shape, records, seed):
    """Any bit pattern, NaNs included, and those bytes."""
    generator = torch.Generator().manual_seed(seed)
    size = (records, *shape[:-1], shape[-1] * dtype.itemsize)
    raw = torch.randint(256, size, dtype=torch.uint8, generator=generator)
    return raw.view(dtype), [record.numpy().tobytes() for record in raw]


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def bytes_in(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 50), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(0, 99),
    st.data(),
)
@settings(deadline=None, max_examples=40)
def test_round_trip_is_exact(tmp_path_factory, dtype, shape, records, seed, data):
    path = tmp_path_factory.mktemp("experts") / "experts.bin"
    tensors, expected = random_records(dtype, shape, records, seed)
    write_expert_file(path, iter(tensors))
    order = data.draw(st.lists(st.integers(0, records - 1), min_size=1, max_size=8))
    with ExpertFile(path) as file:
        assert (file.records, file.shape, file.dtype) == (records, tuple(shape), dtype)
        assert file.record_bytes == len(expected[0])
        for record in order:
            found = file.read(record)
            assert (found.shape, found.dtype) == (torch.Size(shape), dtype)
            assert bytes_in(found) == expected[record]


@pytest.mark.parametrize("size", [4095, 4096, 4097, 3 << 20])
def test_records_lie_at_whole_blocks(tmp_path, size):
    tensors, expected = random_records(torch.uint8, [size], 3, seed=0)
    write_expert_file(tmp_path / "experts", tensors)
    stored = (tmp_path / "experts").read_bytes()
    stride = {4095: 4096, 4096: 4096, 4097: 8192, 3 << 20: 3 << 20}[size]
    assert len(stored) == 4096 + 3 * stride
    for record, raw in enumerate(expected):
        start = 4096 + record * stride
        assert stored[start : start + size] == raw
    with ExpertFile(tmp_path / "experts") as file:
        assert (file.record_bytes, file.read_bytes) == (size, stride)
        assert bytes_in(file.read(2)) == expected[2]


def test_reads_share_one_page_aligned_buffer(tmp_path):
    write_expert_file(tmp_path / "experts", torch.arange(4096.0).view(4, 1024))
    with ExpertFile(tmp_path / "experts") as file:
        first = file.read(1)
        second = file.read(3)
        assert first.data_ptr() == second.data_ptr()
        assert first.data_ptr() % 4096 == 0
    assert torch.equal(second, torch.arange(3072.0, 4096.0))  # still there after closing


def test_strided_tensors_are_written_by_their_order(tmp_path):
    tensor = torch.arange(6.0).view(2, 3).T
    write_expert_file(tmp_path / "experts", [tensor])
    with ExpertFile(tmp_path / "experts") as file:
        assert torch.equal(file.read(0), tensor)


def test_disk_means_that_nothing_was_left_in_the_page_cache(tmp_path):
    write_expert_file(tmp_path / "experts", torch.zeros(8, 100_000))
    with ExpertFile(tmp_path / "experts") as file:
        if file.tier != "disk":
            pytest.skip("the file system of the temporary folder does not bypass the page cache")
        for record in range(8):
            file.read(record)
    plain = os.open(tmp_path / "experts", os.O_RDONLY)
    try:  # answers only from the page cache
        with pytest.raises(BlockingIOError):
            os.preadv(plain, [bytearray(4096)], 4096, os.RWF_NOWAIT)
    except OSError as unsupported:
        if unsupported.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("the file system does not tell what is cached")
    finally:
        os.close(plain)


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no memory file system at /dev/shm")
def test_a_file_in_memory_is_no_disk():
    path = Path(f"/dev/shm/moeplan-test-{os.getpid()}")
    try:
        write_expert_file(path, torch.ones(2, 10))
        with ExpertFile(path) as file:
            assert file.tier == "page cache"
            assert torch.equal(file.read(1), torch.ones(10))
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("refused_at", ["open", "preadv"])
def test_without_direct_access_reads_go_through_the_page_cache(tmp_path, monkeypatch, refused_at):
    tensors, expected = random_records(torch.float32, [7, 300], 3, seed=1)
    write_expert_file(tmp_path / "experts", tensors)
    open_, preadv, direct, asked = os.open, os.preadv, set(), []

    def refusing_open(path, flags):
        asked.append(bool(flags & os.O_DIRECT))
        if flags & os.O_DIRECT and refused_at == "open":
            raise OSError(errno.EINVAL, "no direct access here")
        fd = open_(path, flags)
        (direct.add if flags & os.O_DIRECT else direct.discard)(fd)
        return fd

    def refusing_preadv(fd, buffers, offset):
        if fd in direct:
            raise OSError(errno.EINVAL, "no direct access here")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "preadv", refusing_preadv)
    with ExpertFile(tmp_path / "experts") as file:
        assert file.tier == "page cache"
        assert [bytes_in(file.read(record)) for record in range(3)] == expected
    assert asked == [True, False]


def test_a_read_that_stops_early_goes_on(tmp_path, monkeypatch):
    tensors, expected = random_records(torch.uint8, [20_000], 2, seed=2)
    write_expert_file(tmp_path / "experts", tensors)
    preadv, reads = os.preadv, []

    def short(fd, buffers, offset):
        reads.append(offset)
        return preadv(fd, [buffers[0][:8192]], offset)

    with ExpertFile(tmp_path / "experts") as file:
        monkeypatch.setattr(os, "preadv", short)
        assert bytes_in(file.read(1)) == expected[1]
    assert reads == [24576, 32768, 40960]


@pytest.mark.parametrize("record", [-1, 2])
def test_record_out_of_range(tmp_path, record):
    write_expert_file(tmp_path / "experts", torch.ones(2, 10))
    with (
        ExpertFile(tmp_path / "experts") as file,
        pytest.raises(ValueError, match=f"record {record} -- allowed is 0 to 1 -- ask"),
    ):
        file.read(record)


def test_closed_file_is_not_read_and_closes_once(tmp_path):
    write_expert_file(tmp_path / "experts", torch.ones(2, 10))
    before = open_files()
    with ExpertFile(tmp_path / "experts") as file:
        file.read(0)
    file.close()
    assert open_files() == before
    with pytest.raises(ValueError, match="is closed -- allowed is an open file"):
        file.read(0)


HEADER = b'{"format": "moeplan experts 1", "dtype": "uint8", "shape": [5000], "records": 2}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 9000,
        b"[" * 4096,
        bytes(20_000),
        HEADER.replace(b"experts 1", b"experts 2").ljust(4096) + bytes(16384),
        HEADER.replace(b"uint8", b"load").ljust(4096) + bytes(16384),
        HEADER.replace(b"5000", b"-5000").ljust(4096) + bytes(16384),
        HEADER.replace(b"5000", b"5e3").ljust(4096) + bytes(16384),
        HEADER.replace(b"[5000]", b"7").ljust(4096) + bytes(16384),
        HEADER.replace(b'"records": 2', b'"records": true').ljust(4096) + bytes(8192),
    ],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "experts").write_bytes(content)
    before = open_files()
    with pytest.raises(ValueError, match="experts: not a finished expert file"):
        ExpertFile(tmp_path / "experts")
    assert open_files() == before


def test_a_file_that_was_cut_off(tmp_path):
    whole = HEADER.ljust(4096) + bytes(16384)
    (tmp_path / "experts").write_bytes(whole[:-4096])
    with pytest.raises(ValueError, match="16384 bytes -- its header says 20480"):
        ExpertFile(tmp_path / "experts")
    (tmp_path / "experts").write_bytes(whole)
    with ExpertFile(tmp_path / "experts") as file:
        os.truncate(tmp_path / "experts", 8192)
        with pytest.raises(ValueError, match="the file ends at byte 12288 --"):
            file.read(1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "no tensors -- allowed is one record or more"),
        ([torch.ones(0)], r"record 0 is torch.float32 \(0,\)"),
        ([torch.ones(2), torch.ones(3)], r"record 1 is torch.float32 \(3,\)"),
        ([torch.ones(2), torch.ones(2).half()], r"record 1 is torch.float16 \(2,\)"),
    ],
)
def test_records_are_alike(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_expert_file(tmp_path / "experts", tensors)
    with pytest.raises(ValueError, match="not a finished expert file"):
        ExpertFile(tmp_path / "experts")
