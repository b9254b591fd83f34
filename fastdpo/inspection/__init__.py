"""Tools for preference data before training: `inspect_data` checks it, `clean_data` writes the rows without faults,
`convert_data` writes it as explicit conversational pairs."""

from importlib import import_module
from typing import Any

_HOME = {
    "Check": "checks",
    "Inspection": "inspect",
    "inspect_data": "inspect",
    "clean_data": "clean",
    "convert_data": "convert",
    "write_data_page": "page",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdpo.inspection' has no attribute {name!r}")
    return getattr(import_module(f"fastdpo.inspection.{_HOME[name]}"), name)
