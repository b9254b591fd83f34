"""A trainer of a tiny model on a handful of rows, on the CPU, silent."""

from datasets import Dataset
from tiny import make_llama, make_rows, make_tokenizer

from fastdpo import DPOConfig, DPOTrainer

ARGUMENTS = ("ref_model", "peft_config", "eval_dataset", "compute_metrics", "callbacks")
SETTINGS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "beta": 0.5,
}


def tiny_trainer(output_dir, model=None, num_rows=16, **settings):
    arguments = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    return DPOTrainer(
        make_llama() if model is None else model,
        args=DPOConfig(str(output_dir), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(make_rows(num_rows)),
        processing_class=make_tokenizer(),
        **arguments,
    )


def make_lora(**settings):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]
