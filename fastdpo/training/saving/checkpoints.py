"""Checks that training can resume from a checkpoint, before anything is loaded.

In: the value of `train(resume_from_checkpoint=...)` or `--resume_from_checkpoint`. Out: the folder. Refused: a folder
that is no checkpoint, that is damaged, or whose run trained something else. Warns about state that the checkpoint lacks
and Trainer would create anew. "last" means the newest checkpoint that is sound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.utils import logging

from fastdpo.training.saving.manifest import MANIFEST, cut_off, damage, has_manifest
from fastdpo.training.saving.pickles import unsafe_file
from fastdpo.training.saving.staging import checkpoints

logger = logging.get_logger(__name__)

LAST = (True, "true", "True", "last")
_STATE = "trainer_state.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*", "model.safetensors.index.json", "global_step*", "*.distcp")
_SHARDS = "pytorch_model_fsdp_*"  # FSDP's SHARDED_STATE_DICT
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin", "*/adapter_model.safetensors", "*/adapter_model.bin")


def checkpoint_folder(resume: Any, output_dir: str | Path, *, has_adapter: bool | None = None) -> str | None:
    """The checkpoint that `resume` names, or the last one in `output_dir` if it is True; None if resuming is off.

    Args:
        has_adapter: whether the run trains an adapter; None if that is not known yet.
    Raises:
        ValueError: there is no checkpoint, or training cannot resume from it.
    """
    if resume in (None, False, "false", "False"):
        return None
    if resume in LAST:
        folder = _newest_sound(Path(output_dir), resume)
    else:
        folder = Path(resume)
        if not folder.is_dir():
            raise ValueError(
                f"resume_from_checkpoint must name a checkpoint directory, found none for {resume!r} in {output_dir}"
            )
        if (found := _fault(folder)) is not None:
            raise ValueError(f"{found}{_offer(folder)}")
    _check(folder, has_adapter)
    return str(folder)


def _newest_sound(output_dir: Path, resume: Any) -> Path:
    """The newest sound checkpoint of a run. Says which newer ones are damaged."""
    faults: list[str] = []
    for folder in reversed(checkpoints(output_dir)):
        if (found := _fault(folder)) is None:
            for fault in faults:
                logger.warning(fault)
            if faults:
                logger.warning(f"Training resumes from {folder}, the newest sound checkpoint")
            return folder
        faults.append(found)
    if faults:
        raise ValueError(f"{faults[0]}; no checkpoint in {output_dir} is sound")
    raise ValueError(
        f"resume_from_checkpoint must name a checkpoint directory, found none for {resume!r} in {output_dir}"
    )


def _offer(folder: Path) -> str:
    """The end of an error about a damaged checkpoint: another one to resume from."""
    sound = next((path for path in reversed(checkpoints(folder.parent)) if _fault(path) is None), None)
    if sound is None:
        return ""
    return f"; the newest sound checkpoint is {sound} (--resume_from_checkpoint last takes it)"


def _fault(folder: Path) -> str | None:
    """Why training cannot resume from any run's checkpoint in this folder; None if it can."""
    has_one = has_manifest(folder)
    found = damage(folder) if has_one else None
    if found is None:
        try:
            _check_whole(folder)
        except ValueError as error:
            return str(error)
        found = (None if has_one else cut_off(folder)) or unsafe_file(folder)
    return None if found is None else f"resume_from_checkpoint must be a complete checkpoint, got {folder}: {found}"


def _check_whole(folder: Path) -> None:
    """Checks what every checkpoint has. Raises ValueError."""
    lost = _lost(folder)
    inside = sorted(path.name for path in folder.glob("checkpoint-*"))
    if lost and inside:
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint, got the folder of a run: {folder}. It contains"
            f" {', '.join(inside)}"
        )
    if not (folder / _STATE).is_file():
        raise ValueError(f"resume_from_checkpoint must be a checkpoint, got {folder} without {_STATE}")
    try:
        int(json.loads((folder / _STATE).read_text())["global_step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"resume_from_checkpoint must be a complete checkpoint, got unreadable {folder / _STATE}: {error!r}"
        ) from None
    is_whole, is_adapter = _kinds(folder)
    if not (is_whole or is_adapter):
        raise ValueError(f"resume_from_checkpoint must contain weights, got {folder} without any")


def _lost(folder: Path) -> list[str]:
    return [name for name in ("optimizer", "scheduler") if not next(folder.glob(f"{name}*"), None)]


def _kinds(folder: Path) -> tuple[bool, bool]:
    """Whether the folder has all weights, and whether it has an adapter; shards may be of either."""
    is_whole = any(next(folder.glob(name), None) for name in _WEIGHTS)
    is_shards = next(folder.glob(_SHARDS), None) is not None
    return is_whole, is_shards or any(next(folder.glob(name), None) for name in _ADAPTER)


def _check(folder: Path, has_adapter: bool | None) -> None:
    """Checks what this run needs, and warns about what a sound checkpoint lacks."""
    is_whole, is_adapter = _kinds(folder)
    if has_adapter is not None and has_adapter != is_adapter and is_whole != is_adapter:
        trained, asked = ("an adapter", "all weights") if is_adapter else ("all weights", "an adapter")
        raise ValueError(
            f"resume_from_checkpoint must come from a run that trains {asked} like this one, got {folder} from a run"
            f" that trained {trained}"
        )
    if not has_manifest(folder):
        logger.warning(
            f"{folder} has no {MANIFEST}: an earlier fastdpo or another trainer saved it, so that only the beginnings"
            " of its files are checked"
        )
    lost = _lost(folder)
    if lost and not next(folder.glob("global_step*"), None):
        logger.warning(
            f"{folder} was saved without {' and '.join(lost)} (save_only_model?): training resumes from step"
            f" {json.loads((folder / _STATE).read_text())['global_step']}"
            " with a new state for them"
        )
