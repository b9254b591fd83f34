"""`fastdpo train`: preference training from the command line."""

from __future__ import annotations

from fastdpo.cli.launch.start import launch
from fastdpo.cli.options.early import look

COLUMNS = [
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "reward margin"),
    ("rewards/chosen", "reward, chosen"),
    ("rewards/rejected", "reward, rejected"),
    ("logps/chosen", "log-prob, chosen"),
    ("logps/rejected", "log-prob, rejected"),
    ("rewards/weight", "gradient weight"),
]


def main(argv: list[str]) -> int | None:
    """Calls `run_training` after a first look without heavy imports, or returns the exit code of the launcher."""
    code = launch("train", argv, look("train", argv))
    if code is not None:
        return code
    from fastdpo.cli.arguments import AdapterArguments
    from fastdpo.cli.run import run_training
    from fastdpo.training import DPOConfig, DPOTrainer

    run_training("train", argv, DPOTrainer, DPOConfig, AdapterArguments, COLUMNS)
    return None
