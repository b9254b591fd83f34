"""The console on which the commands print their tables, and quiet libraries beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastdpo.data.terminal import make_console

__all__ = ["make_console", "quiet_libraries"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides the progress bars of datasets and transformers."""
    import datasets
    from transformers.utils import logging

    had_bars, had_hf_bars = not datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()
        if had_hf_bars:
            logging.enable_progress_bar()
