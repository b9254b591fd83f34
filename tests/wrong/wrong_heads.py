"""Plausible mistakes in a head op, each a complete implementation that differs from a right one in a single point."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.types import IGNORE_INDEX


def _logits(hidden_states, lm_head_weight, bias, logit_scale, softcap) -> Tensor:
    z = hidden_states.float() @ lm_head_weight.float().T + (0 if bias is None else bias.float())
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _pick(logps: Tensor, labels: Tensor) -> Tensor:
    keep = labels != IGNORE_INDEX
    return logps.gather(-1, labels.where(keep, 0)[:, None])[:, 0].where(keep, 0.0)


def off_by_one_shift(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """Shifts labels that the caller has already shifted."""
    logps = _logits(hidden_states, lm_head_weight, bias, logit_scale, softcap).log_softmax(-1)
    return _pick(logps, labels.roll(-1))


def ignored_row_counted(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """Clamps the label of an ignored row into the vocabulary and forgets to mask the result."""
    logps = _logits(hidden_states, lm_head_weight, bias, logit_scale, softcap).log_softmax(-1)
    return logps.gather(-1, labels.clamp(min=0)[:, None])[:, 0]


def missing_last_tile(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """Loops over `V // 64` tiles of 64: the softmax lacks the ragged rest of the vocabulary."""
    z = _logits(hidden_states, lm_head_weight, bias, logit_scale, softcap)
    whole = max(z.shape[-1] // 64 * 64, 1)
    keep = labels != IGNORE_INDEX
    picked = z.gather(-1, labels.where(keep, 0)[:, None])[:, 0]
    return (picked - z[:, :whole].logsumexp(-1)).where(keep, 0.0)


def unmasked_vocab_tail(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """Pads the last tile with logits of 0 in place of -inf: each adds exp(0) to the sum."""
    z = _logits(hidden_states, lm_head_weight, bias, logit_scale, softcap)
    return _pick(torch.nn.functional.pad(z, (0, -z.shape[-1] % 64)).log_softmax(-1), labels)


def wrong_merge(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """Adds the tiles' sums of exp(z - max of the tile) without bringing them to one maximum first."""
    z = _logits(hidden_states, lm_head_weight, bias, logit_scale, softcap)
    tiles = z.split(64, dim=-1)
    sums = torch.stack([(tile - tile.amax(-1, keepdim=True)).exp().sum(-1) for tile in tiles]).sum(0)
    keep = labels != IGNORE_INDEX
    picked = z.gather(-1, labels.where(keep, 0)[:, None])[:, 0]
    return (picked - (z.amax(-1) + sums.log())).where(keep, 0.0)


def bf16_accumulation(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """Rounds the running sum over the hidden size to bf16 after every block of 8."""
    z = torch.zeros(hidden_states.shape[0], lm_head_weight.shape[0], dtype=torch.bfloat16)
    for h, w in zip(hidden_states.split(8, -1), lm_head_weight.split(8, -1), strict=True):
        z = z + h.bfloat16() @ w.bfloat16().T
    z = (z.float() + (0 if bias is None else bias.float())) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return _pick(z.log_softmax(-1), labels)


class _WeightGradSummedInBf16(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, lm_head_weight):
        ctx.save_for_backward(hidden_states, lm_head_weight)
        return hidden_states.float() @ lm_head_weight.float().T

    @staticmethod
    def backward(ctx, dz):
        hidden_states, lm_head_weight = ctx.saved_tensors
        dw = torch.zeros_like(lm_head_weight, dtype=torch.bfloat16)
        for rows in range(0, dz.shape[0], 4):
            dw += (dz[rows : rows + 4].T @ hidden_states[rows : rows + 4].float()).bfloat16()
        return (dz @ lm_head_weight.float()).to(hidden_states.dtype), dw.to(lm_head_weight.dtype)


def weight_grad_summed_in_bf16(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """Rounds dW to bf16 after every block of rows, where it should be summed in fp32 and rounded once."""
    z = (_WeightGradSummedInBf16.apply(hidden_states, lm_head_weight) + (0 if bias is None else bias)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return _pick(z.log_softmax(-1), labels)


def softcap_slope_forgotten(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """Backward treats the softcap as the identity."""
    raw = _logits(hidden_states, lm_head_weight, bias, logit_scale, None)
    capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    return _pick((raw + (capped - raw).detach()).log_softmax(-1), labels)


def bias_after_scale(hidden_states, lm_head_weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
    """Adds the bias to the scaled logits; the scale belongs to the biased ones."""
    scaled_bias = None if bias is None else bias / logit_scale
    return _pick(_logits(hidden_states, lm_head_weight, scaled_bias, logit_scale, softcap).log_softmax(-1), labels)
