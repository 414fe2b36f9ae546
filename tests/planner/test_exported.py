"""The package exports exactly what its ``__all__`` lists."""

from types import ModuleType

import planner


def test_all_is_sorted_and_exact() -> None:
    public = {
        name
        for name, value in vars(planner).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert planner.__all__ == sorted(planner.__all__)
    assert public == set(planner.__all__)
