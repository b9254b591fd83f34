"""Parsers whose mistakes `fastdpo` reports in one way: ValueError in place of argparse's message and exit.

In: a command line. Out: argparse's namespace; the items of a list may also be parted by commas. Light: whoever imports
this loads nothing beyond Python's own library.
"""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class ShowsDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the default of each option, where there is one and the text does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        names_it = action.default is None or "Default:" in (action.help or "")
        return action.help if names_it else super()._get_help_string(action)


class RaisesErrors:
    """Stands before a parser among the bases of a class."""

    prog: str

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (all options: {self.prog} --help)")


class TakesCommas:
    """Stands before a parser among the bases of a class."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """argparse's; the items of a list may also be parted by commas."""
        if action.nargs == "+":
            arg_strings = [item.strip() for text in arg_strings for item in text.split(",") if item.strip()]
        return super()._get_values(action, arg_strings)  # type: ignore[misc]


class RaisingParser(RaisesErrors, argparse.ArgumentParser):
    """argparse's parser that raises."""
