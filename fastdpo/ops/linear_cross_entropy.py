"""`linear_cross_entropy`: torch's cross entropy of a linear layer's outputs, by the head op, so without the logits.

In: what `torch.nn.functional.linear_cross_entropy` (torch 2.13) takes, under its names. Out: its loss. Refuses what
needs more of a row than one label's log-prob: class probabilities, label smoothing, K-dimensional losses. The torch
that runs it need not have the function itself.
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
    """`F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)` in nats, tile after tile of logits.

    Args:
        input: (..., H) fp16, bf16, fp32 or fp64. torch's takes (H,) and (N, H), here all leading dimensions.
        linear_weight: (V, H), same dtype and device (autocast as in `linear_logps`).
        target: (...), integers in [0, V) or ignore_index: one for each row of `input`, no shift in between.
        linear_bias: (V,).
        weight: (V,), what each class counts; a constant, no gradient is computed for it.
        reduction: "none", "sum", or "mean": the sum over the rows that are not ignored, divided by their number, or by
            the sum of their targets' class weights. nan where every row is ignored, as torch's.
        ignore_index: target of the rows that give 0 and no gradient; None, torch's default, stands for -100.
        label_smoothing: only 0.0. More needs the gradient of a row's mean logit, which this op does not have.
        options: only None. torch's options choose chunks and accumulators; here the op chooses tiles and sums in fp32.
        **same: logit_scale, softcap, skip_tolerance, workspace_bytes and impl, as in `linear_logps`.
    Returns:
        The loss in fp32 (fp64 for fp64 inputs) also for fp16 and bf16, where torch's would be rounded to the input's
        dtype: a scalar, or of target's shape where reduction is "none". Differentiable once in input, linear_weight
        and linear_bias; each gradient in its input's dtype, summed in fp32 and cast once.
    Raises:
        ValueError: shapes disagree, target holds probabilities, or a setting is not one of the above; and as
            `linear_logps`, whose hidden_states, lm_head_weight and labels are input, linear_weight and target here.
    """
    unknown = [name for name in same if name not in SAME]
    if unknown:
        raise ValueError(f"{unknown[0]} is no argument of linear_cross_entropy (the bias is linear_bias)")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if label_smoothing != 0.0:
        raise ValueError(
            "label_smoothing must be 0.0: the op knows the log-prob of one label per row; use"
            f" torch.nn.functional.linear_cross_entropy or cross_entropy for smoothed targets, got {label_smoothing}"
        )
    if options is not None:
        raise ValueError(
            f"options must be None: this op chooses its own tiles (impl= says who computes), got {options}"
        )
    if linear_weight.dim() != 2:
        raise ValueError(
            "linear_weight must have shape (V, H), as K-dimensional losses are not supported,"
            f" got {tuple(linear_weight.shape)}"
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
    counts = (labels != IGNORE_INDEX).to(losses.dtype)  # what each row adds to the mean's denominator
    if weight is not None:
        # clamped, so that no label reads beyond the weights: ignored rows count 0, out of range ones are nan already
        counts = counts * weight.detach().to(losses.dtype)[labels.clamp(0, linear_weight.shape[0] - 1)]
        losses = losses * counts
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def _check_vector(name: str, x: Tensor | None, linear_weight: Tensor) -> None:
    V = linear_weight.shape[0]
    if x is not None and tuple(x.shape) != (V,):
        raise ValueError(f"{name} must have shape ({V},) to match linear_weight, got {tuple(x.shape)}")
