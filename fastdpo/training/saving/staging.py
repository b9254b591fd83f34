"""Folders that appear whole: written in UNFINISHED, beside their place, then renamed.

In: the output directory of a run. A killed run leaves complete checkpoints, and UNFINISHED, which the next one removes.
Trainer does not push a folder of this name to the Hub.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from transformers.utils import logging

from fastdpo.training.saving.manifest import damage, has_manifest

logger = logging.get_logger(__name__)

UNFINISHED = "_unfinished"
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path | str) -> list[Path]:
    """The checkpoints of a run, oldest step first."""
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match is not None}
    return sorted(steps, key=lambda path: steps[path])


def commit(staged: Path, final: Path) -> None:
    """Renames a complete folder to its place. A folder that is there already is replaced."""
    old = _move_away(final) if final.exists() else None
    staged.rename(final)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def put_in_place(staged: Path, folder: Path) -> None:
    """Moves the files of a saved model into its folder, each at once, and removes weights of an earlier save there."""
    names = {path.relative_to(staged) for path in staged.rglob("*") if path.is_file()}
    for name in sorted(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / name, folder / name)
    if any(_WEIGHTS.fullmatch(name.name) for name in names):
        for path in folder.iterdir():
            if _WEIGHTS.fullmatch(path.name) and path.relative_to(folder) not in names:
                path.unlink()
    shutil.rmtree(staged, ignore_errors=True)


def restore_unfinished(output_dir: Path) -> None:
    """Removes what a killed run has left; complete checkpoints that it was about to rename are kept."""
    unfinished = output_dir / UNFINISHED
    if not unfinished.is_dir():
        return
    for staged in checkpoints(unfinished):
        final = output_dir / staged.name
        if has_manifest(staged) and damage(staged) is None and not final.exists():
            staged.rename(final)
    shutil.rmtree(unfinished, ignore_errors=True)


def remove(folder: Path) -> None:
    """Removes a folder so that no part of it stays under its name."""
    away = _move_away(folder)
    shutil.rmtree(away, ignore_errors=True)
    with suppress(OSError):  # it holds a checkpoint that is being written
        away.parent.rmdir()


def _move_away(folder: Path) -> Path:
    away = folder.parent / UNFINISHED / f"old-{folder.name}"
    away.parent.mkdir(exist_ok=True)
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)
    return away


def rotate(output_dir: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Removes checkpoints until `limit` are left: damaged ones first, then the oldest. Those of `keep` stay.

    The newest of `keep` must be sound: before an older one is removed, the disk has it.
    """
    found = checkpoints(output_dir)
    kept = {path.resolve() for path in keep}
    free = [path for path in found if path.resolve() not in kept]
    if limit is None or limit <= 0 or len(found) <= limit or not free:
        return
    for path in keep:
        _sync(path)
    is_sound = {path: has_manifest(path) and damage(path, quick=True) is None for path in free}
    for path in sorted(free, key=lambda path: is_sound[path])[: len(found) - limit]:
        logger.info(f"Removing {path} because of save_total_limit")
        remove(path)


def _sync(folder: Path) -> None:
    """Waits until the disk has all files of a folder."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:
            if path.is_file():  # some file systems cannot sync folders
                raise
        finally:
            os.close(handle)
