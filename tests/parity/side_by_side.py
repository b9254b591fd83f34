"""One training run through TRL's DPOTrainer and one through ours, from the same settings, and what both have logged."""

import torch
from closeness import without_ties
from datasets import Dataset
from tiny import make_rows

SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 5e-3,  # large: after a step policy and reference differ in every token
    "beta": 0.3,
    "seed": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
NOT_NUMBERS = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
NOT_NUMBERS |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


def rows():
    """12 pairs; the responses of a pair differ in length, and none would be dropped."""
    return Dataset.from_list(make_rows(12, seed=3))


def mixtral(seed=0):
    """Four experts in each of two layers, two of them for a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, router_aux_loss_coef=0.1, **sizes, **experts))


def trained(package, folder, model, tokenizer, keywords, settings, dataset=None):
    """The package's DPOTrainer after three steps, on `rows()` if no dataset is given."""
    args = package.DPOConfig(str(folder), **{**SETTINGS, **settings})
    data = rows() if dataset is None else dataset
    trainer = package.DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, **keywords)
    trainer.train()
    return trainer


def logged(trainer, prefix=""):
    """The numbers that were logged at each step; a step's entry is the one that holds its loss."""
    return [
        {key: value for key, value in without_ties(entry).items() if key not in NOT_NUMBERS}
        for entry in trainer.state.log_history
        if f"{prefix}loss" in entry
    ]


def assert_same_logs(ours, theirs, keys=None, tolerance=1e-4):
    """Every number that TRL has logged, or those of `keys`, to `tolerance` in absolute terms."""
    assert len(ours) == len(theirs) == 3
    for step, (own, trl) in enumerate(zip(ours, theirs, strict=True)):
        assert trl.keys() <= own.keys(), f"step {step}: TRL also logs {sorted(trl.keys() - own.keys())}"
        compared = {key: (own[key], trl[key]) for key in trl if keys is None or key in keys}
        wrong = {key: pair for key, pair in compared.items() if not abs(pair[0] - pair[1]) <= tolerance}
        assert not wrong, f"step {step}, ours and TRL's: {wrong}"
