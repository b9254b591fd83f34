"""Peak memory of the head op by measurement: it grows with T and with V, never with their product."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from head_cases import BF16, FP32, NAMES, plain_logps

from fastdpo import linear_logps
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.ops.sequence_loss import GroupEnd, sequence_loss

CUDA = torch.cuda.is_available()
SIZES = [(1024, 16384), (1024, 32768), (2048, 16384), (4096, 32768)]  # T, V
LENGTHS = (1024, 2048, 4096)
GPU_SIZES = [(8192, 65536), (8192, 131072), (16384, 65536), (16384, 131072)]
HIDDEN = 16


def by(impl):
    def logps(*args):
        return linear_logps(*args, impl=impl).logps

    return logps


def step(logps_fn, T, V, dtype, *, frozen_head, device="cpu"):
    """Forward and backward for a given gradient of the log-probs, without anything else that would take memory."""
    g = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(T, HIDDEN, generator=g).to(device, dtype).requires_grad_()
    weight = torch.randn(V, HIDDEN, generator=g).to(device, dtype).requires_grad_(not frozen_head)
    labels = torch.randint(V, (T,), generator=g).to(device)
    upstream = torch.randn(T, generator=g).to(device)
    leaves = [hidden_states] if frozen_head else [hidden_states, weight]

    def run():
        return torch.autograd.grad(logps_fn(hidden_states, weight, labels), leaves, upstream)

    return run


def bound(impl, T, V, dtype, *, frozen_head):
    """workspace + accumulators + outputs, in bytes; sums are fp32."""
    from fastdpo.ops import fused, tiled, tiled_eager

    H, itemsize = HIDDEN, dtype.itemsize
    outputs = itemsize * (T * H + (0 if frozen_head else V * H)) + 4 * T  # dH, dW, logps
    row_numbers = 16 * 4 * T  # max, sumexp, label logit, two parts of lse, c, masks and what they are made from
    if impl == "triton":
        partials = 8 * T * -(-V // 64)  # two numbers per row and tile; no tile of the table is narrower than 64
        workspace = fused.WORKSPACE_BYTES  # D, and without a frozen head one block of dW
        return workspace + partials + 4 * T * H + outputs + row_numbers
    if frozen_head:  # D of a chunk of rows, made in forward
        workspace, upcast = tiled_eager.WORKSPACE_BYTES, 4 * min(tiled.MAX_WEIGHT_ELEMENTS, V * H)
        accumulators = 4 * T * H
    else:
        tiling = tiled.choose_tiling(torch.empty(T, H, device="meta"), torch.empty(V, H, device="meta"))
        workspace, upcast = 4 * tiled.MAX_TILE_ELEMENTS, 4 * tiling.block_vocab * H
        accumulators = 4 * T * H + 4 * tiling.block_vocab * H
    operands = upcast + 3 * 4 * tiled.BLOCK_ROWS * H  # W's block, H's, and c * H
    return workspace + accumulators + outputs + row_numbers + operands


@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen_head"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=NAMES.get)
@pytest.mark.parametrize(("T", "V"), SIZES)
def test_tiled_stays_within_workspace_accumulators_and_outputs(T, V, dtype, frozen_head):
    peak = peak_live_bytes(step(by("tiled"), T, V, dtype, frozen_head=frozen_head))
    assert peak <= bound("tiled", T, V, dtype, frozen_head=frozen_head)


def loss_step(T, V, workspace_bytes):
    """The loss of the trainers, pairs of 2 x 32 tokens, with its gradients."""
    g = torch.Generator().manual_seed(0)
    hidden_states, weight = (torch.randn(n, HIDDEN, generator=g).requires_grad_() for n in (T, V))
    labels, cu_seqlens = torch.randint(V, (T,), generator=g), torch.arange(0, T + 1, 32)
    ends = [GroupEnd(64 * i, 64 * i, 2 * i) for i in range(1, T // 64 + 1)]

    def loss_of(sums, *_):
        return -F.logsigmoid(sums.view(-1, 2).diff(dim=1)).sum()

    def run():
        args = (hidden_states, weight, labels, cu_seqlens, ends, loss_of)
        loss, _ = sequence_loss(*args, workspace_bytes=workspace_bytes)
        return torch.autograd.grad(loss, [hidden_states, weight])

    return run


def test_the_peak_of_a_loss_grows_with_the_workspace_and_not_with_tokens_times_vocabulary():
    V, sizes = 8192, (2**22, 2**23)
    small, large = ([peak_live_bytes(loss_step(T, V, size)) for T in LENGTHS] for size in sizes)
    per_token = 4 * (2 * HIDDEN + 40)  # dH, what it is summed in, and numbers of a row
    assert 20 * per_token < 4 * V  # its logits, were they kept
    for peaks in (small, large):
        for (T, peak), (more, higher) in pairwise(zip(LENGTHS, peaks, strict=True)):
            assert 0 < higher - peak <= per_token * (more - T)
    for low, high in zip(small, large, strict=True):
        assert high - low == pytest.approx(sizes[1] - sizes[0], rel=0.2)


@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen_head"])
def test_plain_pytorch_breaks_the_bound(frozen_head):
    T, V = SIZES[0]  # where it is nearest to it
    peak = peak_live_bytes(step(plain_logps, T, V, FP32, frozen_head=frozen_head))
    assert peak > 3 * bound("tiled", T, V, FP32, frozen_head=frozen_head)
    assert peak >= 3 * 4 * T * V  # logits, log-softmax and a gradient: the counter sees what is inside the operators


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device; Triton's interpreter copies its arguments")
@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen_head"])
@pytest.mark.parametrize("impl", ["triton", "tiled"])
@pytest.mark.parametrize(("T", "V"), GPU_SIZES)
def test_peak_on_a_gpu_stays_within_workspace_accumulators_and_outputs(T, V, impl, frozen_head):
    peak = peak_live_bytes(step(by(impl), T, V, BF16, frozen_head=frozen_head, device="cuda"), "cuda")
    casts = BF16.itemsize * 2**21 if impl == "tiled" else 0  # D as the matrix units take it, one tile
    limit = bound(impl, T, V, BF16, frozen_head=frozen_head) + casts + 16 * 2**20  # the allocator rounds up, to 1 MiB
    assert peak <= limit
    assert limit < 2 * T * V  # bytes of the logits alone
