"""`linear_cross_entropy`: torch's cross entropy of a linear layer's outputs, computed by the head op without logits.

In: the arguments of `torch.nn.functional.linear_cross_entropy` (torch 2.13), with the same names. Out: its loss.
Refuses losses that need more than one label's log-prob per row: class probabilities, label smoothing, K-dimensional
losses. It also runs with torch releases that lack this function.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdpo.ops.linear_logps import linear_logps
from fastdpo.ops.targets import labels_of
from fastdpo.types import IGNORE_INDEX

REDUCTIONS = ("mean", "sum", "none")
SAME = ("logit_scale", "softcap", "skip_tolerance", "workspace_bytes", "impl")


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
    options: None = None,
    **same: Any,
) -> Tensor:
    """`F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)` in nats, computed tile by tile.

    Args:
        input: (..., H) fp16, bf16, fp32 or fp64, with any leading dimensions (torch accepts (H,) and (N, H)).
        linear_weight: (V, H), same dtype and device (autocast as in `linear_logps`).
        target: (...), integers in [0, V) or ignore_index: one for each row of `input`, not shifted.
        linear_bias: (V,).
        weight: (V,), weight of each class; a constant without gradient.
        reduction: "none", "sum", or "mean": the sum over the rows that are not ignored, divided by their number, or by
            the sum of their targets' class weights. As in torch, nan if every row is ignored.
        ignore_index: target of the rows that give 0 and no gradient; None, torch's default, means -100.
        label_smoothing: only 0.0. Smoothing needs the gradient of a row's mean logit, which this op does not have.
        options: only None. torch's options choose chunks and accumulators; this op chooses tiles and sums in fp32.
        **same: logit_scale, softcap, skip_tolerance, workspace_bytes and impl, as in `linear_logps`.
    Returns:
        The loss in fp32 (fp64 for fp64 inputs), also for fp16 and bf16 inputs, for which torch rounds it: a scalar, or
        a tensor of target's shape if reduction is "none". Differentiable once in input, linear_weight and linear_bias;
        each gradient in its input's dtype, summed in fp32 and cast once.
    Raises:
        ValueError: shapes disagree, target holds probabilities, a setting is not one of the above, or `linear_logps`
            refuses the arguments (input, linear_weight and target are its hidden_states, lm_head_weight and labels).
    """
    unknown = [name for name in same if name not in SAME]
    if unknown:
        raise ValueError(f"{unknown[0]} is not an argument of linear_cross_entropy (the bias is linear_bias)")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if label_smoothing != 0.0:
        raise ValueError(
            f"label_smoothing must be 0.0, got {label_smoothing}: the op computes one label's log-prob per row; use"
            " torch.nn.functional.linear_cross_entropy or cross_entropy for smoothed targets"
        )
    if options is not None:
        raise ValueError(
            f"options must be None, got {options}: this op chooses its own tiles; impl= selects the implementation"
        )
    if linear_weight.dim() != 2:
        raise ValueError(
            "linear_weight must have shape (V, H), because K-dimensional losses are not supported, got"
            f" {tuple(linear_weight.shape)}"
        )
    H = linear_weight.shape[1]
    if input.dim() == 0 or input.shape[-1] != H:
        raise ValueError(f"input must have shape (..., {H}) to match linear_weight, got {tuple(input.shape)}")
    labels = labels_of(target, IGNORE_INDEX if ignore_index is None else ignore_index)
    if target.shape != input.shape[:-1]:
        raise ValueError(f"target must have shape {tuple(input.shape[:-1])} to match input, got {tuple(target.shape)}")
    _check_vector("linear_bias", linear_bias, linear_weight)
    _check_vector("weight", weight, linear_weight)

    labels = labels.reshape(-1)
    losses = -linear_logps(input.reshape(-1, H), linear_weight, labels, bias=linear_bias, **same).logps  # (T,)
    counts = (labels != IGNORE_INDEX).to(losses.dtype)  # each row's share of the mean's denominator
    if weight is not None:
        # clamped, so that no label reads beyond the weights: ignored rows count 0, out-of-range rows are already nan
        counts = counts * weight.detach().to(losses.dtype)[labels.clamp(0, linear_weight.shape[0] - 1)]
        losses = losses * counts
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def _check_vector(name: str, x: Tensor | None, linear_weight: Tensor) -> None:
    V = linear_weight.shape[0]
    if x is not None and tuple(x.shape) != (V,):
        raise ValueError(f"{name} must have shape ({V},) to match linear_weight, got {tuple(x.shape)}")
