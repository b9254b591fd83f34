"""Slips in the names of files and model folders: the nearest existing one. Imports only Python's standard library.

In: a path that does not exist, or the name of a model. Out: the end of a message. A name that is no path may be on the
Hub, so it is only refused if a model's folder here has nearly that name, and the Hub's cache has no such model.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

OF_A_MODEL = ("config.json", "adapter_config.json")  # files that a model's folder holds
_CLOSE = 0.7  # of difflib's ratio: two letters swapped in a short name, and not gpt2 for gpt2-dpo


def nearest_file(path: str) -> str:
    """The end of a message: the nearest existing file or folder, if there is one."""
    folder = Path(path).expanduser().parent
    return _did_you_mean(path, _names(folder), folder)


def check_model_folder(name: str, path: str) -> None:
    """Raises ValueError for a folder that does not exist, and for a name that a model's folder here nearly has.

    Without this, libraries would ask the Hub for it first, which takes a minute if the Hub cannot be reached.
    """
    if Path(path).exists():  # not expanded: shells do that, and libraries that load models do not
        return
    rule = f"{name} must be a local directory or a model name on the Hub"
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{rule}, got {path}, which does not exist{nearest_file(path)}")
    if "/" in path or _is_cached(path):
        return
    here = Path()
    models = [entry for entry in _names(here) if any(Path(entry, file).is_file() for file in OF_A_MODEL)]
    if hint := _did_you_mean(path, models, here, cutoff=_CLOSE):
        raise ValueError(
            f"{rule}, got {path!r}, which is no folder here{hint} (A model {path} on the Hub must be downloaded first:"
            f" hf download {path})"
        )


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def _did_you_mean(path: str, there: Iterable[str], folder: Path, cutoff: float = 0.6) -> str:
    nearest = difflib.get_close_matches(Path(path).name, list(there), n=1, cutoff=cutoff)
    return f"; did you mean {str(folder / nearest[0])!r}?" if nearest else ""


def _is_cached(name: str) -> bool:
    """Whether huggingface_hub's cache has a model of this name."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return Path(cache, f"models--{name}").expanduser().is_dir()
