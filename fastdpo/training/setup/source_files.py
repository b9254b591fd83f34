"""Copies the other files of the original checkpoint, so that the saved model loads with the same loaders.

In: a trained model, and the name that it was loaded from. Out: files of that checkpoint in the output folder: its
processor's files, and, if a text-only class was trained from a multimodal checkpoint, the weights of the other parts
and the config of the whole, with the original keys and file names. Warns if the original no longer exists.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from fastdpo.training.setup.model_kinds import has_other_parts, text_part

logger = logging.get_logger(__name__)

PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", "chat_template.json"),
)
_OTHER_PARTS = "model-other-parts.safetensors"  # a shard of its own where the weights come in several


class OtherParts(NamedTuple):
    """The parts of a checkpoint that a text-only class does not have."""

    config: Any  # of the whole
    files: dict[str, Path]  # name of a weight -> where it is


def source_file(name: str, file: str, where: Mapping[str, Any]) -> Path | None:
    """A file of a checkpoint, in its folder or on the Hub; None if it does not exist."""
    options = {key: value for key, value in where.items() if key not in ("trust_remote_code", "gguf_file")}
    try:
        found = cached_file(name, file, **options, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return Path(found) if found else None


def copy_processor_files(name: str, folder: str | Path, where: Mapping[str, Any]) -> None:
    """Copies the original's processor files to the folder of the tokenizer; existing files are kept."""
    for file in PROCESSOR_FILES:
        found = source_file(name, file, where)
        if found is not None and not (Path(folder) / file).exists():
            shutil.copyfile(found, Path(folder) / file)


def other_parts(model: Any, name: str, where: Mapping[str, Any]) -> OtherParts | None:
    """The parts of a checkpoint that a text-only class does not load; None for other checkpoints."""
    if not name or getattr(getattr(model, "config", None), "base_config_key", "") == "":
        return None
    try:
        config = AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError):
        logger.warning(f"{name} no longer exists: if it was a multimodal checkpoint, only its text part is saved.")
        return None
    if not has_other_parts(config) or type(text_part(config)) is not type(model.config):
        return None
    own, ignored = set(model.state_dict()), getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    left = {
        key: path
        for key, path in _weight_files(name, where).items()
        if key not in own and any(re.search(pattern, key) for pattern in ignored)
    }
    return OtherParts(config, left)


def add_other_parts(model: Any, parts: OtherParts, folder: str | Path) -> None:
    """Completes a folder with the saved text-only class to a checkpoint of the whole model."""
    if not parts.files:
        return
    folder, left = Path(folder), _read(parts.files)
    index_file = folder / SAFE_WEIGHTS_INDEX_NAME
    if index_file.is_file():
        index = json.loads(index_file.read_text())
        save_file(left, folder / _OTHER_PARTS, metadata={"format": "pt"})
        index["weight_map"].update(dict.fromkeys(left, _OTHER_PARTS))
        size = sum(weight.numel() * weight.element_size() for weight in left.values())
        index["metadata"]["total_size"] = index["metadata"].get("total_size", 0) + size
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    elif (folder / SAFE_WEIGHTS_NAME).is_file():
        file = folder / SAFE_WEIGHTS_NAME
        saved = _read(dict.fromkeys(_keys(file), file))
        partial = file.with_suffix(".partial")
        save_file({**saved, **left}, partial, metadata={"format": "pt"})
        partial.replace(file)
    else:  # sharded by another engine: its own loader reads it
        return
    config = copy.deepcopy(parts.config)
    name = next(part for part in config.sub_configs if type(getattr(config, part)) is type(model.config))
    setattr(config, name, model.config)
    config.dtype = model.config.dtype
    config.save_pretrained(folder)


def _weight_files(name: str, where: Mapping[str, Any]) -> dict[str, Path]:
    """Every weight of a checkpoint in safetensors, with its file."""
    index = source_file(name, SAFE_WEIGHTS_INDEX_NAME, where)
    if index is not None:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = {file: source_file(name, file, where) for file in set(weight_map.values())}
        return {key: path for key, file in weight_map.items() if (path := shards[file]) is not None}
    single = source_file(name, SAFE_WEIGHTS_NAME, where)
    return dict.fromkeys(_keys(single), single) if single is not None else {}


def _keys(file: Path) -> Iterable[str]:
    with safe_open(file, framework="pt") as weights:
        return list(weights.keys())


def _read(files: Mapping[str, Path]) -> dict[str, Tensor]:
    read: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as weights:
            read.update({key: weights.get_tensor(key) for key, path in files.items() if path == file})
    return read
