"""Text of strangers on a terminal or in a file that is read again: what would move the cursor, change colors, reverse
the direction of a line or begin a new one is written out as an escape. Imports only Python's standard library.
"""

from __future__ import annotations

import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (right-to-left marks), surrogates, line separators
_JOINERS = "\u200c\u200d"  # of letters and emojis


def visible(text: str, *, keeps: str = "") -> str:
    r"""The text with its control characters as escapes: "\x1b[31m" becomes the six characters \x1b[31m.

    Args:
        keeps: control characters that stay, such as "\n\t" for text of several lines.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in keeps or c in _JOINERS or unicodedata.category(c) not in _HIDDEN else _escape(c) for c in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
