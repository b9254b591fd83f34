"""A GGUF file as a model: converted once into an ordinary folder, which everything else can load.

In: the name of a model. Out: the name itself, or, for a file that ends in .gguf, a folder in the cache with its weights
as fp32 safetensors, its config, its tokenizer and its chat template. Training, quantization, adapters and merging then
work as with any folder. Refuses a file that does not exist, that transformers cannot read, and a missing gguf package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from fastdpo.data.sources.nearest import nearest_file
from fastdpo.locks import locked

logger = logging.get_logger(__name__)

SOURCE_FILE = "converted_from.json"  # in the folder: the GGUF file that it was made of


def as_folder(name: str, option: str = "model") -> str:
    """The folder to load for a model given by name: a converted copy of a .gguf file, any other name as it is.

    Args:
        option: the setting that names the model, for errors.
    Raises:
        ValueError: the file does not exist or cannot be read, or the package gguf is missing.
    """
    if not str(name).lower().endswith(".gguf") or Path(name).is_dir():
        return name
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{option} must be an existing file if it ends in .gguf, got {name}{nearest_file(name)}")
    folder = cache_folder() / f"{path.stem}-{_key(path)}"
    if folder.is_dir():
        return str(folder)
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"{option} must be a folder or a name on the Hub if the package gguf is not installed, got {name}:"
            ' pip install "fastdpo[pretrained]"'
        )
    with locked(cache_folder(), "XDG_CACHE_HOME", wait=lambda who: logger.warning(f"Waiting for {who}.")):
        if not folder.is_dir():  # another process may have made it
            logger.warning(f"Converting {name} to fp32 safetensors, once, in {folder}.")
            convert(path, folder)
    return str(folder)


def cache_folder() -> Path:
    """fastdpo/gguf in ~/.cache, or in XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdpo" / "gguf"


def convert(path: Path, folder: Path) -> None:
    """Writes a GGUF file's model and tokenizer into a new folder, which exists only once it is complete.

    Raises:
        ValueError: transformers cannot read the file.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # of many types, by the part of the file that is damaged or unknown
        raise ValueError(
            f"model must be a GGUF file of an architecture that transformers reads, got {path}: {error}"
        ) from error
    if hasattr(model.config, "quantization_config"):  # the weights are plain numbers now
        del model.config.quantization_config
    plain = type(model)(model.config)  # the loaded one still has the mark of its loader, and refuses to be saved
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / SOURCE_FILE).write_text(json.dumps({"gguf_file": str(path.resolve())}) + "\n", encoding="utf-8")
    partial.rename(folder)


def _key(path: Path) -> str:
    """Changes with the file's place, size and time."""
    status = path.stat()
    facts = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
