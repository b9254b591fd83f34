"""The checks of `verify` for one implementation in one dtype. Each check is a generator of `Line`s.

In: a `Subject`. Out: lines with error, bound and verdict. The bound is twice the error of plain PyTorch in the same
dtype, plus 1e-7; for results that must be equal to the bit, the bound is 0. With few rows plain PyTorch's error is
chance (in one draw of 37 rows it is a third of that in another), so its largest error over several draws counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.evidence.problems import (
    HIDDEN,
    WEIGHT,
    Answer,
    Op,
    Problem,
    Shape,
    make_problem,
    plain,
    relative_error,
    solve,
)
from fastdpo.ops import linear_logps
from fastdpo.types import IGNORE_INDEX, TOKEN_OUTPUTS, TokenLogps

MIB = 2**20
TOLERANCE = 2.0**-9  # of the checks of skip_tolerance
ENOUGH_ROWS, MOST_DRAWS = 512, 8  # plain PyTorch's error is taken from as many draws as give that many rows, up to 8
# Memory limit of an op beyond its gradients and their fp32 sums, and shapes whose logits are larger
WORKSPACE_BYTES = {"cpu": 64 * MIB, "cuda": 256 * MIB}
MEMORY_SHAPES = {"cpu": Shape(2048, 16, 32768), "cuda": Shape(16384, 64, 65536)}
HEADS: dict[str, dict[str, Any]] = {
    "": {},
    " (bias, scale, softcap)": {"has_bias": True, "logit_scale": 1.5, "softcap": 4.0},
}


@dataclass(frozen=True)
class Line:
    """The result of one check. `error` and `bound` are in `unit`; both are None if the answer is only yes or no."""

    impl: str
    dtype: str
    check: str
    verdict: str  # "ok", "FAILED", or "skipped" where it cannot be made here
    error: float | None = None
    bound: float | None = None
    unit: str = "relative"  # or "elements" (how many are wrong), "bytes", "of bound"
    note: str = ""


def judged(
    impl: str, dtype: str, check: str, error: float, bound: float, unit: str = "relative", note: str = ""
) -> Line:
    verdict = "ok" if error <= bound else "FAILED"  # so that nan fails
    return Line(impl, dtype, check, verdict, float(error), float(bound), unit, note)


@dataclass(frozen=True)
class Subject:
    """The checked implementation, dtype, device and shape."""

    impl: str
    dtype: str  # name in torch
    device: torch.device
    shape: Shape

    def op(self, *args: Any, **kwargs: Any) -> TokenLogps:
        return linear_logps(*args, impl=self.impl, **kwargs)

    def problem(self, shape: Shape | None = None, **settings: Any) -> Problem:
        return make_problem(shape or self.shape, getattr(torch, self.dtype), self.device, **settings)

    def line(self, check: str, error: float, bound: float, unit: str = "relative", note: str = "") -> Line:
        return judged(self.impl, self.dtype, check, error, bound, unit, note)

    def skipped(self, check: str, note: str) -> Line:
        return Line(self.impl, self.dtype, check, "skipped", note=note)


def against_fp64(subject: Subject) -> Iterator[Line]:
    """log-probs and gradients against fp64"""
    for head, settings in HEADS.items():
        problem = subject.problem(**settings)
        bounds = _bounds(subject, solve, **settings)
        exact, ours = solve(plain, problem.double()), solve(subject.op, problem)
        for name, value in ours.items():
            yield subject.line(name + head, relative_error(value, exact[name]), bounds[name])
        if not head:
            for what, wanted in (("head frozen", HIDDEN), ("hidden states frozen", WEIGHT)):  # paths of their own
                name = f"grad {wanted}"
                error = relative_error(solve(subject.op, problem, [wanted])[name], exact[name])
                yield subject.line(f"{name} ({what})", error, bounds[name])


def statistics(subject: Subject) -> Iterator[Line]:
    """statistics against fp64"""
    settings = HEADS[" (bias, scale, softcap)"]
    problem = subject.problem(**settings)
    exact, ours = _statistics(plain, problem.double()), _statistics(subject.op, problem)
    bounds = _bounds(subject, _statistics, **settings)
    for name, value in ours.items():
        if name == "is_top1":
            yield subject.line(name, float((value != exact[name]).sum()), bounds[name], "elements")
        else:
            yield subject.line(name, relative_error(value, exact[name]), bounds[name])


def ignored_rows(subject: Subject) -> Iterator[Line]:
    """ignored rows"""
    problem = subject.problem()
    ignored = problem.labels == IGNORE_INDEX
    answer = solve(subject.op, problem)
    in_rows = [answer["log-probs"][ignored], answer[f"grad {HIDDEN}"][ignored]]
    problem.labels.fill_(IGNORE_INDEX)
    wrong = sum(_num_nonzero(x) for x in [*in_rows, *solve(subject.op, problem).values()])
    yield subject.line("ignored rows: values that are not 0", wrong, 0, "elements")


def invalid_labels(subject: Subject) -> Iterator[Line]:
    """labels outside [0, V)"""
    problem = subject.problem()
    problem.labels[0] = subject.shape.vocab
    check = "label outside [0, V): rows that pass unseen"
    try:
        logps = problem.call(subject.op).logps
    except ValueError:
        yield subject.line(check, 0, 0, "elements", "refused")
        return
    yield subject.line(check, float(not logps[0].isnan()), 0, "elements", "its log-prob becomes nan")


def determinism(subject: Subject) -> Iterator[Line]:
    """determinism"""
    problem = subject.problem(**HEADS[" (bias, scale, softcap)"])
    first, second = solve(subject.op, problem), solve(subject.op, problem)
    yield subject.line("same call again: bits that differ", _num_different(first, second), 0, "elements")


def skipping(subject: Subject) -> Iterator[Line]:
    """skip_tolerance

    Labels lie in the first quarter of the vocabulary; beyond it, logits fall by 24 nats, so that the dropped mass comes
    near the tolerance. With tolerance eps, row t of dH may be off by |g_t| eps max ||W_v||, and dW by
    sum_t |g_t| eps ||h_t|| (Euclidean norms; fastdpo/ops/skipping.py), plus rounding.
    """
    problem = subject.problem()
    hidden, weight = problem.floats[HIDDEN], problem.floats[WEIGHT]
    quarter = -(-subject.shape.vocab // 4)
    hidden[:, 0], weight[:, 0] = 8.0, 0.0
    weight[quarter:, 0] = torch.linspace(0, -3, subject.shape.vocab - quarter)
    problem.labels[problem.labels != IGNORE_INDEX] %= quarter
    exact = solve(subject.op, problem)
    check = "skip_tolerance 0: bits that differ"
    yield subject.line(check, _num_different(exact, solve(subject.op, problem, skip_tolerance=0.0)), 0, "elements")
    if subject.impl == "reference":
        yield subject.skipped("skip_tolerance 2**-9", "always exact")
        return
    skipped = solve(subject.op, problem, skip_tolerance=TOLERANCE)
    rounding = 2 * torch.finfo(getattr(torch, subject.dtype)).eps  # of two results with different orders of summation
    kept = problem.labels != IGNORE_INDEX
    weights = problem.upstream.double().abs() * kept * TOLERANCE  # (T,)
    name_h, name_w = f"grad {HIDDEN}", f"grad {WEIGHT}"

    bound = weights * weight.double().norm(dim=1).max() + rounding * exact[name_h].norm(dim=1)
    error = (skipped[name_h] - exact[name_h]).norm(dim=1)
    share = torch.where(error == 0, 0.0, error / bound).max().item()
    num_dropped = int(((skipped[name_w] == 0).all(1) & (exact[name_w] != 0).any(1)).sum())
    note = f"{num_dropped / subject.shape.vocab:.0%} of the ids dropped"
    yield subject.line(f"skip_tolerance 2**-9: {name_h}, worst row", share, 1, "of bound", note)

    bound_w = (weights * hidden.double().norm(dim=1)).sum() + rounding * exact[name_w].norm()
    error_w = (skipped[name_w] - exact[name_w]).norm()
    yield subject.line(f"skip_tolerance 2**-9: {name_w}", (error_w / bound_w).item(), 1, "of bound")


def memory(subject: Subject) -> Iterator[Line]:
    """memory

    Peak bytes of forward and backward, on a shape whose (T, V) logits alone would break the bound.
    """
    if subject.impl == "reference":
        yield subject.skipped("memory", "builds the logits")
        return
    if subject.impl == "triton" and subject.device.type == "cpu":
        yield subject.skipped("memory", "the interpreter copies its arguments")
        return
    shape = MEMORY_SHAPES[subject.device.type]
    problem = subject.problem(shape)
    T, H, V = shape.rows, shape.hidden, shape.vocab
    itemsize = problem.floats[HIDDEN].element_size()
    note = f"{T} x {V} logits alone: {T * V * itemsize / MIB:.0f} MiB"
    for head, wanted, num_grads in (("", (HIDDEN, WEIGHT), T * H + V * H), (" (head frozen)", (HIDDEN,), T * H)):
        floats = {name: x.detach().requires_grad_(name in wanted) for name, x in problem.floats.items()}

        def step(floats: dict[str, Tensor] = floats, wanted: tuple[str, ...] = wanted) -> tuple[Tensor, ...]:
            logps = problem.call(subject.op, floats).logps
            return torch.autograd.grad(logps, [floats[name] for name in wanted], problem.upstream)

        partials = 8 * T * -(-V // 64)  # forward's two numbers per row and tile, of the smallest tiles there are
        bound = num_grads * (itemsize + 4) + WORKSPACE_BYTES[subject.device.type] + partials
        yield subject.line(f"peak memory{head}", peak_live_bytes(step, subject.device), bound, "bytes", note)


CHECKS = (against_fp64, statistics, ignored_rows, invalid_labels, determinism, skipping, memory)


def _statistics(op: Op, problem: Problem) -> Answer:
    tokens = problem.call(op, outputs=TOKEN_OUTPUTS)
    return {name: getattr(tokens, name) for name in TOKEN_OUTPUTS}


def _bounds(subject: Subject, answer: Callable[[Op, Problem], Answer], **settings: Any) -> dict[str, float]:
    """Twice the largest error of plain PyTorch over the draws, plus 1e-7; for is_top1, twice its wrong elements."""
    bounds: dict[str, float] = {}
    for seed in range(min(MOST_DRAWS, -(-ENOUGH_ROWS // subject.shape.rows))):
        problem = subject.problem(seed=seed, **settings)
        exact, usual = answer(plain, problem.double()), answer(plain, problem)
        for name, value in usual.items():
            if name == "is_top1":
                bound = 2.0 * float((value != exact[name]).sum())
            else:
                bound = 2 * relative_error(value, exact[name]) + 1e-7
            bounds[name] = max(bounds.get(name, 0.0), bound)
    return bounds


def _num_nonzero(x: Tensor) -> int:
    return int((x != 0).sum())


def _num_different(first: dict[str, Tensor], second: dict[str, Tensor]) -> int:
    """Number of elements with different bits; values are in fp64, which keeps every bit of the smaller types."""
    return sum(int((first[name].view(torch.int64) != second[name].view(torch.int64)).sum()) for name in first)
