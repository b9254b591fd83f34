"""`fastdpo sft`: supervised fine-tuning from the command line, the stage before preference training."""

from __future__ import annotations

from fastdpo.cli.arguments import LoraArguments
from fastdpo.cli.run import run_training
from fastdpo.training import SFTConfig, SFTTrainer

COLUMNS = [
    ("loss", "loss (nats per token)"),
    ("mean_token_accuracy", "token accuracy"),
    ("entropy", "entropy (nats)"),
]


def main(argv: list[str]) -> None:
    """As `run_training`."""
    run_training("sft", argv, SFTTrainer, SFTConfig, LoraArguments, COLUMNS)
