"""Where the bundled examples lie: in the wheel, or in a checkout's `examples` folder."""

from pathlib import Path

from basis.errors import InputError


def bundled(name: str) -> Path:
    """Return the path of a bundled scenario.

    Raises
    ------
    InputError
        If the installation lost it.
    """
    here = Path(__file__).resolve().parent
    for path in (here / "example" / name, here.parent / "examples" / name):
        if path.is_file():
            return path
    raise InputError(f"the bundled example is not beside {here} -- install moeplan again")
