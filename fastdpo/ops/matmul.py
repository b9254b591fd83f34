"""Matmuls with low-precision operands and fp32 accumulation, for each kind of device.

CUDA multiplies bf16 and fp16 on the matrix units into an fp32 result (`out_dtype`). On other devices the operands are
upcast first; the sums are the same, and callers need no special case.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

MAX_CAST_ELEMENTS = 2**22  # elements of a weight to upcast at once, if necessary
MAX_PRODUCT_ELEMENTS = 2**22  # of a product that is added to sums in a step of its own: 16 MiB, which stay in L2


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for everything up to fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def operand(x: Tensor) -> Tensor:
    """`x` in the operand dtype of this device's matmul; keep the result if it is used more than once."""
    return x if x.is_cuda else x.to(accumulator_dtype(x.dtype))


def operand_blocks(weight: Tensor) -> Iterator[slice]:
    """Number of rows of `weight` to convert to operands at once: all rows if no copy is made."""
    num_rows, block = len(weight), len(weight)
    if operand(weight[:1]).dtype != weight.dtype:
        block = max(1, MAX_CAST_ELEMENTS // weight.shape[1])
    for start in range(0, num_rows, block):
        yield slice(start, min(start + block, num_rows))


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """`out = beta * out + alpha * a @ b` in place, summed in out's dtype; with beta 0 the old contents are ignored.

    Args:
        out: (M, N) fp32 or fp64.
        a: (M, K), b: (K, N), both made by `operand`.
    """
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    elif beta == 0 and alpha == 1:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _addmm_takes_wider_sums(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, beta=beta, out=out)
    else:
        block = max(1, MAX_PRODUCT_ELEMENTS // out.shape[1])
        for start in range(0, len(out), block):
            some = out[start : start + block]
            product = torch.mm(a[start : start + block], b, out_dtype=out.dtype)
            if beta == 0:
                torch.mul(product, alpha, out=some)
            else:
                (some if beta == 1 else some.mul_(beta)).add_(product, alpha=alpha)


def product_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """Bytes allocated by adding a product of `dtype` operands to wider sums; they are part of a pass's workspace."""
    if device.type != "cuda" or dtype == accumulator_dtype(dtype) or _addmm_takes_wider_sums(device, dtype):
        return 0
    return MAX_PRODUCT_ELEMENTS * accumulator_dtype(dtype).itemsize


@functools.cache
def _addmm_takes_wider_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm can add to fp32 sums with `dtype` operands; some torch versions require sums in `dtype`."""
    x, sums = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(sums, x, x, out_dtype=torch.float32, out=sums)
    except (RuntimeError, TypeError):
        return False
    return True
