"""Recipes of Axolotl with `rl: dpo`, `ipo`, `simpo` or `orpo`.

In: the mapping in the YAML file. Out: lines in a Book. Refuses recipes of other methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdpo.cli.recipes.book import Book, Lost, Rule, as_number, follow, if_true, with_others
from fastdpo.cli.recipes.common import (
    CHATML,
    READ_BY_COLUMNS,
    put_by_epoch,
    put_data,
    put_deepspeed,
    put_held_out,
    without_evaluation,
)

MARKS = (
    *("base_model", "rl", "micro_batch_size", "num_epochs", "sequence_len", "val_set_size", "adapter", "optimizer"),
    *("lora_target_linear", "evals_per_epoch", "saves_per_epoch", "dataset_prepared_path", "special_tokens", "rl_beta"),
    *("lr_scheduler", "sample_packing", "pad_to_sequence_len", "train_on_inputs", "flash_attention", "group_by_length"),
)
METHODS = {"dpo": "sigmoid", "ipo": "ipo", "simpo": "simpo", "orpo": "orpo"}
_SAME = {
    *("output_dir", "learning_rate", "gradient_accumulation_steps", "max_steps", "weight_decay", "warmup_steps"),
    *("max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "logging_steps", "save_total_limit", "save_steps"),
    *("save_strategy", "eval_steps", "eval_strategy", "seed", "fp16", "tf32", "gradient_checkpointing_kwargs"),
    *("load_in_8bit", "load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "lora_modules_to_save", "hub_model_id"),
    *("hub_strategy", "resume_from_checkpoint", "trust_remote_code", "torch_compile", "neftune_noise_alpha"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "attn_implementation"),
    *("precompute_ref_log_probs", "cpo_alpha", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("save_only_model", "lr_scheduler_kwargs", "optim_args", "include_tokens_per_second", "lora_target_parameters"),
    *("ddp_timeout", "ddp_find_unused_parameters", "optim_target_modules", "save_first_step"),
}
_SET_KEYS = {"path", "name", "split", "data_files", "data_dir"}
_SHARDS = ("shards", "shards_idx", "preprocess_shards")


def migrate_axolotl(recipe: Mapping[str, Any], book: Book) -> None:
    """Raises:
    ValueError: the recipe trains by another method.
    """
    method = recipe.get("rl")
    if method not in METHODS:
        raise ValueError(
            f"rl must be one of {', '.join(METHODS)} in a recipe of Axolotl for preference training, got {method!r}"
        )
    follow(recipe, _RULES, _SAME, book)
    if book.value("loss_type") is None:
        book.put("loss_type", METHODS[method], f"was rl: {method}")
    _add_sft(recipe, book)
    book.default("max_length", 512, "Axolotl")
    book.default("num_train_epochs", 1, "Axolotl")
    book.default("per_device_train_batch_size", 1, "Axolotl")
    book.default("lr_scheduler_type", "cosine", "Axolotl")
    book.default("output_dir", "model-out", "Axolotl")
    if book.environment and "report_to" not in book.lines:
        book.put("report_to", "wandb", "was wandb_project")
    without_evaluation(book, "Axolotl")


def _add_sft(recipe: Mapping[str, Any], book: Book) -> None:
    alpha = recipe.get("rpo_alpha")
    if alpha is not None:
        book.put("loss_type", [book.value("loss_type"), "sft"], f"was rl: {recipe['rl']}, rpo_alpha: {alpha}")
        book.put("loss_weights", [1.0, alpha], f"was rpo_alpha: {alpha}")
    gamma, beta = as_number(recipe.get("simpo_gamma")), as_number(book.value("beta", 0.1))
    if gamma is not None and beta:
        book.put("gamma_beta_ratio", gamma / beta, f"was simpo_gamma: {gamma}, over beta")


def _adapter(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value in ("lora", "qlora"):
        book.put("use_peft", True, f"was adapter: {value}")
        if value == "qlora":
            book.put("load_in_4bit", True, "was adapter: qlora")
    elif value:
        book.lose(
            "adapter", value, "the command line has LoRA only (use_peft); pass other adapters as peft_config in Python"
        )


def _targets(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if isinstance(value, list) and value:
        book.put("lora_target_modules", value)
    elif value:
        book.lose("lora_target_modules", value, "write a list of layer names, or all-linear")


def _sets(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    put_data(book, [_part(part, book, "datasets") for part in value], "was datasets")


def _test_sets(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value:
        put_data(book, [_part(part, book, "test_datasets") for part in value], "was test_datasets", evaluated=True)


def _part(part: Mapping[str, Any], book: Book, option: str) -> dict[str, Any]:
    """The keys of a set that fastdpo knows; `type` is not needed, because rows are read by their columns."""
    kept = {key: value for key, value in part.items() if key in _SET_KEYS and value is not None}
    if kept.get("path") and Path(str(kept["path"])).suffix:  # a file has no splits
        kept.pop("split", None)
    for key, value in part.items():
        if key == "ds_type" and str(kept.get("path")) not in ("json", "parquet"):
            continue
        if key in _SHARDS:
            book.lose(f"{option}.{key}", value, "write a range in the split instead, such as train[:10%]")
        elif key == "type" and value is not None:
            book.lose(f"{option}.type", value, READ_BY_COLUMNS)
        elif key not in _SET_KEYS and key != "ds_type" and value is not None:
            book.lose(f"{option}.{key}", value, "rename the columns or roles in the data")
    return kept


def _template(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value == "chatml":
        book.put("chat_template", CHATML, "was chat_template: chatml")
    elif value == "jinja":
        book.put("chat_template", recipe.get("chat_template_jinja"), "was chat_template_jinja")
    elif value and value != "tokenizer_default":
        book.lose(
            "chat_template",
            value,
            "the tokenizer's own template is used; for another one write chat_template: FILE.jinja",
        )


def _special_tokens(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    for name, token in (value or {}).items():
        if name == "pad_token":
            book.put("pad_token", token, "was special_tokens.pad_token")
        else:
            book.lose(
                f"special_tokens.{name}", token, "save a tokenizer with this token and set tokenizer to its folder"
            )


def _checkpointing(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if isinstance(value, bool):
        book.put("gradient_checkpointing", value)
    elif value is not None:
        book.put("gradient_checkpointing", True, f"was gradient_checkpointing: {value}")
        if value in ("offload", "offload_disk"):
            book.put("activation_offloading", True, f"was gradient_checkpointing: {value}")


def _bf16(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if isinstance(value, bool):
        book.put("bf16", value)  # auto is the default here: on where a GPU has it
    elif value == "full":
        book.put("dtype", "bfloat16", "was bf16: full")


def _min_lr(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value:
        book.put("lr_scheduler_type", "cosine_with_min_lr", "was cosine_min_lr_ratio")
        book.put("lr_scheduler_kwargs", {"min_lr_rate": value}, "was cosine_min_lr_ratio")


def _warmup_ratio(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    if value is not None and not recipe.get("warmup_steps"):
        book.put("warmup_steps", value, "was warmup_ratio: a value below 1 is a share of the steps")


def _wandb(variable: str) -> Rule:
    def rule(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
        if value:
            book.environment[variable] = str(value)

    return rule


def _logger(name: str, key: str) -> Rule:
    def rule(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
        if value:
            before = book.value("report_to")
            book.put("report_to", name if before is None else f"{before},{name}", f"was {key}")

    return rule


_AUTO = Lost("attention_backend: auto takes the fastest exact attention", (None, False, True))
_PACKED = Lost("no effect: rows are always packed without padding", (None, False, True))

_RULES: dict[str, Rule] = {
    "base_model": "model",
    "base_model_config": Lost("fastdpo reads the model's own config", (None,)),
    "model_type": Lost("the model's config determines the class", (None, "AutoModelForCausalLM")),
    "tokenizer_type": Lost("the tokenizer's files determine the class", (None, "AutoTokenizer")),
    "tokenizer_config": "tokenizer",
    "revision_of_model": "model_revision",
    "strict": Lost("fastdpo always requires all weights of a checkpoint", (None, False, True)),
    "rl": Lost("", ("dpo", "ipo", "simpo", "orpo")),
    "rl_beta": "beta",
    "dpo_beta": "beta",
    "orpo_alpha": "beta",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_use_weighting": "use_weighting",
    "dpo_loss_type": "loss_type",
    "dpo_loss_weights": "loss_weights",
    "dpo_use_logits_to_keep": Lost("no effect: only response positions reach the LM head", (None, False, True)),
    "dpo_padding_free": _PACKED,
    "dpo_generate_during_eval": if_true("dpo_generate_during_eval", "num_eval_samples", 8),
    "rpo_alpha": with_others,  # the loss
    "simpo_gamma": with_others,
    "max_prompt_len": "max_prompt_length",
    "datasets": _sets,
    "test_datasets": _test_sets,
    "val_set_size": lambda value, book, recipe: put_held_out(book, "val_set_size", value),
    "dataset_prepared_path": Lost("tokenized rows are stored in datasets' cache", (None,)),
    "dataset_processes": "dataset_num_proc",
    "dataset_num_proc": "dataset_num_proc",
    "chat_template": _template,
    "chat_template_jinja": with_others,  # chat_template
    "sequence_len": "max_length",
    "excess_length_strategy": Lost("long rows are truncated, see truncation_mode", (None, "truncate")),
    "sample_packing": _PACKED,
    "eval_sample_packing": _PACKED,
    "pad_to_sequence_len": _PACKED,
    "train_on_inputs": Lost("the loss always covers response tokens only"),
    "adapter": _adapter,
    "lora_model_dir": Lost("set model to that folder to continue training its adapter", (None, "")),
    "lora_target_linear": if_true("lora_target_linear", "lora_target_modules", ["all-linear"]),
    "lora_target_modules": _targets,
    "lora_fan_in_fan_out": Lost("PEFT finds it out", (None, False, True)),
    "lora_mlp_kernel": Lost("PEFT's own forward is used", (None, False)),
    "lora_qkv_kernel": Lost("PEFT's own forward is used", (None, False)),
    "lora_o_kernel": Lost("PEFT's own forward is used", (None, False)),
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "loraplus_lr_ratio": Lost("both factors of LoRA have one learning rate"),
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_ratio": _warmup_ratio,
    "cosine_min_lr_ratio": _min_lr,
    "evals_per_epoch": lambda value, book, recipe: put_by_epoch(
        book, "eval", "evals_per_epoch", value, recipe.get("num_epochs", 1)
    ),
    "saves_per_epoch": lambda value, book, recipe: put_by_epoch(
        book, "save", "saves_per_epoch", value, recipe.get("num_epochs", 1)
    ),
    "bf16": _bf16,
    "bfloat16": if_true("bfloat16", "dtype", "bfloat16"),
    "float16": if_true("float16", "dtype", "float16"),
    "gradient_checkpointing": _checkpointing,
    "flash_attention": _AUTO,
    "sdp_attention": _AUTO,
    "xformers_attention": _AUTO,
    "eager_attention": _AUTO,
    "flex_attention": _AUTO,
    "group_by_length": "length_bucketing",
    "early_stopping_patience": Lost("DPOTrainer(callbacks=[EarlyStoppingCallback(...)]) in Python"),
    "auto_resume_from_checkpoints": if_true("auto_resume_from_checkpoints", "resume_from_checkpoint", True),
    "local_rank": Lost("the launcher sets it", (None,)),
    "debug": Lost("log_level: debug", (None, False)),
    "deepspeed": lambda value, book, recipe: put_deepspeed(book, value),
    "fsdp": if_true("fsdp", "accelerate_config", "fsdp2"),
    "fsdp_version": Lost("accelerate_config: fsdp2 is version 2", (None, 1, 2)),
    "fsdp_config": Lost("set accelerate_config to a file of `accelerate config` with these lines", (None, {})),
    "special_tokens": _special_tokens,
    "tokens": Lost("save a model and a tokenizer with these tokens first", (None, [])),
    "wandb_project": _wandb("WANDB_PROJECT"),
    "wandb_entity": _wandb("WANDB_ENTITY"),
    "wandb_watch": _wandb("WANDB_WATCH"),
    "wandb_log_model": _wandb("WANDB_LOG_MODEL"),
    "wandb_run_id": _wandb("WANDB_RUN_ID"),
    "wandb_name": "run_name",
    "use_tensorboard": _logger("tensorboard", "use_tensorboard"),
    "use_mlflow": _logger("mlflow", "use_mlflow"),
    "use_comet": _logger("comet_ml", "use_comet"),
    "plugins": Lost("the head op never makes logits; for kernels of layers set use_liger_kernel: true", (None, [])),
    "liger_fused_linear_cross_entropy": Lost("no effect: the head op never makes logits", (None, False, True)),
    "liger_rope": Lost("use_liger_kernel: true, liger_kernel_config: {rope: true}"),
    "liger_rms_norm": Lost("use_liger_kernel: true, liger_kernel_config: {rms_norm: true}"),
    "liger_glu_activation": Lost("use_liger_kernel: true, liger_kernel_config: {swiglu: true}"),
    "unfrozen_parameters": Lost("freeze parameters in Python: parameter.requires_grad_(False)", (None, [])),
    "remove_unused_columns": Lost(
        "no effect: unused columns are always dropped after tokenization", (None, False, True)
    ),
}
