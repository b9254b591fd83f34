"""fp64 throughout: a model in, its copy in fp64 out, and a mode in which nothing in it is computed in fp32.

In fp64 a leak between sequences is as large as in fp32 and rounding is nine digits smaller, so that no mistake hides in
rounding and no rounding looks like a mistake.
"""

from __future__ import annotations

import copy
from typing import Any

import torch


def in_fp64(model: Any) -> Any:
    """A copy, whose experts are multiplied one by one: grouped products know no fp64."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return twin


class WholeDoubles(torch.overrides.TorchFunctionMode):
    """fp64 for whatever a model in fp64 computes in fp32 all the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        if func in (torch.Tensor.to, torch.Tensor.type):
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)
