"""`linear_cross_entropy`: torch's cross entropy of a linear layer's outputs, computed by the head op without logits.

In: the arguments of `torch.nn.functional.linear_cross_entropy` (torch 2.13 to 2.15), with the same names. Out: its
loss, also for smoothed labels, class probabilities and K-dimensional targets. Refuses sums in half precision. It also
runs with torch releases that lack this function.

Smoothed labels and probabilities need no logits either. With q the target's share of each class (times its weight),
`-sum_v q_v log p_v = (sum_v q_v) lse - sum_v q_v z_v`. The lse is the head op's, with its gradient. The last sum is
linear in the head, `h @ (q @ W) + q @ b`: a product with (T, H) or (H,) numbers, for which a head in half precision is
copied in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.linear_logps import linear_logps
from fastdpo.ops.targets import labels_of
from fastdpo.ops.validation import operand_dtype
from fastdpo.types import IGNORE_INDEX

REDUCTIONS = ("mean", "sum", "none")
SAME = ("logit_scale", "softcap", "skip_tolerance", "workspace_bytes", "impl")
OPTIONS = ("allow_retain_graph", "batch_chunk_size", "chunking_method", "acc_policy", "acc_dtype")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    **same: Any,
) -> Tensor:
    """`F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)` in nats, computed tile by tile.

    Args:
        input: (..., H) fp16, bf16, fp32 or fp64, with any leading dimensions (torch accepts (H,) and (N, H)).
        linear_weight: (V, H), same dtype and device (autocast as in `linear_logps`). Or (V, d1, ..., dK, H) for a
            K-dimensional loss: a head of its own for each of the d1 * ... * dK places, each computed as one.
        target: (..., d1, ..., dK), integers in [0, V) or ignore_index: one for each row of `input` and each place, not
            shifted. Or (..., V, d1, ..., dK) floats: the probability of each class, differentiable too (its gradient is
            as large as the logits).
        linear_bias: (V, d1, ..., dK).
        weight: (V,), weight of each class; a constant without gradient.
        reduction: "none", "sum", or "mean": the sum over the targets that are not ignored, divided by their number, or
            by the sum of their class weights. As in torch, nan if every target is ignored. With probabilities, the mean
            is over all rows and places, whatever the weights.
        ignore_index: target of the rows that give 0 and no gradient; None, torch's default, means -100. As in torch,
            only None with probabilities.
        label_smoothing: in [0, 1], the share of the target that is spread evenly over all classes. As class
            probabilities, it cannot go with logit_scale and softcap (a capped sum of logits is not linear in the head)
            nor with skip_tolerance.
        options: a torch.nn.LinearCrossEntropyOptions, whose choices of chunks and of what is kept have no effect: this
            op chooses its tiles within workspace_bytes, keeps what a second backward needs, and sums in fp32 (fp64 for
            fp64 inputs), the only acc_dtype beside None.
        **same: logit_scale, softcap, skip_tolerance, workspace_bytes and impl, as in `linear_logps`.
    Returns:
        The loss in fp32 (fp64 for fp64 inputs), also for fp16 and bf16 inputs, for which torch rounds it: a scalar, or,
        if reduction is "none", a tensor of the shape of class indices. Differentiable once in input, linear_weight and
        linear_bias; each gradient in its input's dtype, summed in fp32 and cast once.
    Raises:
        ValueError: shapes disagree, a setting is not one of the above, or `linear_logps` refuses the arguments (input,
            linear_weight and target are its hidden_states, lm_head_weight and labels).
    """
    unknown = [name for name in same if name not in SAME]
    if unknown:
        raise ValueError(f"{unknown[0]} is not an argument of linear_cross_entropy (the bias is linear_bias)")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    _check_options(options, torch.promote_types(input.dtype, torch.float32))
    _check_linear(input, linear_weight, linear_bias, weight)
    is_soft = target.is_floating_point()
    if is_soft or label_smoothing > 0.0:
        for name, neutral in (("softcap", None), ("logit_scale", 1.0), ("skip_tolerance", 0.0)):
            if same.get(name, neutral) != neutral:
                raise ValueError(
                    f"{name} must be {neutral} with label_smoothing or class probabilities, got {same[name]}"
                )
    if is_soft and ignore_index is not None:
        raise ValueError(f"ignore_index must be None if target holds probabilities, got {ignore_index}")
    V, *places, H = linear_weight.shape
    shape = (*input.shape[:-1], *places)  # of the losses
    expected = (*input.shape[:-1], V, *places) if is_soft else shape
    if target.shape != expected:
        kind = "if it holds probabilities" if is_soft else "to match input"
        raise ValueError(f"target must have shape {expected} {kind}, got {tuple(target.shape)}")

    rows = input.reshape(-1, H)
    target_shape = (rows.shape[0], V) if is_soft else (rows.shape[0],)
    if is_soft:
        # in fp32: near the best fit p - q is small beside p and q, which are not to be rounded before
        dtype = torch.promote_types(operand_dtype(input, linear_weight, linear_bias), torch.float32)
        rows, linear_weight = rows.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    else:
        target = labels_of(target, IGNORE_INDEX if ignore_index is None else ignore_index)
    loss_of = _of_probabilities if is_soft else _of_indices
    heads = zip(
        _by_place(linear_weight, places, (V, H), 1),
        [None] * math.prod(places) if linear_bias is None else _by_place(linear_bias, places, (V,), 1),
        _by_place(target, places, target_shape, len(target_shape)),
        strict=True,
    )
    found = [loss_of(rows, *head, weight, label_smoothing, same) for head in heads]
    losses, counts = (torch.stack(parts, -1) if places else parts[0] for parts in zip(*found, strict=True))
    if reduction == "none":
        return losses.view(shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def _by_place(x: Tensor, places: Sequence[int], shape: tuple[int, ...], dim: int) -> Sequence[Tensor]:
    """`x` as tensors of `shape`, one for each place; the dimensions of the places begin at `dim`."""
    if not places:
        return [x.reshape(shape)]
    return x.reshape(*shape[:dim], math.prod(places), *shape[dim:]).unbind(dim)


def _of_indices(
    rows: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    labels: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    same: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(T,) losses, and each row's share of the mean's denominator."""
    names = ("lse",) if label_smoothing > 0.0 else ()
    found = linear_logps(rows, linear_weight, labels, bias=linear_bias, outputs=names, output_grads=names, **same)
    losses = -found.logps  # (T,)
    counts = (labels != IGNORE_INDEX).to(losses.dtype)
    if weight is not None:
        # clamped, so that no label reads beyond the weights: ignored rows count 0, out-of-range rows are already nan
        counts = counts * weight.detach().to(losses.dtype)[labels.clamp(0, linear_weight.shape[0] - 1)]
        losses = losses * counts
    if found.lse is not None:
        V = linear_weight.shape[0]
        ones = torch.ones(V, dtype=losses.dtype, device=losses.device)
        spread = label_smoothing / V * (ones if weight is None else weight.detach().to(losses.dtype))
        smooth = _expected_nll(rows, linear_weight, linear_bias, found.lse, spread)
        losses = (1.0 - label_smoothing) * losses + smooth.where(labels != IGNORE_INDEX, 0.0)
    return losses, counts


