"""`linear_logps`: the contract of the head op per row, and the choice of the implementation.

In: hidden states, the LM head, labels. Out: TokenLogps. Refuses what `fastdpo.ops.validation` lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.autograd import differentiable_logps
from fastdpo.ops.choices import choice_logps
from fastdpo.ops.head import Head
from fastdpo.ops.reference import reference_linear_logps
from fastdpo.ops.shard import shard_of
from fastdpo.ops.validation import check_head, check_labels, check_settings, operand_dtype, output_names
from fastdpo.types import GRAD_OUTPUTS, TokenLogps


def linear_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = (),
    output_grads: Sequence[str] = (),
    skip_tolerance: float = 0.0,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    process_group: Any = None,
    vocab_size: int | None = None,
) -> TokenLogps:
    """Log-probability of each label under the softmax of the head's logits, in nats, without materializing the logits.

    `z = softcap * tanh(logit_scale * (h @ W.T + b) / softcap)`, or without softcap `z = logit_scale * (h @ W.T + b)`.

    Args:
        hidden_states: (T, H) fp16, bf16, fp32 or fp64, any strides; already shifted, row t predicts labels[t].
        lm_head_weight: (V, H), same dtype and device. Dtypes may differ only under autocast, which casts all of them.
        labels: (T,) integers; IGNORE_INDEX rows give 0.0 and no gradient. Or (T, K), several ids per row: logps and
            is_top1 are then (T, K), and a row is ignored if all its labels are. Distillation and RL need this.
        bias: (V,), the head's bias.
        logit_scale: factor of the logits; not zero.
        softcap: bound of the logits, > 0 (Gemma 2's final_logit_softcapping).
        outputs: optional fields to fill, out of "lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs". They
            are 0 (False) in ignored rows.
        output_grads: the outputs to give a gradient, out of "lse" and "entropy". With any, or with labels (T, K), the
            vocabulary must be whole and skip_tolerance 0; "triton" then takes 34 MB beside workspace_bytes.
        skip_tolerance: probability mass q in [0, 1) that backward may drop from each row. Vocabulary tiles with little
            mass are then neither recomputed nor multiplied; tiles with a label are always kept. With g the gradient of
            the log-probs, row t of dH is off by at most `|g_t| |logit_scale| q max_v |W_v|`, and dW by at most
            `sum_t |g_t| |logit_scale| q |h_t|` (Frobenius). Rows of dW that are skipped everywhere are exactly zero,
            which Adam does not treat as small. 0.0 is exact. If little can be skipped (random weights, small
            vocabularies, an uncertain model), the search for skippable tiles costs more than it saves.
        workspace_bytes: memory for a pass beyond gradients and their fp32 sums; by default at most 256 MiB on a GPU and
            32 MiB on a CPU. A larger workspace reads and writes those sums less often; a much smaller one costs time
            (tens of KiB: several times as much).
        impl: "triton", "tiled" (pure PyTorch, any device), "reference" (plain PyTorch, builds the logits), or "auto":
            triton on CUDA if it is installed and supports the dtype, else tiled. A named impl never falls back.
        process_group: a torch.distributed.ProcessGroup over whose processes the vocabulary is cut (tensor parallelism).
            lm_head_weight and bias are then this process's rows, as torch.chunk or DTensor's Shard(0) cuts them; all
            else is the same on every process. The processes exchange a few numbers per row and sum dH; dW and db stay
            local. Log-probs and outputs are those of the whole vocabulary. Not for impl="reference".
        vocab_size: rows of the whole weight; by default lm_head_weight's times the number of processes.
    Returns:
        TokenLogps with logps (T,) fp32 (fp64 for fp64 inputs), differentiable in hidden_states, lm_head_weight and
        bias; each gradient in its input's dtype, summed in fp32 and cast once. One derivative only, by autograd (not
        torch.func).
    Raises:
        ValueError: shapes, dtypes or devices disagree, a setting is out of range, a named impl cannot run here, or (on
            the CPU) a label lies outside [0, V). On a GPU such a label is not checked, to avoid a synchronization; it
            is never read out of bounds, and its log-prob and the affected gradients become nan.
    """
    outputs, output_grads = output_names("outputs", outputs), output_names("output_grads", output_grads)
    check_settings(logit_scale, softcap, outputs, skip_tolerance, workspace_bytes, impl)
    check_head(hidden_states, lm_head_weight, labels, bias, choices=True)
    dtype = operand_dtype(hidden_states, lm_head_weight, bias)
    softcap = None if softcap is None else float(softcap)
    shard = shard_of(process_group, vocab_size, lm_head_weight, impl)
    head = Head(float(logit_scale), softcap, outputs, float(skip_tolerance), workspace_bytes, shard, output_grads)
    labels = labels.to(torch.int64)
    by_choice = bool(output_grads) or labels.dim() == 2
    if by_choice:
        _check_choices(head, labels)

    if (impl == "reference" or by_choice) and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, lm_head_weight.shape[0])
    if impl == "reference":
        with torch.autocast(hidden_states.device.type, enabled=False):
            bias_cast = None if bias is None else bias.to(dtype)
            return reference_linear_logps(hidden_states.to(dtype), lm_head_weight.to(dtype), bias_cast, labels, head)
    if by_choice:
        found = choice_logps(
            hidden_states, lm_head_weight, bias, labels if labels.dim() == 2 else labels[:, None], head, impl, dtype
        )
        return found if labels.dim() == 2 else _first_choice(found)
    return differentiable_logps(hidden_states, lm_head_weight, bias, labels, head, impl, dtype)


def _first_choice(found: TokenLogps) -> TokenLogps:
    """The results of labels (T, 1) as those of labels (T,)."""
    is_top1 = None if found.is_top1 is None else found.is_top1[:, 0]
    return replace(found, logps=found.logps[:, 0], is_top1=is_top1)


def _check_choices(head: Head, labels: Tensor) -> None:
    """What several labels per row and gradients of outputs do not work with."""
    if labels.dim() == 2:
        rule, value = f"labels must have shape ({len(labels)},)", f"shape {tuple(labels.shape)}"
    else:
        rule, value = "output_grads must be empty", str(head.output_grads)
    for name in head.output_grads:
        if name not in GRAD_OUTPUTS or name not in head.outputs:
            raise ValueError(f"output_grads must be among {GRAD_OUTPUTS} and named in outputs, got {name!r}")
    if labels.dim() == 2 and labels.shape[1] == 0:
        raise ValueError(f"labels must have at least one label per row, got shape {tuple(labels.shape)}")
    if head.skip_tolerance > 0:
        raise ValueError(f"{rule} with skip_tolerance, got {value}; use skip_tolerance=0.0")
    if head.shard is not None:
        raise ValueError(f"{rule} with a process_group, got {value}; give the whole weight to every process")
