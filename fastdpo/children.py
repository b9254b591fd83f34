"""Child processes that import fastdpo too, by `python -m` or `python -c`: the environment in which they find it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment and `more`.

    Such a child looks for modules in the current directory first. In the folder above a clone called fastdpo it would
    take the clone, which is no package, for this one. There it is told to leave the current directory out.
    """
    found, shadow = {**os.environ, **more}, Path(PACKAGE.name)
    if shadow.is_dir() and shadow.resolve() != PACKAGE:
        if sys.version_info >= (3, 11):
            found["PYTHONSAFEPATH"] = "1"
        else:
            paths = [str(PACKAGE.parent), found.get("PYTHONPATH", "")]
            found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return found
