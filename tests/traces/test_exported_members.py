"""The package exports exactly its public classes and functions, sorted."""

import inspect

import traces


def test_all_is_sorted_and_exact() -> None:
    public = {
        name
        for name, value in vars(traces).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(traces.__all__) == public
    classes_first = sorted(traces.__all__, key=lambda name: (name[0].islower(), name))
    assert traces.__all__ == classes_first
