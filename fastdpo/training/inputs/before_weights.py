"""Checks before any weight is loaded, so that a mistake costs only seconds: the output folder, the first row of each
dataset, the model's config.

In: the arguments of a trainer. Refused: a folder without write permission, rows of no known form, a model that does not
exist or has no causal LM.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdpo.data.rows.first_row import check_first_row
from fastdpo.training.settings.engine import EngineConfig
from fastdpo.training.setup.sequence_parallel import check_number_of_processes


def check_before_weights(args: EngineConfig, train_dataset: Any, eval_dataset: Any, *, is_sft: bool) -> None:
    """Raises:
    ValueError: output_dir cannot be written to, the first row of a dataset cannot be read, or the number of processes
        does not suit the settings.
    """
    check_number_of_processes(args)
    evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
    for name, dataset in {"train": train_dataset, **evaluated}.items():
        if dataset is not None:
            check_first_row(dataset, name, args.tokenization_settings(), is_sft=is_sft)
    if args.should_save:
        check_can_write("output_dir", args.output_dir)


def check_can_write(name: str, folder: str | Path | None) -> None:
    """Writes a temporary file to the folder, or to its nearest existing parent, and removes it at once.

    Raises:
        ValueError: the system does not permit it.
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
