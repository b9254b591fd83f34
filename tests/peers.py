"""The packages that tests compare with. Where one is missing its tests are skipped, and where FASTDPO_PEERS=required is
set (`make test`, so CI too) they fail.
"""

import importlib
import os

import pytest


def peer(name):
    """The module, or a skip, or an ImportError."""
    if os.environ.get("FASTDPO_PEERS") == "required":
        return importlib.import_module(name)
    return pytest.importorskip(name, exc_type=ImportError)
