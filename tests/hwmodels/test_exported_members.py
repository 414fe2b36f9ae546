"""The package exports what its ``__all__`` says, sorted, and nothing else."""

from types import ModuleType

import hwmodels


def test_all_is_sorted_and_exact() -> None:
    public = {
        name
        for name, value in vars(hwmodels).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert hwmodels.__all__ == sorted(public)
