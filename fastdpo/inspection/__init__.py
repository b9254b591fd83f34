"""A look at preference data before it is trained on: `inspect_data` judges it, `clean_data` writes what is left of it,
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
