"""What `iterate` and `sweep` share: options handed on to `fastdpo train`, and runs that go on where they stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def check_forwarded(options: Sequence[str], own: Sequence[str], reason: str) -> None:
    """Raises ValueError if the options for `fastdpo train` hold one that the command sets itself."""
    for option in options:
        name = option.partition("=")[0]
        if name in own:
            raise ValueError(f"{name} must not be given, because {reason}")


def resuming(folder: Path) -> list[str]:
    """The options with which `fastdpo train` resumes the run in a folder, or starts it if it has no checkpoint."""
    is_begun = any(folder.glob("checkpoint-*/trainer_state.json"))
    return ["--resume_from_checkpoint", "true"] if is_begun else ["--overwrite_output_dir"]
