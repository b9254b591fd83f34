"""Matrix products whose sums run in another order, and in which one hangs on the shapes and strides of the operands.

Stands in for CPUs that this machine is not: every BLAS chooses its kernel by them. The same product of the same
tensors has the same bits every time; the same row among other rows need not. Importing this module installs it, for
products of dense CPU tensors through the dispatcher; conftest.py imports it where FASTDPO_TEST_SUMS=other.
"""

import warnings

import torch

KINDS = 5  # of orders; the first is torch's own


def _in_another_order(a, b):
    """(..., M, K) and (..., K, N) with the same product, their inner dimension permuted alike."""
    (M, K), N = a.shape[-2:], b.shape[-1]
    kind = (7 * M + 3 * N + K + 2 * (a.stride(-1) == 1) + (b.stride(-1) == 1)) % KINDS
    if K < 2 or kind == 0:
        return a, b
    if kind % 2:
        return a.flip(-1), b.flip(-2)
    return a.roll(K // kind + 1, -1), b.roll(K // kind + 1, -2)


def _product(start, a, b, **factors):
    return torch.ops.aten.baddbmm.default(start, *_in_another_order(a, b), **factors)  # the one that stays torch's own


def _mm(a, b):
    return _bmm(a[None], b[None])[0]


def _bmm(a, b):
    return _product(a.new_empty(()).expand(len(a), a.shape[1], b.shape[2]), a, b, beta=0)


def _addmm(start, a, b, *, beta=1, alpha=1):
    return _product(start.expand(len(a), b.shape[1])[None], a[None], b[None], beta=beta, alpha=alpha)[0]


_library = torch.library.Library("aten", "IMPL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # that torch's kernels are overridden, which is the purpose
    for _name, _function in (("mm", _mm), ("bmm", _bmm), ("addmm", _addmm)):
        _library.impl(_name, _function, "CPU")
