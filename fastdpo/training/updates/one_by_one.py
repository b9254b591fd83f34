"""An optimizer that updates one weight at a time, in fp32, and rounds it to bf16 as it is told.

In: any torch optimizer that treats its parameters independently (AdamW, bitsandbytes' 8-bit and paged ones, Adafactor,
SGD, Lion). It sees an fp32 copy of a bf16 weight and of its gradient, for the time of that weight's update, so its
moments are those of fp32 weights, in its own precision. Out: the same weights, updated. State dicts are those of the
inner optimizer, which they also restore without rounding the moments to the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.training.updates.rounding import generator_of, round_stochastically, split_in_two

_REMAINDER = "rounded_off"  # of a weight's state, with kahan
_UPDATES = "num_updates"  # of a weight's state


class OneByOne(torch.optim.Optimizer):
    """Wraps `inner`, whose groups and state it shares.

    Args:
        rounding: one of ROUNDINGS, for bf16 weights; weights of other dtypes are updated as `inner` does.
        seed: of the stochastic rounding.
    """

    def __init__(self, inner: torch.optim.Optimizer, rounding: str = "nearest", seed: int = 0) -> None:
        self.inner, self.rounding, self.seed = inner, rounding, seed
        self.numbers = {p: number for number, p in enumerate(self.parameters())}

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights, in the order of the groups."""
        return (p for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Updates every weight that has a gradient, and drops the gradients."""
        assert closure is None, "an optimizer of fastdpo's trainers takes no closure"
        waiting = []
        for parameter in self.parameters():
            if parameter.grad is not None:
                waiting.append((parameter, parameter.grad))
                parameter.grad = None
        while waiting:
            parameter, grad = waiting.pop()
            self.update(parameter, grad)
            del grad

    @torch.no_grad()
    def update(self, parameter: nn.Parameter, grad: Tensor, factor: Tensor | None = None) -> None:
        """Updates one weight; no other weight may have a gradient at this time.

        Args:
            factor: () fp32, multiplies the gradient.
        """
        is_rounded = self.rounding != "nearest" and parameter.dtype == torch.bfloat16
        if is_rounded:
            grad = grad.float()
        if factor is not None:
            grad = grad * factor.to(grad.dtype)
        if not is_rounded:
            parameter.grad = grad
            self.inner.step()
            parameter.grad = None
            return
        low, state = parameter.data, self.inner.state.get(parameter, {})
        remainder, num_updates = state.pop(_REMAINDER, None), state.pop(_UPDATES, 0)
        exact = low.float()
        if remainder is not None:
            exact += remainder
        parameter.data, parameter.grad = exact, grad
        del grad
        try:
            self.inner.step()
        finally:
            parameter.grad = None
            exact, parameter.data = parameter.data, low
        state = self.inner.state[parameter]
        state[_UPDATES] = num_updates + 1
        if self.rounding == "kahan":
            nearest, state[_REMAINDER] = split_in_two(exact)
            low.copy_(nearest)
        else:
            generator = generator_of(low.device, self.seed, self.numbers[parameter], num_updates)
            low.copy_(round_stochastically(exact, generator))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts moments to the dtype of their weight: here to fp32."""
        with self._as_fp32():
            self.inner.load_state_dict(state_dict)
        for state in self.inner.state.values():
            if _REMAINDER in state:
                state[_REMAINDER] = state[_REMAINDER].to(torch.bfloat16)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)
        self.numbers = {p: number for number, p in enumerate(self.parameters())}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    @contextmanager
    def _as_fp32(self) -> Iterator[None]:
        """Gives weights that are rounded an empty fp32 tensor in place of their numbers."""
        rounded = [p for p in self.parameters() if p.dtype == torch.bfloat16] if self.rounding != "nearest" else []
        numbers = [p.data for p in rounded]
        for parameter in rounded:
            parameter.data = torch.empty(0, dtype=torch.float32, device=parameter.device)
        try:
            yield
        finally:
            for parameter, own in zip(rounded, numbers, strict=True):
                parameter.data = own
