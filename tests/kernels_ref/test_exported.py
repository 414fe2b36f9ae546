"""The package's public names are exactly those that its modules define, sorted."""

import importlib
import inspect
import pkgutil

import kernels_ref


def test_all_is_sorted_and_exact():
    defined = {
        name
        for module in pkgutil.iter_modules(kernels_ref.__path__, "kernels_ref.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.name
    }
    assert kernels_ref.__all__ == sorted(defined)


def test_every_public_name_has_a_docstring():
    for name in kernels_ref.__all__:
        assert inspect.getdoc(getattr(kernels_ref, name)), name
