"""`fastdpo sft`: supervised fine-tuning from the command line, the stage before preference training."""

from __future__ import annotations

from fastdpo.cli.launch.start import launch
from fastdpo.cli.options.early import look

COLUMNS = [
    ("loss", "loss (nats per token)"),
    ("mean_token_accuracy", "token accuracy"),
    ("entropy", "entropy (nats)"),
]


def main(argv: list[str]) -> int | None:
    """Calls `run_training` after a first look without heavy imports, or returns the exit code of the launcher."""
    code = launch("sft", argv, look("sft", argv))
    if code is not None:
        return code
    from fastdpo.cli.arguments import LoraArguments
    from fastdpo.cli.run import run_training
    from fastdpo.training import SFTConfig, SFTTrainer

    run_training("sft", argv, SFTTrainer, SFTConfig, LoraArguments, COLUMNS)
    return None
