"""Where the commands print their tables."""

from __future__ import annotations

import sys

from rich.console import Console


def make_console() -> Console:
    """As wide as the terminal; in a file or a pipe, wide enough that no fact is broken over lines too often."""
    return Console(width=None if sys.stdout.isatty() else 140)
