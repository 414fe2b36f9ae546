"""Fixtures shared by all tests."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A slow machine is not a wrong result: no test asserts a time.
settings.register_profile("moeplan", deadline=None)
settings.load_profile("moeplan")


@pytest.fixture(scope="session")
def moeplan_data() -> Path:
    """Folder with real traces and workloads; the test is skipped without it."""
    folder = os.environ.get("MOEPLAN_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set MOEPLAN_DATA to the folder with the real traces to run this test")
    return Path(folder)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Let no file grow beyond 4 KiB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
