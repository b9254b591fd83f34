"""Command lines and YAML files to dataclasses: generated from the fields, grouped for reading, nearest name on a typo.

transformers.HfArgumentParser makes the options. A YAML file gives defaults and flags override it.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

import yaml
from transformers import HfArgumentParser, TrainingArguments

from fastdpo.cli.parser import RaisesErrors
from fastdpo.training.config_checks import help_text
from fastdpo.training.trl_names import line_instead


@dataclass
class RunArguments:
    """Which model on which data: what a config of the trainer does not say."""

    model: str = field(metadata=help_text("Model to train: a local directory or a name on the Hub. Required."))
    dataset: str = field(
        metadata=help_text(
            "Training data: a .json, .jsonl (also .gz) or .parquet file, a directory, or a name. Required."
        )
    )
    dataset_config: str | None = field(
        default=None,
        metadata=help_text(
            "Configuration (subset) of a named dataset; also of eval_dataset where that has the same name."
        ),
    )
    dataset_split: str = field(default="train", metadata=help_text("Split of a named dataset."))
    dataset_streaming: bool = field(
        default=False, metadata=help_text("Read the data as the run goes, in its own order; max_steps is needed.")
    )
    eval_dataset: str | None = field(default=None, metadata=help_text("Evaluation data, in the same forms."))
    eval_split: str = field(default="test", metadata=help_text("Split of a named evaluation dataset."))
    eval_fraction: float = field(
        default=0.05,
        metadata=help_text(
            "Share of the training data held out for evaluation where no eval_dataset is given and the data is no"
            " stream; 0 for none."
        ),
    )
    overwrite_output_dir: bool = field(default=False, metadata=help_text("Let output_dir hold another run already."))

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in [0, 1), got {self.eval_fraction}")


@dataclass
class LoraArguments:
    """LoRA and quantization of the base model."""

    use_peft: bool = field(default=False, metadata=help_text("Train a LoRA adapter in place of the model's weights."))
    lora_r: int = field(default=16, metadata=help_text("Rank of the adapter."))
    lora_alpha: int = field(
        default=32, metadata=help_text("Scale of the adapter: its product is multiplied by alpha / r.")
    )
    lora_dropout: float = field(default=0.0, metadata=help_text("Dropout on the adapter's input."))
    lora_target_modules: list[str] | None = field(
        default=None, metadata=help_text("Layers that get an adapter. Default: every linear layer but the head.")
    )
    load_in_4bit: bool = field(default=False, metadata=help_text("QLoRA: base weights in 4 bits (bitsandbytes)."))

    def __post_init__(self) -> None:
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("load_in_4bit must go with use_peft: 4-bit weights cannot be trained themselves")
        changed = [f.name for f in fields(self) if f.name.startswith("lora_") and getattr(self, f.name) != f.default]
        if changed and not self.use_peft:
            raise ValueError(f"{changed[0]} must go with use_peft: without it all weights are trained")


@dataclass
class AdapterArguments(LoraArguments):
    """What a preference run may have beside the trained model: an adapter on it, and another reference."""

    ref_model: str | None = field(
        default=None, metadata=help_text("Reference model; default: the start of the trained one.")
    )


# Options in the order in which people look for them; what no group names is shown under "everything else".
GROUPS = {
    "model and data": "model dataset output_dir config dataset_config dataset_split dataset_streaming eval_dataset"
    " eval_split eval_fraction max_length max_prompt_length truncation_mode on_bad_row dataset_format dataset_num_proc"
    " pad_token model_init_kwargs trust_remote_code disable_dropout",
    "preference optimization": "beta loss_type loss_weights label_smoothing f_divergence_type f_alpha_divergence_coef"
    " ld_alpha use_weighting discopop_tau gamma_beta_ratio cpo_alpha",
    "reference": "reference ref_model reference_free precompute_ref_log_probs precompute_ref_batch_size ref_cache_dir"
    " ref_max_memory ref_tokens_per_batch sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "steps": "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps"
    " lr_scheduler_type warmup_steps weight_decay max_grad_norm optim seed router_aux_loss_coef regroup_dataset"
    " length_bucketing",
    "engine and memory": "max_tokens_per_microbatch on_oversized_row packing padding_free pad_to_multiple_of"
    " prefix_sharing attention_backend impl skip_tolerance workspace_bytes token_metrics bf16 fp16"
    " gradient_checkpointing activation_offloading use_peft lora_r lora_alpha lora_dropout lora_target_modules"
    " load_in_4bit use_cpu",
    "evaluation and logging": "eval_strategy eval_steps per_device_eval_batch_size report_to run_name logging_steps"
    " num_eval_samples eval_sample_tokens eval_sample_temperature training_warnings disable_tqdm",
    "saving": "save_strategy save_steps save_total_limit resume_from_checkpoint overwrite_output_dir",
}


def parse(
    command: str, dataclass_types: Sequence[type], argv: Sequence[str], *, shown: Sequence[str] | None = None
) -> list[Any]:
    """One object for each dataclass, from `--config FILE.yaml` (or .json) and flags, which override it.

    Args:
        shown: the options that --help lists, of a command that takes those of `fastdpo train` and reads some of them.
    Raises:
        ValueError: an unknown option or key (with the nearest valid name), a missing one, or an unreadable file.
    """
    output = "" if shown else " --output_dir DIR"
    usage = f"fastdpo {command} --model MODEL --dataset DATASET{output} [--config FILE] [options]"
    parser = _Parser(dataclass_types, prog=f"fastdpo {command}", usage=usage, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it.")
    actions = [action for action in parser._actions if action.dest != "help"]
    _improve(actions)
    _group(parser, actions)
    if shown is not None:
        parser.epilog = "all options of `fastdpo train` are taken, also in FILE; those not listed here have no effect"
        for action in actions:
            action.help = action.help if action.dest in shown else argparse.SUPPRESS
    names = sorted({action.dest for action in actions})
    for argument in argv:
        option = argument.split("=", 1)[0]
        if option.startswith("--") and option not in parser._option_string_actions:
            raise ValueError(_unknown(option, names, "option"))
    config_path = _option(argv, "--config")
    if config_path is not None:
        values = _read_config(config_path, actions)
        parser.set_defaults(**values)
        for action in actions:
            action.required = action.required and action.dest not in values
    *parsed, rest = parser.parse_args_into_dataclasses(
        list(argv), return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(f"every value must follow an option, got {rest[0]!r}")
    return [value for value in parsed if not isinstance(value, argparse.Namespace)]


class _Parser(RaisesErrors, HfArgumentParser):
    """HfArgumentParser that raises in place of exiting, and takes lists with commas."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """argparse's; the items of a list may also be parted by commas."""
        if action.nargs == "+":
            arg_strings = [item.strip() for text in arg_strings for item in text.split(",") if item.strip()]
        return super()._get_values(action, arg_strings)  # type: ignore[misc]


