"""A console that shows text of strangers as it is: no control character of a row or of an answer reaches the terminal,
and no bracket in it is read as markup. Imports only rich.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from fastdpo.data.visible import visible


class PlainConsole(Console):
    """rich's console without markup, which writes control characters out as escapes, wherever the text stands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Any:
        return super().render_str(visible(text, keeps="\n"), **options)  # before its width is measured

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(visible(text, keeps="\n"), style)


def make_console() -> PlainConsole:
    """A console as wide as the terminal; in a file or a pipe, wide enough that few lines are wrapped."""
    return PlainConsole(width=None if sys.stdout.isatty() else 140)
