"""The console on which the commands print their tables."""

from __future__ import annotations

from fastdpo.data.terminal import make_console

__all__ = ["make_console"]