def _improve(actions: Sequence[argparse.Action]) -> None:
    """What HfArgumentParser leaves open: a required output_dir, none as a number, JSON, what --no_... options mean."""
    for action in actions:
        if action.dest == "output_dir":
            action.required = True
            action.help = "Where checkpoints and the trained model are saved. Required."
        if (action.type in (int, float) and action.default is None) or action.dest == "max_length":
            action.type = _or_none(action.type)
        if get_origin(action.type) is dict:
            action.type = _or_none(_json_object)
        if action.option_strings[0].startswith("--no_"):
            action.help = f"Turns --{action.dest} off, which is on by default."
            action.default = argparse.SUPPRESS


def _or_none(kind: Any) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    convert.__name__ = getattr(kind, "__name__", "number").strip("_").replace("_", " ")  # argparse: invalid ... value
    return convert


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def _group(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action]) -> None:
    """Moves the options into GROUPS, which argparse only does for options that are added in groups."""
    of_transformers = {f.name for f in fields(TrainingArguments)}
    named = {name: title for title, names in GROUPS.items() for name in names.split()}
    members: dict[str, list[argparse.Action]] = {title: [] for title in GROUPS}
    for action in actions:
        rest = "transformers.TrainingArguments" if action.dest in of_transformers else "fastdpo"
        members.setdefault(named.get(action.dest, f"everything else of {rest}"), []).append(action)
    order = {name: position for position, name in enumerate(named)}
    parser._action_groups.clear()
    for title, group in members.items():
        if group:
            group.sort(key=lambda action: order.get(action.dest, 0))
            parser.add_argument_group(title)._group_actions.extend(group)


def _option(argv: Sequence[str], name: str) -> str | None:
    for position, argument in enumerate(argv):
        if argument == name:
            if position + 1 == len(argv):
                raise ValueError(f"{name} must be followed by a file")
            return argv[position + 1]
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return None


def _read_config(path: str, actions: Sequence[argparse.Action]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"config must be an existing file, got {path!r}")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {path} must hold one option per line as `name: value`, got {type(values).__name__}")
    known = {action.dest: action for action in actions}
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"config {path}: " + _unknown(str(key), list(known), "key"))
        choices = known[name].choices
        if choices is not None and value is False and "no" in choices:  # YAML reads a bare `no` as false
            value = "no"
        if choices is not None and value not in choices:
            raise ValueError(f"config {path}: {name} must be one of {sorted(choices)}, got {value!r}")
        result[name] = _as_if_typed(name, value, known[name])
    return result


def _as_if_typed(name: str, value: Any, action: argparse.Action) -> Any:
    """A YAML value as the text that a command line would hold, so that one set of types and checks serves both."""
    if value is None:
        return None
    if action.nargs in ("+", "*"):
        return _items(name, value, action.type or str)
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        raise ValueError(f"config: {name} must be one value, got {value!r}")
    return str(value)


def _items(name: str, value: Any, kind: Any) -> list[Any]:
    """A list as YAML or a command line writes it; argparse leaves the items of defaults as they are."""
    items = value if isinstance(value, list) else str(value).split(",")
    try:
        return [kind(str(item).strip()) for item in items]
    except ValueError as error:
        raise ValueError(f"config: {name} must be a list of {kind.__name__}, got {value!r}") from error


def _unknown(name: str, valid: Sequence[str], kind: str) -> str:
    plain = name.split("=")[0].lstrip("-").replace("-", "_")
    nearest = difflib.get_close_matches(plain, valid, n=1)
    prefix = "--" if kind == "option" else ""
    instead = line_instead(plain)
    if instead is not None:
        return f"{kind} {name!r} is not there any more; instead, as Python has it: {instead}"
    return f"unknown {kind} {name!r}" + (f"; did you mean '{prefix}{nearest[0]}'?" if nearest else "")
