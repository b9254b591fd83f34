"""Shapes, inputs and the one comparison by which every implementation of the head op is judged.

An implementation passes a case if its error against fp64 is at most twice that of plain PyTorch in the same dtype, for
the log-probs and for every gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.ops.head import Head
from fastdpo.ops.reference import reference_linear_logps
from fastdpo.types import IGNORE_INDEX

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    T: int
    H: int
    V: int
    dtype: torch.dtype
    has_bias: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None
    ignored: str = "some"  # "none", "some" or "all" rows
    logit_std: float = 2.0

    @property
    def id(self) -> str:
        parts = [f"T{self.T}-H{self.H}-V{self.V}-{NAMES[self.dtype]}"]
        parts += ["bias"] if self.has_bias else []
        parts += [f"scale{self.logit_scale}"] if self.logit_scale != 1 else []
        parts += [f"softcap{self.softcap}"] if self.softcap else []
        parts += [f"{self.ignored}-ignored"] if self.ignored != "some" else []
        return "-".join(parts)

    @property
    def settings(self) -> dict:
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}


CASES = [
    Case(67, 150, 257, FP32),
    Case(67, 150, 257, BF16),
    Case(67, 150, 257, FP16),
    Case(141, 72, 521, FP32, ignored="none"),
    Case(141, 72, 521, BF16),
    Case(600, 40, 19, BF16),  # every row of dW sums many terms
    Case(130, 200, 131, FP32, has_bias=True),
    Case(130, 200, 131, BF16, has_bias=True),
    Case(67, 40, 257, FP32, logit_scale=0.25, logit_std=8.0),
    Case(67, 40, 257, FP32, softcap=5.0),
    Case(67, 40, 257, BF16, softcap=5.0),
    Case(67, 40, 257, FP32, has_bias=True, logit_scale=1.5, softcap=4.0),
    Case(67, 40, 257, BF16, has_bias=True, logit_scale=1.5, softcap=4.0),
    Case(67, 40, 257, FP32, logit_std=30.0),  # one token has nearly all the probability
    Case(1, 16, 7, FP32, ignored="none"),
    Case(1, 150, 257, FP32, ignored="none"),
    Case(1, 150, 257, BF16, ignored="none"),
    Case(5, 8, 1, FP32),  # a vocabulary of one token: log-prob 0, no gradient
    Case(0, 40, 257, FP32),
    Case(0, 40, 257, BF16, has_bias=True),
    Case(67, 40, 257, FP32, has_bias=True, ignored="all"),
    Case(67, 40, 257, BF16, ignored="all"),
]


def make_inputs(case: Case, seed: int, device: str = "cpu") -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(hidden_states, lm_head_weight and maybe bias as leaves), labels, upstream gradient."""
    g = torch.Generator().manual_seed(seed)
    floats = {
        "hidden_states": torch.randn(case.T, case.H, generator=g),
        "lm_head_weight": torch.randn(case.V, case.H, generator=g) * case.logit_std / case.H**0.5,
    }
    if case.has_bias:
        floats["bias"] = torch.randn(case.V, generator=g)
    labels = torch.randint(0, case.V, (case.T,), generator=g)
    labels[-1:] = case.V - 1  # the last column of the last, ragged tile
    if case.ignored == "some":
        labels[1::5] = IGNORE_INDEX
    elif case.ignored == "all":
        labels[:] = IGNORE_INDEX
    leaves = {name: x.to(case.dtype).to(device).requires_grad_() for name, x in floats.items()}
    return leaves, labels.to(device), torch.randn(case.T, generator=g).to(device)


def plain_logps(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None) -> Tensor:
    """What a training script would write: logits in the model's dtype, softmax in fp32."""
    logits = torch.nn.functional.linear(hidden_states, lm_head_weight, bias).float() * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    keep = labels != IGNORE_INDEX
    return logits.log_softmax(-1).gather(-1, labels.where(keep, 0)[:, None])[:, 0].where(keep, 0.0)


def exact_logps(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None) -> Tensor:
    head = Head(logit_scale, softcap)
    bias = None if bias is None else bias.double()
    return reference_linear_logps(hidden_states.double(), lm_head_weight.double(), bias, labels, head).logps


def evaluate(logps_fn, case: Case, seed: int, device: str) -> dict[str, Tensor]:
    """The log-probs and the gradient of every input, in fp64 on the CPU."""
    leaves, labels, upstream = make_inputs(case, seed, device)
    args = dict(leaves)
    logps = logps_fn(args.pop("hidden_states"), args.pop("lm_head_weight"), labels, **args, **case.settings)
    grads = torch.autograd.grad((logps * upstream).sum(), list(leaves.values()))
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape
    values = {"logps": logps, **{f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}}
    return {name: value.detach().double().cpu() for name, value in values.items()}


def relative_errors(logps_fn, case: Case, device: str) -> dict[str, float]:
    """Root mean square error over root mean square value, over enough seeds that one lucky rounding does not decide."""
    num_seeds = 1 if case.T > 8 else 16
    wrong, total = {}, {}
    for seed in range(num_seeds):
        exact = evaluate(exact_logps, case, seed, device)
        for name, value in evaluate(logps_fn, case, seed, device).items():
            wrong[name] = wrong.get(name, 0.0) + float((value - exact[name]).square().sum())
            total[name] = total.get(name, 0.0) + float(exact[name].square().sum())
    return {name: (wrong[name] / total[name]) ** 0.5 if total[name] else wrong[name] ** 0.5 for name in wrong}


def assert_at_most_twice_plain(logps_fn, case: Case, device: str = "cpu", only: tuple[str, ...] = ()) -> None:
    ours, plain = relative_errors(logps_fn, case, device), relative_errors(plain_logps, case, device)
    for name, error in ours.items():
        if only and name not in only:
            continue
        assert error <= 2 * plain[name] + 1e-7, (
            f"{case.id}: {name} is off by {error:.2e}, plain PyTorch by {plain[name]:.2e}"
        )
