"""The implementations by name, and the devices and dtypes that each supports.

An engine is an implementation's set of plain functions on validated tensors of one dtype. The code that uses them
(autograd, chunks, sums) is shared by all engines, in `autograd.py`, `gradients.py` and `eager.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.ops.gradients import LogitGrads
from fastdpo.ops.matmul import accumulator_dtype
from fastdpo.ops.shard import Shard
from fastdpo.ops.tiled import TiledLogitGrads, skip_blocks, tiled_forward
from fastdpo.ops.tiled_choices import TiledChoiceGrads, tiled_choice_forward
from fastdpo.ops.tiled_eager import GROUP_BYTES, WORKSPACE_BYTES, tiled_forward_with_grads
from fastdpo.ops.tiled_skipping import tiled_skipping_gradients
from fastdpo.ops.vocab_parallel import sharded


class Engine(NamedTuple):
    """T rows, V vocabulary; `head` is a Head, `bias` may be None."""

    # (hidden_states, lm_head_weight, bias, labels, head, adapter_weight=None) -> values, each (T,); with an adapter
    # weight (V, r), hidden_states is (T, H + r) or wider, and its columns beyond H multiply the adapter's
    forward: Callable[..., dict[str, Tensor]]
    # (out, hidden_states, lm_head_weight, bias, labels, head, combine=None, adapter_weight=None): the same, and D,
    # eq. (9), of all rows into out (T, V); `combine` makes the values of the whole vocabulary from those of the
    # engine's part
    forward_with_grads: Callable[..., dict[str, Tensor]]
    # (hidden_states, lm_head_weight, bias, labels, lse, head, row_scale)
    logit_grads: Callable[..., LogitGrads]
    # (hidden_states, lm_head_weight, bias, labels, lse, head, row_scale, kept, *dtypes) -> dH, dW, db over kept tiles
    skipping_gradients: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
    # (hidden_states, lm_head_weight, bias, labels, head) -> values as of `forward`; labels, logps and is_top1 (T, K)
    choice_forward: Callable[..., dict[str, Tensor]]
    # (hidden_states, lm_head_weight, bias, labels, rows, head), rows a ChoiceRows
    choice_grads: Callable[..., LogitGrads]
    # (hidden_states) -> rows and vocabulary ids of a unit of skipping
    skip_blocks: Callable[[Tensor], tuple[int, int]]
    grads_dtype: Callable[[torch.dtype], torch.dtype]  # of D in `out`, from the operands' dtype
    row_multiple: int  # rows of `out` are padded to a multiple of so many elements
    chunk_multiple: int  # rows of `out` that a kernel takes at once: other numbers leave part of its last block empty
    column_multiple: int  # that wide hidden states are padded to: the copy engine takes rows of whole 16 bytes
    workspace_bytes: int  # default size of `out`
    most_workspace_bytes: int  # and where each chunk of rows reads and writes the sums of a large dW
    most_group_bytes: int  # and where a group would not fit


def _tiled() -> Engine:
    return Engine(
        tiled_forward,
        tiled_forward_with_grads,
        TiledLogitGrads,
        tiled_skipping_gradients,
        tiled_choice_forward,
        TiledChoiceGrads,
        skip_blocks,
        accumulator_dtype,
        1,
        1,
        1,
        WORKSPACE_BYTES,
        WORKSPACE_BYTES,
        GROUP_BYTES,
    )


def _triton() -> Engine:
    """Brings in triton."""
    from fastdpo.ops import fused

    return Engine(
        fused.fused_forward,
        fused.fused_forward_with_grads,
        fused.FusedLogitGrads,
        fused.fused_skipping_gradients,
        fused.fused_choice_forward,
        fused.FusedChoiceGrads,
        fused.skip_blocks,
        lambda dtype: dtype,
        fused.ROW_MULTIPLE,
        fused.CHUNK_MULTIPLE,
        fused.COLUMN_MULTIPLE,
        fused.WORKSPACE_BYTES,
        max(fused.WORKSPACE_BYTES, fused.MOST_WORKSPACE_BYTES),
        0,
    )


ENGINES: dict[str, Callable[[], Engine]] = {
    "triton": _triton,
    "tiled": _tiled,
}
NAMES = (*ENGINES, "reference")  # the last is plain PyTorch with full logits, `reference.py`
IMPLS = ("auto", *NAMES)  # what the argument `impl` takes


def engine_of(impl: str, shard: Shard | None = None) -> Engine:
    """The engine of that name, for a whole vocabulary or for this process's part of one."""
    return sharded(ENGINES[impl](), shard)


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation for `impl` on this device and dtype; raises ValueError if a named one cannot run."""
    if impl not in ("auto", "triton"):
        return impl
    refusal = _triton_refusal(device, dtype)
    if impl == "auto":
        return "triton" if refusal is None and device.type == "cuda" else "tiled"
    if refusal is not None:
        raise ValueError(f'impl="triton" {refusal}; use "tiled" or "auto"')
    return impl


def _triton_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot run, as the end of a sentence; None if they can."""
    if dtype == torch.float64:
        return "takes fp16, bf16 and fp32, got torch.float64"
    if device.type not in ("cuda", "cpu"):
        return f"needs a CUDA device, got {device}"
    if importlib.util.find_spec("triton") is None:
        return 'needs the triton package, which is not installed (pip install "fastdpo[triton]")'
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is not None or capability < (8, 0):
            return f"needs an NVIDIA GPU of compute capability 8.0 or more, got {torch.cuda.get_device_name(device)}"
        return None
    from fastdpo.kernels.logits import is_interpreted

    return None if is_interpreted() else "needs a CUDA device (or TRITON_INTERPRET=1 set before the first use), got cpu"