def _of_probabilities(
    rows: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    shares: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    same: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(T,) losses, and ones."""
    labels = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)  # of any class: only the lse counts
    with torch.autocast(rows.device.type, enabled=False):
        lse = linear_logps(rows, linear_weight, labels, bias=linear_bias, outputs="lse", output_grads="lse", **same).lse
        assert lse is not None
        shares = shares.to(lse.dtype)  # (T, V)
        if label_smoothing > 0.0:
            shares = (1.0 - label_smoothing) * shares + label_smoothing / linear_weight.shape[0]
        if weight is not None:
            shares = shares * weight.detach().to(lse.dtype)
        return _expected_nll(rows, linear_weight, linear_bias, lse, shares), torch.ones_like(lse)


def _expected_nll(
    rows: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, lse: Tensor, shares: Tensor
) -> Tensor:
    """(T,) `-sum_v shares_v log p_v`; shares are (V,) or (T, V)."""
    operand = operand_dtype(rows, linear_weight, linear_bias)  # the op's, also under autocast
    with torch.autocast(rows.device.type, enabled=False):
        mean_weight = shares @ linear_weight.to(operand).to(lse.dtype)  # (H,) or (T, H)
        expected = (rows.to(operand).to(lse.dtype) * mean_weight).sum(-1)
        if linear_bias is not None:
            expected = expected + shares @ linear_bias.to(operand).to(lse.dtype)
        return shares.sum(-1) * lse - expected


def _check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, weight: Tensor | None) -> None:
    if linear_weight.dim() < 2 or linear_weight.numel() == 0:
        raise ValueError(
            "linear_weight must have shape (V, H) or (V, d1, ..., dK, H) without a dimension of 0, got"
            f" {tuple(linear_weight.shape)}"
        )
    V, *places, H = linear_weight.shape
    if input.dim() == 0 or input.shape[-1] != H:
        raise ValueError(f"input must have shape (..., {H}) to match linear_weight, got {tuple(input.shape)}")
    for name, x, shape in (("linear_bias", linear_bias, (V, *places)), ("weight", weight, (V,))):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape} to match linear_weight, got {tuple(x.shape)}")


def _check_options(options: Any, dtype: torch.dtype) -> None:
    """Refuses what is no torch.nn.LinearCrossEntropyOptions, another dtype of sums, and options of later releases."""
    if options is None:
        return
    known = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if known is None or not isinstance(options, known):
        raise ValueError(f"options must be None or a torch.nn.LinearCrossEntropyOptions, got {options!r}")
    if options.acc_dtype not in (None, dtype):
        raise ValueError(f"options.acc_dtype must be None or {dtype}, in which this op sums, got {options.acc_dtype}")
    for field in fields(options):
        if field.name not in OPTIONS and getattr(options, field.name) != field.default:
            raise ValueError(
                f"options.{field.name} must be {field.default!r}, because this op does not know it, got"
                f" {getattr(options, field.name)!r}"
            )
