"""What is looked at before any weight is loaded, so that a slip costs seconds: the folder that the run writes into, the
first row of each dataset, the model's config.

In: what a trainer is given. Refused: a folder that cannot be written to, rows that are read by no form, a model that is
not there or has no causal LM.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdpo.data.rows.first_row import check_first_row
from fastdpo.training.settings.engine import EngineConfig


def check_before_weights(args: EngineConfig, train_dataset: Any, eval_dataset: Any, *, is_sft: bool) -> None:
    """Raises:
    ValueError: output_dir cannot be written to, or the first row of a dataset cannot be read.
    """
    evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
    for name, dataset in {"train": train_dataset, **evaluated}.items():
        if dataset is not None:
            check_first_row(dataset, name, args.tokenization_settings(), is_sft=is_sft)
    if args.should_save:
        check_can_write("output_dir", args.output_dir)


def check_can_write(name: str, folder: str | Path | None) -> None:
    """Tries the folder, or the nearest above it that is there, with a file that goes at once; nothing is left behind.

    Raises:
        ValueError: the system does not let it.
    """
    wanted = Path(str(folder)).absolute()
    existing = next((path for path in (wanted, *wanted.parents) if path.exists()), wanted)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written to, got {folder}: {error.strerror} ({existing})"
        ) from error
