"""Where the bundled example lies: in the wheel, or in a checkout's `examples` folder."""

from pathlib import Path

from basis.errors import InputError


def demo_scenario() -> Path:
    """Return the path of the bundled scenario.

    Raises
    ------
    InputError
        If the installation lost it.
    """
    here = Path(__file__).resolve().parent
    for path in (here / "example" / "demo.yaml", here.parent / "examples" / "demo.yaml"):
        if path.is_file():
            return path
    raise InputError(f"the bundled example is not beside {here} -- install moeplan again")
