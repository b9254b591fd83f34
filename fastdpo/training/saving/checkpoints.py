"""Checks that training can resume from a checkpoint, before anything is loaded.

In: the value of `train(resume_from_checkpoint=...)` or `--resume_from_checkpoint`. Out: the folder. Refused: a folder
that is no checkpoint, or whose run trained something else. Warns about state that the checkpoint lacks and Trainer
would create anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

logger = logging.get_logger(__name__)

_STATE = "trainer_state.json"
_WEIGHTS = ("model*.safetensors", "pytorch_model*", "model.safetensors.index.json", "global_step*", "*.distcp")
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
    folder = resume
    if resume in (True, "true", "True", "last"):
        folder = get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None
    if folder is None or not Path(folder).is_dir():
        raise ValueError(
            f"resume_from_checkpoint must name a checkpoint directory, found none for {resume!r} in {output_dir}"
        )
    _check(Path(folder), has_adapter)
    return str(folder)


def _check(folder: Path, has_adapter: bool | None) -> None:
    lost = [name for name in ("optimizer", "scheduler") if not next(folder.glob(f"{name}*"), None)]
    inside = sorted(path.name for path in folder.glob("checkpoint-*"))
    if lost and inside:
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint, got the folder of a run: {folder}. It contains"
            f" {', '.join(inside)}"
        )
    if not (folder / _STATE).is_file():
        raise ValueError(f"resume_from_checkpoint must be a checkpoint, got {folder} without {_STATE}")
    try:
        step = json.loads((folder / _STATE).read_text())["global_step"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"resume_from_checkpoint must be a complete checkpoint, got unreadable {folder / _STATE}: {error!r}"
        ) from None
    is_whole = any(next(folder.glob(name), None) for name in _WEIGHTS)
    is_adapter = any(next(folder.glob(name), None) for name in _ADAPTER)
    if not (is_whole or is_adapter):
        raise ValueError(f"resume_from_checkpoint must contain weights, got {folder} without any")
    if has_adapter is not None and has_adapter != is_adapter and is_whole != is_adapter:
        trained, asked = ("an adapter", "all weights") if is_adapter else ("all weights", "an adapter")
        raise ValueError(
            f"resume_from_checkpoint must come from a run that trains {asked} like this one, got {folder} from a run"
            f" that trained {trained}"
        )
    if lost and not next(folder.glob("global_step*"), None):
        logger.warning(
            f"{folder} was saved without {' and '.join(lost)} (save_only_model?): training resumes from step {step}"
            " with a new state for them"
        )
