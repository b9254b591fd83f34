"""The checkpoints of a run, as models to rank.

In: the folder of a run. Out: its checkpoints in the order of their steps, and the final model.
"""

from __future__ import annotations

import json
from pathlib import Path


def run_checkpoints(folder: str | Path) -> list[str]:
    """The checkpoints of a run in the order of their steps. If the folder itself contains a different, final model, it
    is last. Empty if there are no checkpoints."""
    path = Path(folder)
    steps = {int(found.name[11:]): found for found in path.glob("checkpoint-*") if found.name[11:].isdigit()}
    found = [str(steps[step]) for step in sorted(steps) if _holds_model(steps[step])]
    if not found or not _holds_model(path):
        return found
    try:
        last = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError):
        last = None
    return found if last == max(steps) else [*found, str(folder)]


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
