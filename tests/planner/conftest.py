"""Makes the brute-force oracle importable: tests have no packages."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def brute():
    """The module `brute.py` beside this file."""
    spec = importlib.util.spec_from_file_location("brute", Path(__file__).with_name("brute.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["brute"] = module
    spec.loader.exec_module(module)
    return module
