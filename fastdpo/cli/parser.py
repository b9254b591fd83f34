"""Parsers whose mistakes `fastdpo` reports in one way: ValueError in place of argparse's message and exit."""

from __future__ import annotations

import argparse
from typing import NoReturn


class RaisesErrors:
    """Stands before a parser among the bases of a class."""

    prog: str

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (all options: {self.prog} --help)")


class RaisingParser(RaisesErrors, argparse.ArgumentParser):
    """argparse's parser that raises."""
