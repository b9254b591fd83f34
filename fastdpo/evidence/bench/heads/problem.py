"""What every method is given, and what it must return: the shapes, one problem of a shape, and the fp64 check.

A problem is one preference batch at the head: hidden states of `2 * num_pairs` sequences, chosen half first, whose last
tokens are responses. A wrong result is found here, before anything is timed: values and gradients are held against fp64
formulas that know nothing of any implementation.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1
CHECK_ROWS = 1280 if torch.cuda.is_available() else 320  # more than fit one workspace at the largest vocabularies
CHECK_BLOCK = 16384  # vocabulary ids of dW that are in fp64 at a time


@dataclass(frozen=True)
class Shape:
    """`num_rows` response rows out of `num_tokens`, hidden size, vocabulary."""

    num_tokens: int
    num_rows: int
    hidden_size: int
    vocab_size: int
    dtype: str

    def __str__(self) -> str:
        return f"T{self.num_tokens}-R{self.num_rows}-H{self.hidden_size}-V{self.vocab_size}-{self.dtype}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The inverse of str: T2048-R1024-H512-V32000-float32. argparse shows what it says of a mistake."""
        match = re.fullmatch(r"T(\d+)-R(\d+)-H(\d+)-V(\d+)-(float32|bfloat16|float16)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"a shape reads like T2048-R1024-H512-V32000-float32, got {text!r}")
        T, R, H, V, dtype = match.groups()
        shape = cls(int(T), int(R), int(H), int(V), dtype)
        if not 0 < shape.num_rows <= shape.num_tokens or 0 in (shape.hidden_size, shape.vocab_size):
            raise argparse.ArgumentTypeError(
                f"a shape has sizes above 0 and no more rows R than tokens T, got {text!r}"
            )
        return shape

    @property
    def num_pairs(self) -> int:
        """Eight pairs, or as many as the rows allow."""
        return next(n for n in (8, 4, 2, 1) if self.num_rows % (2 * n) == 0 and self.num_tokens % (2 * n) == 0)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


CPU_SHAPES = [Shape(2048, 1024, 512, 32000, "float32")]
# Where the head's own kernels have most to lose: little matmul to hide a softmax or a launch behind. They come first,
# for fastdpo and plain PyTorch alone, so that a short run has them
RISKY_SHAPES = [Shape(32768, 16384, H, 128256, "bfloat16") for H in (1024, 2048)]
GPU_SHAPES = [
    *RISKY_SHAPES,
    Shape(32768, 16384, 4096, 128256, "bfloat16"),
    Shape(32768, 16384, 4096, 151936, "bfloat16"),
    Shape(16384, 8192, 4096, 262144, "bfloat16"),
    Shape(32768, 16384, 8192, 128256, "bfloat16"),
]


@dataclass(frozen=True)
class Problem:
    """B pairs, L tokens a sequence, of which the last `num_response` are scored."""

    hidden_states: Tensor  # (2B, L, H), chosen half first
    weight: Tensor  # (V, H)
    labels: Tensor  # (2B, L) int64
    num_response: int
    upstream: Tensor  # (2B, num_response) fp32: dL/dlogp of the passes that are not a loss
    ref_chosen_logps: Tensor | None = None  # (B,) fp32; None: not needed
    ref_rejected_logps: Tensor | None = None

    @property
    def response_hidden(self) -> Tensor:
        """(2B, num_response, H), contiguous, the rows that a loss needs."""
        return self.hidden_states[:, -self.num_response :].contiguous()

    @property
    def response_labels(self) -> Tensor:
        return self.labels[:, -self.num_response :].contiguous()

    @property
    def num_pairs(self) -> int:
        return self.labels.shape[0] // 2


def make_problem(shape: Shape, weight: Tensor | None = None) -> Problem:
    """Random hidden states and head. Softmaxes are flat, so nothing here speaks about skipping."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    num_sequences = 2 * shape.num_pairs
    size = (num_sequences, shape.num_tokens // num_sequences, shape.hidden_size)
    options: dict[str, Any] = {"generator": generator, "device": device}
    if weight is None:
        weight = torch.randn(shape.vocab_size, shape.hidden_size, dtype=shape.torch_dtype, **options).mul_(0.02)
    hidden_states = torch.randn(size, dtype=shape.torch_dtype, **options)
    labels = torch.randint(shape.vocab_size, size[:2], **options)
    num_response = shape.num_rows // num_sequences
    upstream = torch.linspace(-1, 1, shape.num_rows, device=device).view(num_sequences, num_response)
    return Problem(hidden_states, weight, labels, num_response, upstream)


def check_problem(shape: Shape, problem: Problem) -> Problem:
    """The same head with CHECK_ROWS response rows and as many prompt rows; the weight is not copied."""
    small = replace(shape, num_tokens=2 * CHECK_ROWS, num_rows=CHECK_ROWS)
    return with_reference(make_problem(small, problem.weight))


@torch.no_grad()
def with_reference(problem: Problem) -> Problem:
    """The problem with reference log-probs near the policy's, so that every pair has a gradient of ordinary size.

    A margin far from 0 would let a method that drops settled pairs win by the choice of random numbers.
    """
    hidden_states, labels = problem.response_hidden, problem.response_labels
    sums = torch.stack([_plain_logps(h, problem.weight, y).sum() for h, y in zip(hidden_states, labels, strict=True)])
    sums += torch.linspace(-3, 3, len(sums), device=sums.device)
    chosen, rejected = sums.chunk(2)
    return replace(problem, ref_chosen_logps=chosen, ref_rejected_logps=rejected)


def _plain_logps(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden_states @ weight.T).float()
    return logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)


def dpo_loss(logps: Tensor, ref_chosen_logps: Tensor | None, ref_rejected_logps: Tensor | None) -> Tensor:
    """Mean DPO loss of response log-probs (2B, L), chosen half first. arXiv 2305.18290, eq. 7; no reference: 0."""
    chosen, rejected = logps.sum(-1).chunk(2)
    margins = chosen - rejected
    if ref_chosen_logps is not None and ref_rejected_logps is not None:
        margins = margins - (ref_chosen_logps - ref_rejected_logps)
    return -F.logsigmoid(BETA * margins).mean()


@torch.no_grad()
def errors(problem: Problem, pass_name: str, results: tuple[Tensor, ...], with_ref: bool = True) -> dict[str, float]:
    """Relative errors (Frobenius norm) of a pass's results: "values", "dH" and "dW", as far as the pass has them.

    Args:
        results: log-probs of the response rows in any shape, or the loss; then dH (2B, num_response, H) or
            (2B, L, H), then dW (V, H).
        with_ref: False for a method that takes no reference log-probs and is held against the loss without them.
    """
    hidden_states = problem.response_hidden.double().flatten(0, 1)  # (N, H)
    labels = problem.response_labels.flatten()
    logits = torch.cat([hidden_states @ block.double().T for block in problem.weight.split(CHECK_BLOCK)], -1)
    log_softmax = logits.log_softmax(-1)
    logps = log_softmax.gather(-1, labels[:, None])[:, 0].view(problem.upstream.shape)
    values, upstream = logps, problem.upstream.double()
    if pass_name == "dpo loss":
        with torch.enable_grad():
            leaf = logps.clone().requires_grad_()
            refs = (problem.ref_chosen_logps, problem.ref_rejected_logps) if with_ref else (None, None)
            values = dpo_loss(leaf, *(None if ref is None else ref.double() for ref in refs))
            (upstream,) = torch.autograd.grad(values, leaf)
            values = values.detach()
    found = {"values": _relative(results[0].double().reshape(values.shape), values)}
    if len(results) == 1:
        return found
    onehot = F.one_hot(labels, log_softmax.shape[-1])
    logit_grads = (onehot - log_softmax.exp()) * upstream.reshape(-1, 1)  # (N, V)
    blocks = list(zip(logit_grads.split(CHECK_BLOCK, -1), problem.weight.split(CHECK_BLOCK), strict=True))
    grad_hidden = sum(d @ w.double() for d, w in blocks)
    found["dH"] = _relative(*_rows_of(results[1].double(), grad_hidden, problem))
    if len(results) == 3:
        wrong = right = torch.zeros((), dtype=torch.float64, device=labels.device)
        for d, grad_weight in zip(logit_grads.split(CHECK_BLOCK, -1), results[2].split(CHECK_BLOCK), strict=True):
            exact = d.T @ hidden_states
            wrong, right = wrong + (grad_weight - exact).square().sum(), right + exact.square().sum()
        found["dW"] = (wrong / right).sqrt().item()
    return found


def _rows_of(found: Tensor, exact: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Both gradients over the same rows: prompt rows, where a method has them, must be exactly 0 in the exact one."""
    exact = exact.view(*problem.upstream.shape, -1)
    if found.numel() == exact.numel():
        return found.reshape(exact.shape), exact
    full = torch.zeros_like(problem.hidden_states, dtype=torch.float64)
    full[:, -problem.num_response :] = exact
    return found.reshape(full.shape), full


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()
