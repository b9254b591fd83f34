"""The memory of an optimizer's state and step, by transformers' name, and the package that provides the optimizer.

In: the name (`optim`) and the trained parameters. Out: bytes, or the missing package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Bytes of state per parameter, if it is not two moments in the parameter's dtype; the first match counts.
_STATE_BYTES = {
    "paged": 0.0,  # in host memory if the device is full
    "adafactor": 0.0,  # a row and a column for each matrix
    "lomo": 0.0,
    "schedule_free_sgd": 4.0,
    "sgd": 0.0,  # without momentum, as transformers makes it
    "galore": 0.0,  # low-rank
    "apollo": 0.0,
    "ademamix_8bit": 3 + 12 / 256,  # three moments
    "ademamix": 12.0,
    "lion_8bit": 1 + 4 / 256,
    "rmsprop_bnb_8bit": 1 + 4 / 256,
    "adamw_torch_4bit": 1 + 8 / 128,
    "8bit": 2 + 8 / 256,  # two moments of a byte, and an fp32 scale for each block of 256
    "lion": 4.0,
    "rmsprop": 4.0,
    "adagrad": 4.0,
}

# Part of the name -> the module that transformers imports, and its pip package; the first match counts.
_PACKAGES = {
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "bnb": ("bitsandbytes", "fastdpo[quant]"),
    "paged": ("bitsandbytes", "fastdpo[quant]"),
    "lion": ("bitsandbytes", "fastdpo[quant]"),
    "ademamix": ("bitsandbytes", "fastdpo[quant]"),
    "adamw_8bit": ("bitsandbytes", "fastdpo[quant]"),
}


def optimizer_name(args: Any) -> str:
    """`args.optim` as text; it may be transformers' enum."""
    return str(getattr(args.optim, "value", args.optim))


def check_optimizer_package(name: str) -> None:
    """Raises:
    ValueError: `optim=name` needs a package that is not installed.
    """
    module, package = next((found for part, found in _PACKAGES.items() if part in name), (None, ""))
    if module is not None and importlib.util.find_spec(module) is None:
        raise ValueError(f'optim={name!r} needs {module}, which is not installed: pip install "{package}"')


def trained_parameters(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    """The parameters of the optimizer, and whether each is an embedding."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [(p, id(p) in embeddings) for p in model.parameters() if p.requires_grad]


def optimizer_state_bytes(
    name: str, trained: Iterable[tuple[nn.Parameter, bool]], weight_rounding: str = "nearest"
) -> int:
    """Bytes of the state of `optim=name` on the device after its first step.

    Args:
        trained: the parameters, and whether each is an embedding (bitsandbytes keeps their moments in fp32).
        weight_rounding: see `updates/rounding.py`; with any but "nearest" the optimizer sees bf16 weights in fp32.
    """
    per_parameter = next((size for part, size in _STATE_BYTES.items() if part in name), None)
    total = 0.0
    for parameter, is_embedding in trained:
        is_rounded = _is_rounded(parameter, weight_rounding)
        if is_rounded and weight_rounding == "kahan":
            total += 2 * parameter.numel()
        if per_parameter is None:
            total += 2 * parameter.numel() * (4 if is_rounded else parameter.element_size())
        elif name == "adafactor" and parameter.dim() >= 2:
            total += 4 * (parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2])
        elif name == "adafactor":
            total += 4 * parameter.numel()
        elif "8bit" in name and "paged" not in name and "torch" not in name and (is_embedding or _is_small(parameter)):
            total += (12 if "ademamix" in name else 8 if "adam" in name else 4) * parameter.numel()
        else:
            total += per_parameter * parameter.numel()
    return int(total)


def _is_small(parameter: nn.Parameter) -> bool:
    return parameter.numel() < 4096  # bitsandbytes' min_8bit_size


def _is_rounded(parameter: nn.Parameter, weight_rounding: str) -> bool:
    return weight_rounding != "nearest" and parameter.dtype == torch.bfloat16


def optimizer_step_bytes(
    name: str, trained: Iterable[nn.Parameter], on_gpu: bool, *, one_by_one: bool = False, weight_rounding: str = ""
) -> int:
    """Temporary bytes of the optimizer's step: torch's multi-tensor loop on a GPU holds a root for every parameter
    (`adamw_torch`), Adafactor holds the update of one parameter at a time, twice.

    Args:
        one_by_one: whether one weight at a time is updated.
    """
    if one_by_one:
        return max((update_bytes(name, p, weight_rounding) for p in trained), default=0)
    sizes = [4 * p.numel() for p in trained]
    if name == "adafactor":
        return 2 * max(sizes, default=0)
    is_foreach = on_gpu and name in ("adamw_torch", "adagrad", "rmsprop")
    return sum(sizes) if is_foreach else 0 if _has_no_scratch(name) else max(sizes, default=0)


def update_bytes(name: str, parameter: nn.Parameter, weight_rounding: str) -> int:
    """Temporary bytes of the update of one weight (`updates/one_by_one.py`), without its gradient."""
    scratch = 0 if _has_no_scratch(name) else 8 if name == "adafactor" else 4
    if not _is_rounded(parameter, weight_rounding):
        return scratch * parameter.numel()
    # weight and gradient in fp32 for the update; then the weight, what rounds it, and the rounded weight
    return max(8 + scratch, 12) * parameter.numel()


def _has_no_scratch(name: str) -> bool:
    return "fused" in name or "bnb" in name
