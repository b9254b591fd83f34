"""Maps the options of other projects to ours: TRL's scripts and its SFTConfig, and the alignment-handbook.

In: a name that is not an option of fastdpo, and its value. Out: our options and their values, or environment variables.
An option without a counterpart is refused with advice. TRL's own former settings are in
`fastdpo.training.settings.trl_names`, mixtures of datasets in `mixtures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Options that differ only in name.
RENAMED: Mapping[str, str] = {
    "model_name_or_path": "model",
    "ref_model_name_or_path": "ref_model",
    "tokenizer_name_or_path": "tokenizer",
    "tokenizer_name": "tokenizer",
    "torch_dtype": "dtype",
    "dataset_name": "dataset",
    "dataset_train_split": "dataset_split",
    "dataset_train_name": "dataset_split",
    "dataset_test_split": "eval_split",
    "dataset_test_name": "eval_split",
    "streaming": "dataset_streaming",
    "test_split_size": "eval_fraction",
    "preprocessing_num_workers": "dataset_num_proc",
    "max_seq_length": "max_length",
    "chat_template_path": "chat_template",
    "hub_model_revision": "hub_revision",
}

# Options that become environment variables, which the underlying libraries read.
ENVIRONMENT: Mapping[str, str] = {
    "wandb_project": "WANDB_PROJECT",
    "wandb_entity": "WANDB_ENTITY",
    "wandb_run_group": "WANDB_RUN_GROUP",
}


def _attention(value: Any) -> dict[str, Any]:
    return {"attn_implementation": "flash_attention_2"} if value else {}


def _truncation(value: Any) -> dict[str, Any]:
    sides = {"left": "keep_end", "right": "keep_start", None: None}
    if value not in sides:
        raise ValueError(f"truncation_side must be 'left' or 'right', got {value!r}")
    return {} if value is None else {"truncation_mode": sides[value]}


# Options whose value must be converted: value -> our options.
COMPUTED: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "use_flash_attention_2": _attention,
    "gradient_checkpointing_use_reentrant": lambda value: (
        {} if value is None else {"gradient_checkpointing_kwargs": {"use_reentrant": value}}
    ),
    "truncation_side": _truncation,
}


@dataclass(frozen=True)
class Answer:
    """The advice for an option that fastdpo does not have."""

    instead: str  # what to write or do
    off: tuple[Any, ...] = (None, False)  # values that match fastdpo's behaviour: ignored without a message


ANSWERED: Mapping[str, Answer] = {
    "model_code_revision": Answer('--model_init_kwargs \'{{"code_revision": "{value}"}}\'', (None, "main")),
    "base_model_revision": Answer("download the base model at that revision and pass its folder as --model"),
    "text_column": Answer("rename the column to text: dataset.rename_column('{value}', 'text')", (None, "text")),
    "dataset_text_field": Answer("rename the column to text: dataset.rename_column('{value}', 'text')", (None, "text")),
    "auto_insert_empty_system_msg": Answer(
        "use a chat template that writes the empty system message: --chat_template FILE.jinja"
    ),
    "system_prompt": Answer("begin the rows' prompts with a message of the role system"),
    "eos_token": Answer("save a tokenizer with that eos_token and pass it: --tokenizer FOLDER"),
    "benchmarks": Answer("run the benchmarks after training; fastdpo has none", (None, False, [])),
    "callbacks": Answer("DPOTrainer(callbacks=[...]) in Python", (None, False, [])),
    "overwrite_hub_revision": Answer("--hub_revision NAME with a new branch"),
    "push_to_hub_revision": Answer("--push_to_hub true --hub_revision NAME"),
    "sanity_check": Answer("--max_steps 10"),
    "dataset_kwargs": Answer("remove it: fastdpo prepares rows by their format", (None, {})),
    "completion_only_loss": Answer(
        "give rows with one column, text: the loss covers all their tokens, and only responses in other rows",
        (None, True),
    ),
    "assistant_only_loss": Answer(
        "give rows with one column, text: the loss covers all their tokens, and only the assistant in conversations",
        (None, True),
    ),
    "loss_type": Answer("loss_type: nll, the only SFT loss", (None, "nll", "chunked_nll")),  # of SFTConfig
    "packing_strategy": Answer(
        "remove it: rows are packed whole", (None, "bfd", "bfd_split", "bfd-requeue", "wrapped")
    ),
    "eval_packing": Answer("remove it: packing does not change results", (None, False, True)),
    "shuffle_dataset": Answer("remove it: rows are shuffled in every epoch", (None, False, True)),
}


def value_here(name: str, value: Any) -> Any:
    """The option's value in fastdpo: TRL's boolean `packing` becomes "auto"; packing never changes the loss."""
    return "auto" if name == "packing" and isinstance(value, bool) else value


def refusal(name: str, value: Any) -> str | None:
    """The error message for the value, or None if the value asks for nothing."""
    entry = ANSWERED[name]
    if any(value == off and type(value) is type(off) for off in entry.off):
        return None
    return f"{name} is not an option of fastdpo, got {value!r}; instead: {entry.instead.format(value=value)}"
