"""Refuses checkpoints that would run code when they are loaded.

In: the folder of a checkpoint. Out: the first file with an object that such a file never holds. torch unpickles the
index and some values of divided checkpoints (FSDP's SHARDED_STATE_DICT), and DeepSpeed all of its files. So before they
load, this module reads the names of the objects in them, and makes none but those of torch's own index.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

_STEP = re.compile(r"global_step\d+")  # DeepSpeed's folder in a checkpoint
_OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
_OF_AN_INDEX = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
            *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
        )
    ),
}


def unsafe_file(folder: Path) -> str | None:
    """The first file of a checkpoint that must not be loaded, and why; None if there is none."""
    latest = folder / "latest"
    if latest.is_file() and not _STEP.fullmatch(latest.read_text().strip()):
        return f"latest names {latest.read_text().strip()!r}, which is no folder of DeepSpeed's"
    for path in sorted(folder.glob("global_step*/**/*.pt")):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is no archive of torch"
        with path.open("rb") as file:
            if names := _unknown(file, _OF_DEEPSPEED):
                return f"{path.name} holds {names}, which DeepSpeed does not save"
    for index in sorted(folder.glob("*/.metadata")):
        try:
            for values in _values(index):
                if names := _unknown(values, set()):
                    return f"{index.parent.name} holds {names}, which no optimizer saves"
        except (pickle.UnpicklingError, AttributeError, ValueError, EOFError, RuntimeError) as error:
            return f"{index.parent.name}/{index.name} cannot be read ({error})"
    return None


def _unknown(file: IO[bytes], known: set[str]) -> str:
    """The names of objects that loading this file would make, without the known ones and what tensors need."""
    return ", ".join(sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - known))


class _Index(pickle.Unpickler):
    """Makes only objects that torch's index of a divided checkpoint is made of."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _OF_AN_INDEX:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no part of an index")
        return super().find_class(module, name)


def _values(index: Path) -> Iterator[IO[bytes]]:
    """The values of a divided checkpoint that are no tensors: torch unpickles each.

    Raises:
        ValueError: one lies outside the checkpoint's folder.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    with index.open("rb") as file:
        found = _Index(file).load()
    for key, place in found.storage_data.items():
        path = index.parent / place.relative_path
        if path.parent != index.parent or path.is_symlink():
            raise ValueError(f"it names {place.relative_path}, a file of another folder")
        if isinstance(found.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            with path.open("rb") as file:
                file.seek(place.offset)
                yield io.BytesIO(file.read(place.length))
