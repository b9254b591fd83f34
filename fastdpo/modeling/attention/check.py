"""Checks a backend on this machine: compares one attention call, forward and backward, with a mask over the row.

In: the `CallShape` of some layers and the setting of the run. Out: None, or the fault. The row is a prefix of 200
tokens with branches of 150 and 300: more than one tile of queries and keys, edges inside tiles, and windows shorter
than a branch, which the self-check's short pairs do not cover. The tolerance comes from the mask's own error in the
same dtype; a wrong kernel is off by about the size of a whole row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastdpo.data.batches.varlen import varlen_layout
from fastdpo.modeling.attention.backends import BACKENDS, CallShape, choose
from fastdpo.modeling.attention.call import AttentionCall, PackedLayout

SEGMENTS = ((0, 350, 0, 0), (350, 650, 0, 200))  # prefix and first branch, second branch
ACTIVE_WINDOW = 128  # in the place of longer ones, which no branch would reach
MAX_KV_HEADS = 2  # all heads are equal; a kernel may mishandle the number that share keys
# Largest error of a row, relative to its size, that always counts as rounding, whatever the mask's error
_FLOOR = {torch.float64: 1e-6, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_TIMES_PLAIN = 4.0
_LEAST_SHARE = 0.25  # of the mean size of a row: smaller ones, which cancel, are held to this
_NAMES = ("output", *(f"gradient of the {what}" for what in ("queries", "keys", "values", "sinks")))


def runs_anywhere(name: str, device: torch.device) -> bool:
    """Whether the backend runs on any machine; these backends are the reference for the others."""
    return name == "mask" or (name == "sdpa" and device.type == "cpu")


def scores_note(shapes: Mapping[CallShape, str]) -> str | None:
    """A note about layers on a GPU whose scores are materialized because no available kernel supports them.

    Args:
        shapes: shapes of calls with the backends that run them.
    """
    for shape, name in shapes.items():
        what = "a softcap" if shape.softcap is not None else "attention sinks" if shape.sinks is not None else None
        if what is not None and name in ("sdpa", "mask") and shape.device.type != "cpu":
            size = shape.num_heads * 4096**2 * 4 / 2**30
            return (
                f"{name} builds the fp32 scores of {what}, {size:.1f} GiB a layer for a branch that sees 4,096 tokens,"
                " and several copies in backward; to avoid this, install flash-attn (pip install flash-attn)"
            )
    return None


def attention_fault(
    shape: CallShape, backend: str, excluded: Mapping[str, str], *, with_grad: bool = True
) -> tuple[str, str | None]:
    """The backend that runs such calls, and its fault. The random state does not change.

    Args:
        shape: shape of the calls of some layers; an active autocast applies.
        backend, excluded: as in PackedLayout.
        with_grad: False for a model without a backward pass.
    Raises:
        UnsupportedAttention: no allowed backend can run the call with its gradients.
        Exception: the kernel's own exception; `fastdpo.modeling.attention.backends.Observed` records the backend.
    """
    layout = PackedLayout(SEGMENTS, varlen_layout(SEGMENTS).to(shape.device), backend, excluded)
    inputs, weight = _inputs(shape)
    with torch.set_grad_enabled(with_grad):
        leaves = _leaves(inputs, shape.dtype, with_grad)
        call = _call(leaves, shape, layout)
        name = choose(call)[0]
        if runs_anywhere(name, shape.device):
            return name, None
        found = _results(name, call, leaves, weight)
        leaves = _leaves(inputs, shape.dtype, with_grad)
        plain = _results("mask", _call(leaves, shape, layout), leaves, weight)
        with torch.autocast(shape.device.type, enabled=False):
            leaves = _leaves(inputs, torch.float64, with_grad)
            exact = _results("mask", _call(leaves, shape, layout), leaves, weight)
    for what, ours, theirs, true in zip(_NAMES, found, plain, exact, strict=False):
        error, tolerance = _row_error(ours, true), max(_FLOOR[call.dtype], _TIMES_PLAIN * _row_error(theirs, true))
        if not error <= tolerance:
            window = "" if call.window is None else f" with a window of {call.window} tokens"
            return name, f"its {what} is off by {error:.1e}{window} (rounding explains {tolerance:.0e})"
    return name, None


def _inputs(shape: CallShape) -> tuple[list[Tensor], Tensor]:
    """q, k, v, maybe sinks, and the upstream gradient: numbers that bf16 holds, so equal in every dtype."""
    num_kv_heads = min(shape.num_kv_heads, MAX_KV_HEADS)
    num_heads, num_rows = num_kv_heads * (shape.num_heads // shape.num_kv_heads), SEGMENTS[-1][1]
    sizes: list[tuple[int, ...]] = [
        (1, num_heads, num_rows, shape.head_dim),
        (1, num_kv_heads, num_rows, shape.head_dim),
        (1, num_kv_heads, num_rows, shape.value_dim),
    ]
    if shape.sinks is not None:
        sizes.append((num_heads,))
    sizes.append((1, num_rows, num_heads, shape.value_dim))
    generator = torch.Generator().manual_seed(0)
    *inputs, weight = (torch.randn(size, generator=generator).bfloat16().to(shape.device) for size in sizes)
    # logits of about size one, for any scale of the model
    inputs[0] = (inputs[0] / (abs(shape.scale) * shape.head_dim**0.5)).bfloat16()
    return inputs, weight


def _leaves(inputs: list[Tensor], dtype: torch.dtype, with_grad: bool) -> list[Tensor]:
    return [x.to(dtype, copy=True).requires_grad_(with_grad) for x in inputs]


def _call(leaves: list[Tensor], shape: CallShape, layout: PackedLayout) -> AttentionCall:
    window = None if shape.window is None else min(shape.window, ACTIVE_WINDOW)
    query, key, value, *more = leaves
    sinks = more[0].requires_grad_(query.requires_grad and bool(shape.sinks)) if more else None
    return AttentionCall(query, key, value, layout, 0.0, shape.scale, window, shape.softcap, sinks)


def _results(name: str, call: AttentionCall, leaves: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The output and the gradients, each as rows of one head."""
    output = BACKENDS[name].attend(call)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad((output * weight.to(output.dtype)).sum(), wanted) if wanted else ()
    return [x.detach().double().reshape(-1, x.shape[-1]) for x in (output, *grads)]


def _row_error(x: Tensor, exact: Tensor) -> float:
    """The largest error of a row, relative to its size."""
    sizes = exact.norm(dim=1)
    return ((x - exact).norm(dim=1) / sizes.clamp(min=_LEAST_SHARE * sizes.square().mean().sqrt())).max().item()
