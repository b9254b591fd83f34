"""Checks and conversions of setting values that the configs share.

In: the name of a setting and its value, as a Python object or as text from a command line. Out: the value. Values that
cannot work are refused with ValueError, which names the setting, the rule and the value.
"""

from __future__ import annotations

import json
import math
from dataclasses import fields
from importlib import util
from typing import Any

import torch

from fastdpo.losses.checks import nearest_hint


def help_text(text: str) -> dict[str, str]:
    """A dataclass field's metadata, as HfArgumentParser reads it."""
    return {"help": text}


def check_choice(name: str, value: str, choices: tuple[str, ...] | list[str]) -> None:
    """Raises ValueError, with the nearest valid name, if `value` is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {sorted(choices)}, got {value!r}{nearest_hint(value, choices)}")


def as_dict(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """The dict, parsed from JSON if it is text."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be JSON, got {value!r}: {error}") from error
    if parsed is not None and not isinstance(parsed, dict):
        raise ValueError(f"{name} must be a JSON object, got {value!r}")
    return parsed


def with_torch_dtype(model_init_kwargs: Any) -> dict[str, Any]:
    """Arguments of from_pretrained with `dtype` as a torch.dtype. Also takes text, and the older name torch_dtype.

    Raises:
        ValueError: there is no such dtype, or both names are given.
    """
    options = dict(model_init_kwargs or {})
    if "torch_dtype" in options:
        if "dtype" in options:
            raise ValueError("model_init_kwargs must hold either dtype or torch_dtype (its older name), got both")
        options["dtype"] = options.pop("torch_dtype")
    dtype = options.get("dtype")
    if isinstance(dtype, str) and dtype != "auto":
        options["dtype"] = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(options["dtype"], torch.dtype):
            raise ValueError(f"model_init_kwargs must hold a torch dtype or 'auto' as dtype, got {dtype!r}")
    return options


def parse_max_memory(value: dict[Any, Any] | str | None) -> dict[Any, Any] | None:
    """Maximum bytes per device: `cpu`, or the number of a GPU.

    Raises:
        ValueError: a device or an amount is not valid.
    """
    from accelerate.utils import convert_file_size_to_int

    limits = as_dict("ref_max_memory", value)
    if limits is None:
        return None
    parsed: dict[Any, int] = {}
    for device, amount in limits.items():
        name = int(device) if str(device).isdigit() else device
        if not isinstance(name, int) and name not in ("cpu", "mps", "xpu"):
            raise ValueError(f"ref_max_memory must name GPUs by number, or 'cpu', got {device!r}")
        try:
            parsed[name] = convert_file_size_to_int(amount)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"ref_max_memory must hold amounts like '20GiB', got {amount!r}") from error
    return parsed


def count_or_auto(name: str, value: int | str | None) -> int | str | None:
    """A number of tokens, "auto" or None; also takes them as text from a command line."""
    if isinstance(value, str) and value.lower() in ("none", "null", "auto"):
        return "auto" if value.lower() == "auto" else None
    if isinstance(value, str) and value.isdigit():
        value = int(value)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name} must be an integer >= 1, 'auto' or None, got {value!r}")
    return value


def check_count(name: str, value: Any, *, least: int = 1, optional: bool = False) -> None:
    """Raises ValueError if `value` is not an integer >= `least`. If it is optional, None is valid too."""
    if not (optional and value is None) and (type(value) is not int or value < least):
        raise ValueError(f"{name} must be an integer >= {least}{' or None' if optional else ''}, got {value!r}")


