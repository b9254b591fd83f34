"""Small problems for the head op, and plain PyTorch's answers in the same dtype or in fp64.

In: a shape, a dtype, a device. Out: inputs, and comparable `Answer`s in fp64. This module does not use `fastdpo.ops`,
because its answers are the standard for that code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.types import IGNORE_INDEX, TokenLogps

HIDDEN, WEIGHT, BIAS = "hidden_states", "lm_head_weight", "bias"
Answer = dict[str, Tensor]  # "log-probs" and "grad ...", in fp64
Op = Callable[..., TokenLogps]  # called like linear_logps


@dataclass(frozen=True)
class Shape:
    """T rows, H hidden size, V vocabulary."""

    rows: int
    hidden: int
    vocab: int

    def __post_init__(self) -> None:
        for name in ("rows", "hidden", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Problem:
    """One call of the head op, and the upstream gradient of its result."""

    floats: dict[str, Tensor]  # hidden_states (T, H), lm_head_weight (V, H), maybe bias (V,)
    labels: Tensor  # (T,) int64
    upstream: Tensor  # (T,) fp32, dL / dlogps
    settings: dict[str, Any] = field(default_factory=dict)  # logit_scale, softcap

    def double(self) -> Problem:
        return replace(self, floats={name: x.double() for name, x in self.floats.items()})

    def call(self, op: Op, floats: dict[str, Tensor] | None = None, **more: Any) -> TokenLogps:
        args = dict(self.floats if floats is None else floats)
        return op(args.pop(HIDDEN), args.pop(WEIGHT), self.labels, **args, **self.settings, **more)


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, has_bias: bool = False, seed: int = 0, **settings: Any
) -> Problem:
    """Logits with standard deviation 2. Every fifth label is ignored, every seventh is the most probable token."""
    g = torch.Generator().manual_seed(seed)
    T, H, V = shape.rows, shape.hidden, shape.vocab
    floats = {HIDDEN: torch.randn(T, H, generator=g), WEIGHT: torch.randn(V, H, generator=g) * 2 / H**0.5}
    if has_bias:
        floats[BIAS] = torch.randn(V, generator=g)
    floats = {name: x.to(device, dtype) for name, x in floats.items()}
    labels = torch.randint(V, (T,), generator=g).to(device)
    labels[-1] = V - 1  # the last column of the last tile
    problem = Problem(floats, labels, torch.randn(T, generator=g).to(device), settings)
    doubles = {name: x.double() for name, x in floats.items()}
    top = plain_logits(doubles.pop(HIDDEN), doubles.pop(WEIGHT), **doubles, **settings).argmax(-1)
    labels[2::7] = top[2::7]
    labels[1::5] = IGNORE_INDEX
    return problem


def plain_logits(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """(T, V) logits as in a training script: the matmul in the inputs' dtype, further operations in fp32 at least."""
    logits = torch.nn.functional.linear(hidden_states, lm_head_weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain(
    hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, outputs: Sequence[str] = (), **settings: Any
) -> TokenLogps:
    """Plain PyTorch in the inputs' dtype; for fp64 inputs, the exact result. Fills all statistics if any is wanted."""
    logits = plain_logits(hidden_states, lm_head_weight, **settings)
    keep = labels != IGNORE_INDEX
    column = labels.where(keep, 0)[:, None]
    all_logps = logits.log_softmax(-1)
    logps = all_logps.gather(-1, column)[:, 0].where(keep, 0.0)
    if not outputs:
        return TokenLogps(logps)
    with torch.no_grad():
        probs = all_logps.exp()
        return TokenLogps(
            logps,
            lse=logits.logsumexp(-1) * keep,
            entropy=torch.where(probs > 0, -probs * all_logps, 0.0).sum(-1) * keep,
            mean_logits=logits.mean(-1) * keep,
            is_top1=(logits.gather(-1, column)[:, 0] >= logits.amax(-1)) & keep,
            log_sum_sq_probs=(2 * all_logps).logsumexp(-1) * keep,
        )


def solve(op: Op, problem: Problem, wanted: Sequence[str] | None = None, **more: Any) -> Answer:
    """Log-probs by `op`, and the gradients with respect to `wanted` (all floats), converted to fp64."""
    wanted = list(problem.floats) if wanted is None else wanted
    floats = {name: x.detach().requires_grad_(name in wanted) for name, x in problem.floats.items()}
    logps = problem.call(op, floats, **more).logps
    grads = torch.autograd.grad((logps * problem.upstream).sum(), [floats[name] for name in wanted])
    values = {"log-probs": logps, **{f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}}
    return {name: value.detach().double() for name, value in values.items()}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Root mean square of the error, divided by that of the exact values."""
    error, size = (value.double() - exact).square().sum().sqrt(), exact.square().sum().sqrt()
    return float(error / size) if size > 0 else float(error)
