"""`fastdpo train`: preference training from the command line."""

from __future__ import annotations

from typing import Any

from fastdpo.cli.arguments import AdapterArguments, LoraArguments, RunArguments, parse
from fastdpo.cli.console import make_console
from fastdpo.cli.run import check_output_dir, load_datasets, print_summary, train_and_compare, without_secrets
from fastdpo.training import DPOConfig, DPOTrainer
from fastdpo.training.config import EngineConfig

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
    """Parses, refuses what cannot work, trains, reports.

    Raises:
        ValueError: anything that the user can mend, before a weight is changed.
    """
    run, adapter, args = parse("train", [RunArguments, AdapterArguments, DPOConfig], argv)
    check_dropout(adapter, args)
    console = make_console()
    resume_from = check_output_dir(args, overwrite=run.overwrite_output_dir)
    train_dataset, eval_dataset = load_datasets(run, args)
    trainer = DPOTrainer(
        run.model,
        adapter.ref_model,
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_config() if adapter.load_in_4bit else None,
        peft_config=lora_config(adapter) if adapter.use_peft else None,
    )
    print_summary(trainer, run)
    options = {"command": ["fastdpo", "train", *without_secrets(argv)], **vars(run), **vars(adapter), **args.to_dict()}
    train_and_compare(console, trainer, resume_from, options, COLUMNS)


def check_dropout(adapter: LoraArguments, args: EngineConfig) -> None:
    if adapter.lora_dropout > 0 and args.disable_dropout:
        raise ValueError(
            "lora_dropout must go with --no_disable_dropout, without which every dropout is set to 0, got"
            f" {adapter.lora_dropout}"
        )


def quantization_config() -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError('load_in_4bit needs bitsandbytes: pip install "fastdpo[quant]"') from error
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def lora_config(adapter: LoraArguments) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError('use_peft needs the peft package: pip install "fastdpo[peft]"') from error
    layers = adapter.lora_target_modules or ["all-linear"]
    return LoraConfig(
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules="all-linear" if layers == ["all-linear"] else layers,
        task_type="CAUSAL_LM",
    )
