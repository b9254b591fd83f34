"""What the options of other projects are called here: TRL's scripts and its SFTConfig, and the alignment-handbook.

In: a name that is no option of fastdpo, and its value. Out: our options and their values, or variables of the
environment. Refuses, with the line to write, what has no counterpart. TRL's own former settings are in
`fastdpo.training.settings.trl_names`, and several sets of data in `mixtures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# The same option by another name.
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

# Variables of the environment, which the libraries behind them read.
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


# Options whose value here is another one: value -> our options.
COMPUTED: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "use_flash_attention_2": _attention,
    "gradient_checkpointing_use_reentrant": lambda value: (
        {} if value is None else {"gradient_checkpointing_kwargs": {"use_reentrant": value}}
    ),
    "truncation_side": _truncation,
}


@dataclass(frozen=True)
class Answer:
    """Of an option that does not exist here."""

    instead: str  # the line to write, or why there is none
    off: tuple[Any, ...] = (None, False)  # values that ask for what is done here anyway: left out without a word


ANSWERED: Mapping[str, Answer] = {
    "model_code_revision": Answer('--model_init_kwargs \'{{"code_revision": "{value}"}}\'', (None, "main")),
    "base_model_revision": Answer("download the base model of that revision, and name its folder by --model"),
    "text_column": Answer("a column called text: dataset.rename_column('{value}', 'text')", (None, "text")),
    "dataset_text_field": Answer("a column called text: dataset.rename_column('{value}', 'text')", (None, "text")),
    "auto_insert_empty_system_msg": Answer(
        "a chat template that writes the empty system message: --chat_template FILE.jinja"
    ),
    "system_prompt": Answer("a first message of the role system in the rows' prompts"),
    "eos_token": Answer("a tokenizer that was saved with that eos_token: --tokenizer FOLDER"),
    "benchmarks": Answer("an evaluation after the run: nothing is benchmarked here", (None, False, [])),
    "callbacks": Answer("DPOTrainer(callbacks=[...]) in Python", (None, False, [])),
    "overwrite_hub_revision": Answer("--hub_revision NAME, a branch of its own"),
    "push_to_hub_revision": Answer("--push_to_hub true --hub_revision NAME"),
    "sanity_check": Answer("--max_steps 10"),
    "dataset_kwargs": Answer("nothing: rows are prepared here by their format", (None, {})),
    "completion_only_loss": Answer(
        "rows of one column, text: all tokens of such rows count, of others those of responses", (None, True)
    ),
    "assistant_only_loss": Answer(
        "rows of one column, text: all tokens of such rows count, of conversations those of the assistant", (None, True)
    ),
    "loss_type": Answer("loss_type: nll, the only loss of SFT here", (None, "nll", "chunked_nll")),  # of SFTConfig
    "packing_strategy": Answer("nothing: rows are packed whole", (None, "bfd", "bfd_split", "bfd-requeue", "wrapped")),
    "eval_packing": Answer("nothing: packing changes no number", (None, False, True)),
    "shuffle_dataset": Answer("nothing: rows are shuffled in every epoch", (None, False, True)),
}


def value_here(name: str, value: Any) -> Any:
    """TRL's `packing` of SFT is on or off; rows are packed here either way, and the loss is the same."""
    return "auto" if name == "packing" and isinstance(value, bool) else value


def refusal(name: str, value: Any) -> str | None:
    """The end of a refusal, or None where the value asks for nothing."""
    entry = ANSWERED[name]
    if any(value == off and type(value) is type(off) for off in entry.off):
        return None
    return f"{name} is no option here, got {value!r}; instead: {entry.instead.format(value=value)}"
