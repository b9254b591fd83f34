"""`fastdpo train`: preference training from the command line."""

from __future__ import annotations

from fastdpo.cli.arguments import AdapterArguments
from fastdpo.cli.run import run_training
from fastdpo.training import DPOConfig, DPOTrainer

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


def main(argv: list[str]) -> None:
    """As `run_training`."""
    run_training("train", argv, DPOTrainer, DPOConfig, AdapterArguments, COLUMNS)
