"""Refuses what cannot update weights one at a time, or in backward.

In: the settings of a run, and its model. Out: nothing, or a ValueError that names the setting and the remedy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# optimizers whose update of a weight depends on that weight alone, by their names in transformers
ONE_BY_ONE = (
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw", "paged_adamw_32bit", "paged_adamw_8bit", "rmsprop_bnb_8bit"),
    *("lion", "lion_32bit", "lion_8bit", "paged_lion", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb_32bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
)


def updates_one_by_one(args: Any) -> bool:
    """Whether the run's optimizer updates one weight at a time."""
    return args.weight_rounding != "nearest" or args.optimizer_in_backward


def check_updates(args: Any, optim: str, *, is_own: bool) -> None:
    """Checks the settings.

    Args:
        optim: transformers' name of the optimizer.
        is_own: whether the user gives an optimizer, which need not be `optim`.
    Raises:
        ValueError: a setting excludes another.
    """
    if not updates_one_by_one(args):
        return
    check_engine(args, "DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else "")
    if not is_own and optim not in ONE_BY_ONE:
        name, _ = _setting(args)
        raise ValueError(
            f"optim must be one of {sorted(ONE_BY_ONE)} with {name}={getattr(args, name)!r}, got {optim!r}, which does"
            " not update weights independently of each other"
        )
    if args.optimizer_in_backward:
        _check_in_backward(args)


def check_engine(args: Any, engine: str) -> None:
    """
    Args:
        engine: that updates the weights by itself; empty for none. It may come from the settings of accelerate.
    Raises:
        ValueError: it cannot update weights one at a time.
    """
    if engine and updates_one_by_one(args):
        name, off = _setting(args)
        raise ValueError(
            f"{name} must be {off} with {engine}, which updates its own shards of weights, got {getattr(args, name)!r}"
        )


def _setting(args: Any) -> tuple[str, str]:
    """The setting that updates weights one at a time, and its default, as text."""
    return ("optimizer_in_backward", "False") if args.optimizer_in_backward else ("weight_rounding", "'nearest'")


def _check_in_backward(args: Any) -> None:
    steps = args.gradient_accumulation_steps
    if steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps must be 1 with optimizer_in_backward, got {steps}: a weight is updated in the"
            " first backward, and its gradient dropped; set per_device_train_batch_size to"
            f" {steps * args.per_device_train_batch_size}, or leave optimizer_in_backward off"
        )
    if args.max_tokens_per_microbatch is not None:
        raise ValueError(
            "max_tokens_per_microbatch must be None with optimizer_in_backward, got"
            f" {args.max_tokens_per_microbatch!r}: a weight is updated in the first backward, and its gradient dropped;"
            " lower per_device_train_batch_size"
        )
    if args.world_size > 1:
        raise ValueError(
            f"optimizer_in_backward must be False on {args.world_size} processes, got True: gradients are summed over"
            " processes after they are whole; shard the weights instead, with --fsdp or DeepSpeed"
        )
    if args.fp16:
        raise ValueError(
            "fp16 must be False with optimizer_in_backward, got True: the gradient scaler looks at all gradients before"
            " a weight may change; use bf16"
        )


def check_rounded_weights(args: Any, model: nn.Module) -> None:
    """
    Raises:
        ValueError: weight_rounding is set, and no trained weight is rounded.
    """
    if args.weight_rounding == "nearest":
        return
    if any(type(p.data) is not Tensor for p in model.parameters() if p.requires_grad):
        check_engine(args, "tensor parallelism")
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if dtypes and torch.bfloat16 not in dtypes:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(
            f"weight_rounding must be 'nearest' for weights in {found}, got {args.weight_rounding!r}: it rounds updates"
            " to bf16; load the model with model_init_kwargs={'dtype': 'bfloat16'}"
        )
