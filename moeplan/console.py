"""Where text for people goes, and progress on long work.

With ``--json`` stdout belongs to the JSON, so people read stderr; progress is always on stderr.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


def of(options: argparse.Namespace) -> Console:
    """Return the console for tables."""
    screen = Console(stderr=bool(options.json), highlight=False, soft_wrap=True)
    if not screen.is_terminal:
        screen.width = 140  # a file or a pipe has no width of its own
    return screen


@contextmanager
def progress(_screen: Console) -> Iterator[Callable[[str], None]]:
    """Show what is going on: a spinner on a terminal, plain lines elsewhere.

    Yields a function that is told what begins.
    """
    screen = Console(stderr=True, highlight=False)
    began = time.monotonic()
    if not screen.is_terminal:
        yield lambda text: print(f"[{time.monotonic() - began:5.1f} s] {text}", file=sys.stderr)
        return
    with screen.status("starting") as status:
        yield lambda text: status.update(f"{text} ...")
