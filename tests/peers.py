"""The packages that tests compare with. Where one is missing its tests are skipped, and where FASTDPO_PEERS=required is
set (`make test`, so CI too) they fail, unless the package has no release for this Python.
"""

import importlib
import os
import sys

import pytest

OLDEST_PYTHON = {"trl": (3, 11)}  # of the release that tests compare with


def peer(name):
    """The module, or a skip, or an ImportError."""
    has_release = sys.version_info >= OLDEST_PYTHON.get(name.partition(".")[0], (3,))
    if os.environ.get("FASTDPO_PEERS") == "required" and has_release:
        return importlib.import_module(name)
    return pytest.importorskip(name, exc_type=ImportError)
