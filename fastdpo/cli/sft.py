"""`fastdpo sft`: supervised fine-tuning from the command line, the stage before preference training."""

from __future__ import annotations

from fastdpo.cli.arguments import LoraArguments, RunArguments, parse
from fastdpo.cli.console import make_console
from fastdpo.cli.run import check_output_dir, load_datasets, print_summary, train_and_compare, without_secrets
from fastdpo.cli.train import check_dropout, lora_config, quantization_config
from fastdpo.training import SFTConfig, SFTTrainer

COLUMNS = [
    ("loss", "loss (nats per token)"),
    ("mean_token_accuracy", "token accuracy"),
    ("entropy", "entropy (nats)"),
]


def main(argv: list[str]) -> None:
    """Parses, refuses what cannot work, trains, reports.

    Raises:
        ValueError: anything that the user can mend, before a weight is changed.
    """
    run, adapter, args = parse("sft", [RunArguments, LoraArguments, SFTConfig], argv)
    check_dropout(adapter, args)
    console = make_console()
    resume_from = check_output_dir(args, overwrite=run.overwrite_output_dir)
    train_dataset, eval_dataset = load_datasets(run, args)
    trainer = SFTTrainer(
        run.model,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_config() if adapter.load_in_4bit else None,
        peft_config=lora_config(adapter) if adapter.use_peft else None,
    )
    print_summary(trainer, run)
    options = {"command": ["fastdpo", "sft", *without_secrets(argv)], **vars(run), **vars(adapter), **args.to_dict()}
    train_and_compare(console, trainer, resume_from, options, COLUMNS)
