"""The reference kernels as the front door reaches them: only when something is measured.

They need torch, an extra without which everything else runs.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from basis.errors import InputError


def import_kernels() -> ModuleType:
    """Return `kernels_ref`.

    Raises
    ------
    InputError
        If torch is not installed.
    """
    try:
        import kernels_ref
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError(
            "this machine is measured with torch, which is not installed -- "
            "pip install 'moeplan[torch]'"
        ) from error
    return kernels_ref


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python's garbage collector out of the times."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
