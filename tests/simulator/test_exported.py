"""The package exports exactly what its ``__all__`` lists."""

from types import ModuleType

import simulator


def test_all_is_sorted_and_exact() -> None:
    public = {
        name
        for name, value in vars(simulator).items()
        if not name.startswith("_") and not (isinstance(value, ModuleType))
    }
    assert simulator.__all__ == sorted(simulator.__all__)
    # the function `simulate` hides the module of that name
    assert public == set(simulator.__all__)
