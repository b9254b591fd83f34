"""The console on which the commands print their tables."""

from __future__ import annotations

import sys

from rich.console import Console


def make_console() -> Console:
    """A console as wide as the terminal; in a file or a pipe, wide enough that few lines are wrapped."""
    return Console(width=None if sys.stdout.isatty() else 140)
