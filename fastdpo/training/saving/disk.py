"""A disk without space for a save: what is missing, and waiting for it.

In: the error of a save, the folder, and the bytes that the save needs. Out: DiskFull, which names the path and the
missing bytes. Libraries report a full disk in many ways; torch and safetensors do not even raise OSError.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from torch import Tensor, nn

from fastdpo.modeling.head import whole_shape

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS = ("no space left", "disk quota exceeded", "file write failed", "file too large", "unexpected pos")
_OTHER_FILES = 2**18  # bytes: config, tokenizer, random states, logs


class DiskFull(OSError):
    """A save does not fit. No file of it is left."""

    def __init__(self, what: str, folder: Path, needed: int, free: int) -> None:
        missing = max(needed - free, 0)
        facts = f"{missing:,} bytes are missing ({what} needs about {needed:,}, {free:,} are free)"
        if missing == 0:  # a quota, or a limit of the size of files, which free space does not show
            facts = f"about {needed:,} bytes for {what} cannot be written, although {free:,} are free: a quota?"
        super().__init__(
            f"output_dir must be on a disk with space for {what}, got {folder}: {facts}. Earlier checkpoints are"
            " unchanged. Make space and continue with --resume_from_checkpoint last, or set --on_full_disk wait"
        )
        self.missing = missing


def free_bytes(folder: Path) -> int:
    """Bytes that this process may write, in the folder or its nearest existing parent."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def is_full(error: BaseException | None) -> bool:
    """Whether a save failed for lack of space."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in FULL):
            return True
        if any(word in str(error).lower() for word in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def bytes_of_save(model: nn.Module, optimizer: object, *, trained_only: bool) -> int:
    """About how many bytes a checkpoint takes: weights, the optimizer's state, and small files.

    Args:
        trained_only: whether an adapter is saved instead of all weights.
    """
    weights = {
        id(w): whole_shape(w).numel() * w.element_size()
        for w in model.parameters()
        if w.requires_grad or not trained_only
    }
    states = getattr(optimizer, "state", {}).values()
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return sum(weights.values()) + sum(t.numel() * t.element_size() for t in tensors) + _OTHER_FILES