def check_number(name: str, value: Any, *, least: float) -> None:
    """Raises ValueError if `value` is not a finite number >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{name} must be a finite number >= {least}, got {value!r}")


def check_steps(args: Any) -> None:
    """Raises ValueError if no step would run: such a run would save an untrained model."""
    if args.max_steps != -1:
        if type(args.max_steps) is not int or args.max_steps < 1:
            raise ValueError(f"max_steps must be an integer >= 1, or -1 for num_train_epochs, got {args.max_steps!r}")
        return
    check_number("num_train_epochs", args.num_train_epochs, least=0.0)
    if args.num_train_epochs == 0:
        raise ValueError("num_train_epochs must be > 0, got 0; to evaluate a model without training call evaluate()")


def check_order_of_rows(args: Any) -> None:
    """Raises ValueError for orders that exclude each other, and for one that has another name in fastdpo."""
    if args.regroup_dataset and args.length_bucketing:
        raise ValueError("regroup_dataset and length_bucketing must not both be set: each sets the order of the rows")
    strategy = args.train_sampling_strategy
    if strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy must be 'random' or 'sequential', got {strategy!r}; to build each step from rows"
            " of similar length, set length_bucketing"
        )
    if strategy != "random" and (args.regroup_dataset or args.length_bucketing):
        name = "regroup_dataset" if args.regroup_dataset else "length_bucketing"
        raise ValueError(f"train_sampling_strategy must be 'random' if {name} is set, got {strategy!r}")


def check_packing_settings(args: Any) -> None:
    """Raises ValueError for settings that contradict `packing`."""
    if args.padding_free and args.packing == "padded":
        raise ValueError("padding_free must be False if packing is 'padded', got True: they contradict each other")
    if args.neftune_noise_alpha is not None and args.packing != "padded":
        raise ValueError(
            f"neftune_noise_alpha must be None unless packing is 'padded', got {args.neftune_noise_alpha}: NEFTune"
            " scales its noise by the length of a row, and a packed row holds many sequences"
        )


def check_sequence_parallel_settings(args: Any) -> None:
    """Raises ValueError for settings that cannot work if several processes compute each packed row together."""
    for name in ("sp_size", "cp_size"):
        size = getattr(args.parallelism_config, name, None) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config must leave {name} at 1, got {size}: its attention does not know packed rows; set"
                f" sequence_parallel_size={size}"
            )
    if args.sequence_parallel_size == 1:
        return
    size = args.sequence_parallel_size
    refused = {
        "packing": (args.packing == "padded", "only a packed row is divided; use packing='auto'"),
        "attention_backend": (args.attention_backend == "mask", "its mask covers the whole row; use 'auto'"),
        "max_tokens_per_microbatch": (
            args.max_tokens_per_microbatch == "auto",
            "processes would measure different limits; give a number",
        ),
        "on_oversized_row": (args.on_oversized_row == "split", "processes share every row already; use 'alone'"),
        "torch_compile": (bool(args.torch_compile), "attention communicates; turn it off"),
        "deepspeed": (bool(args.deepspeed), "this is untested; use FSDP2 or DDP"),
        "tensor_parallel_size": (args.tensor_parallel_size > 1, "this is untested; use one of both"),
    }
    for name, (is_set, why) in refused.items():
        if is_set:
            raise ValueError(f"{name} must not be {getattr(args, name)!r} with sequence_parallel_size={size}: {why}")


def check_oversized_row(args: Any) -> None:
    """Raises ValueError if rows are to run in parts, and a second forward would not repeat the first."""
    if args.on_oversized_row != "split":
        return
    for name, off, what in (("disable_dropout", True, "dropout"), ("neftune_noise_alpha", None, "NEFTune's noise")):
        if getattr(args, name) != off:
            raise ValueError(
                f"{name} must be {off} if on_oversized_row is 'split', got {getattr(args, name)!r}: {what} gives the"
                " second forward of a row other log-probs than the first"
            )


def check_trainer_settings(args: Any) -> None:
    """Raises ValueError for settings of transformers' Trainer that fastdpo cannot honour, and for values outside the
    choices that only transformers' command-line parser would check."""
    for f in fields(args):
        choices, value = f.metadata.get("choices"), getattr(args, f.name)
        if choices is not None and value != f.default and value not in choices:
            raise ValueError(f"{f.name} must be one of {sorted(choices)}, got {value!r}")
    for name in ("logging_steps", "eval_steps", "save_steps"):
        value = getattr(args, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number of steps, or a share of the run below 1, got {value}")
    if args.deepspeed and util.find_spec("deepspeed") is None:
        raise ValueError(
            "deepspeed must be None if the deepspeed package is not installed, got a config: pip install"
            " 'fastdpo[deepspeed]'"
        )
    counted = (True, False, "all", "non_padding", "no")
    if args.include_num_input_tokens_seen not in counted:
        raise ValueError(
            f"include_num_input_tokens_seen must be one of {counted}, got {args.include_num_input_tokens_seen!r}"
        )
    if args.logging_nan_inf_filter:
        raise ValueError("logging_nan_inf_filter must be False: it would hide a loss that is not finite, got True")
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: it smooths token labels, which the"
            " head op does not support; for flipped preference labels use label_smoothing"
        )


def load_whole_models() -> None:
    """Keeps from_pretrained from dividing models under DeepSpeed's stage 3: the self-check and the reference read their
    weights before DeepSpeed divides them. Trainer tells transformers about the stage more than once."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def resolve_checkpointing(args: Any, default: bool) -> None:
    """Sets gradient_checkpointing and activation_checkpointing (its name since transformers 5.23) to the same value.

    Both get a value, so that transformers warns about neither.

    Args:
        default: the value if neither is given.
    Raises:
        ValueError: the two names have different values.
    """
    names = [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(args, name)]
    asked = {getattr(args, name) for name in names} - {None}
    if len(asked) > 1:
        raise ValueError(
            "gradient_checkpointing and activation_checkpointing must not differ, because they name the same setting,"
            f" got {args.gradient_checkpointing!r} and {args.activation_checkpointing!r}"
        )
    for name in names:
        setattr(args, name, asked.copy().pop() if asked else default)


def offload_checkpoints(args: Any, on_gpu: bool) -> None:
    """Translates TRL's activation_offloading into transformers' `offload` option of gradient checkpointing.

    Raises:
        ValueError: the run is on a CPU, gradient checkpointing is off, or transformers is older than 5.23.
    """
    if not hasattr(args, "activation_checkpointing_kwargs"):
        raise ValueError("activation_offloading must be False with transformers before 5.23, got True: upgrade it")
    if not on_gpu:
        raise ValueError("activation_offloading must be False on a CPU, got True: they are in the CPU's memory already")
    if not args.gradient_checkpointing:
        raise ValueError(
            "activation_offloading must be False without gradient_checkpointing, got True: it moves the activations"
            " that checkpointing keeps"
        )
    name = "activation_checkpointing_kwargs"  # gradient_checkpointing_kwargs is its older name
    given = args.gradient_checkpointing_kwargs if getattr(args, name) is None else getattr(args, name)
    args.activation_checkpointing_kwargs = {**(as_dict(name, given) or {}), "offload": True}
