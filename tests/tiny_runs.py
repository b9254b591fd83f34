"""Trainers of a tiny model on a handful of rows, on the CPU, silent: ours, and TRL's on the same rows and settings."""

from pathlib import Path

from datasets import Dataset
from tiny import make_llama, make_rows, make_tokenizer

from fastdpo import DPOConfig, DPOTrainer

ARGUMENTS = (
    "ref_model",
    "peft_config",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "compute_metrics",
    "callbacks",
)
SILENT = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
SETTINGS = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 3, "beta": 0.5, **SILENT}


def tiny_config(output_dir, **settings):
    """Log-probs of references are cached in the run's own folder, where no other test finds them."""
    return DPOConfig(str(output_dir), **{**SETTINGS, "ref_cache_dir": str(Path(output_dir, "cache")), **settings})


def tiny_trainer(output_dir, model=None, num_rows=16, **settings):
    """DPOTrainer; of `settings`, what ARGUMENTS names goes to the trainer, the rest to its config."""
    arguments = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    return DPOTrainer(
        make_llama() if model is None else model,
        args=tiny_config(output_dir, **settings),
        **{
            "train_dataset": Dataset.from_list(make_rows(num_rows)),
            "processing_class": make_tokenizer(),
            **arguments,
        },
    )


def trl_trainer(output_dir, model, ref_model, num_rows=16, **settings):
    import trl

    plain = {"bf16": False, "gradient_checkpointing": False}
    return trl.DPOTrainer(
        model,
        ref_model,
        trl.DPOConfig(str(output_dir), **{**SETTINGS, **plain, **settings}),
        train_dataset=Dataset.from_list(make_rows(num_rows)),
        processing_class=make_tokenizer(),
    )


def make_lora(**settings):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def losses(trainer):
    """Of every step of the run, which is made here."""
    trainer.train()
    return logged(trainer)
