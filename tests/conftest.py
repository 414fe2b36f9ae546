"""Fixtures shared by all tests."""

import os
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
