"""Parsers that raise ValueError instead of printing argparse's message and exiting, so that `fastdpo` reports all
errors in the same way.

In: a command line. Out: argparse's namespace; list items may also be separated by commas. Imports only Python's
standard library.
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
    """Mixin, listed before the parser class: errors raise ValueError."""

    prog: str

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (all options: {self.prog} --help)")


class TakesCommas:
    """Mixin, listed before the parser class: list items may be separated by commas."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """As in argparse, but list items may also be separated by commas."""
        if action.nargs == "+":
            arg_strings = [item.strip() for text in arg_strings for item in text.split(",") if item.strip()]
        return super()._get_values(action, arg_strings)  # type: ignore[misc]


class RaisingParser(RaisesErrors, argparse.ArgumentParser):
    """argparse's parser that raises."""
