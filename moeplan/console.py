"""Where text for people goes, and progress on long work.

With ``--json`` stdout belongs to the JSON, so people read stderr; progress is always on stderr.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.text import Text


class _Screen(Console):
    """Prints text as it is: a name may hold what would be markup elsewhere."""

    def __init__(self, *, stderr: bool) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        end_unread()


def end_unread() -> NoReturn:
    """End quietly where nobody reads on, as in `... | head`; the code is a shell's for that."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still buffered
    raise SystemExit(141)


def of(options: argparse.Namespace) -> Console:
    """Return the console for tables."""
    screen = _Screen(stderr=bool(options.json))
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
        yield lambda text: status.update(Text(f"{text} ..."))
