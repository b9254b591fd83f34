"""The masked sum's kernels, forward and backward, against sums in fp64 that are written out one token at a time."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.ops import token_sums as module
from fastdpo.ops.token_sums import Tokens, token_sums
from fastdpo.types import IGNORE_INDEX

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(num_rows, lengths, *, seed=0, weighted=True, scattered=True):
    """Values, labels and tokens; rows are used in any order, some by many tokens and some by none."""
    g = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    rows = torch.randint(num_rows, (num_tokens,), generator=g) if scattered else None
    weights = torch.rand(num_tokens, generator=g) if weighted else None
    values = [torch.randn(num_rows, generator=g) - 2, torch.rand(num_rows, generator=g)]
    values += [torch.randn(num_rows, generator=g) * 30, torch.rand(num_rows, generator=g) < 0.5]
    values += [torch.randn(num_rows, generator=g)]
    labels = torch.randint(100, (num_rows,), generator=g).masked_fill(torch.rand(num_rows, generator=g) < 0.2, -100)
    move = [None if x is None else x.to(DEVICE) for x in (ends, rows, weights, labels)]
    return [x.to(DEVICE) for x in values], move[3], Tokens(*move[:3])


def by_hand(values, labels, tokens, upstream):
    """fp64 sums of every value, lengths, and the gradient of the first value."""
    ends, num_rows = tokens.ends.tolist(), len(labels)
    rows = list(range(num_rows)) if tokens.rows is None else tokens.rows.tolist()
    weights = [1.0] * len(rows) if tokens.weights is None else tokens.weights.double().tolist()
    sums, grads = [[0.0] * (len(ends) - 1) for _ in values], [0.0] * num_rows
    lengths, read, kept = [], [x.double().tolist() for x in values], (labels != IGNORE_INDEX).tolist()
    for s, (start, stop) in enumerate(pairwise(ends)):
        for n in range(start, stop):
            for total, value in zip(sums, read, strict=True):
                total[s] += weights[n] * value[rows[n]]
            grads[rows[n]] += weights[n] * upstream[s].item()
        lengths.append(sum(kept[rows[n]] for n in range(start, stop)))
    return torch.tensor(sums, dtype=torch.float64), lengths, torch.tensor(grads, dtype=torch.float64)


CASES = {
    "several blocks of tokens": (1200, [600, 0, 1, 1023, 1024, 1025]),
    "rows used many times": (5, [400, 700]),
    "many short sequences": (257, [3] * 100 + [0, 0]),
    "one token": (1, [1]),
    "rows of which most are not used": (4000, [10, 20]),
}


@pytest.mark.parametrize(
    "weighted", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["weighted", "unweighted"]
)
@pytest.mark.parametrize(("num_rows", "lengths"), CASES.values(), ids=CASES)
def test_sums_lengths_and_gradients_are_those_of_fp64(num_rows, lengths, weighted):
    values, labels, tokens = problem(num_rows, lengths, weighted=weighted)
    upstream = torch.linspace(-2, 3, len(lengths), device=DEVICE)
    expected, counts, grads = by_hand(values, labels, tokens, upstream)
    leaf = values[0].requires_grad_()
    sums, found_lengths = token_sums(values, tokens, labels=labels, impl="triton")
    assert [x.dtype for x in sums] == [torch.float32] * 5
    assert found_lengths.tolist() == counts
    torch.testing.assert_close(torch.stack(sums).double().cpu(), expected, rtol=1e-7, atol=1e-6)
    assert [x.requires_grad for x in sums] == [True, False, False, False, False]
    (grad,) = torch.autograd.grad(sums[0], leaf, upstream)
    torch.testing.assert_close(grad.double().cpu(), grads, rtol=1e-7, atol=1e-6)


def test_sums_in_fp64_lose_nothing():
    values, labels, tokens = problem(3000, [2500, 1, 700], weighted=False)
    sums, _ = token_sums(values, tokens, dtype=torch.float64, impl="triton")
    expected, _, _ = by_hand(values, labels, tokens, torch.zeros(3))
    torch.testing.assert_close(torch.stack(sums).cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_a_token_is_its_own_row_where_no_rows_are_given(weighted):
    lengths = [0, 700, 1, 599]
    values, labels, tokens = problem(1300, lengths, weighted=weighted, scattered=False)
    upstream = torch.tensor([5.0, -1.0, 2.0, 0.5], device=DEVICE)
    expected, counts, grads = by_hand(values, labels, tokens, upstream)
    leaf = values[0].requires_grad_()
    sums, found_lengths = token_sums(values, tokens, labels=labels, impl="triton")
    torch.testing.assert_close(torch.stack(sums).double().cpu(), expected, rtol=1e-7, atol=1e-6)
    assert found_lengths.tolist() == counts
    torch.testing.assert_close(torch.autograd.grad(sums[0], leaf, upstream)[0].double().cpu(), grads, rtol=1e-7, atol=0)


@pytest.mark.parametrize("impl", ["triton", "tiled"])
@pytest.mark.parametrize("scattered", [True, False], ids=["rows", "no rows"])
def test_a_part_of_a_batch_gives_what_the_whole_gives_there(impl, scattered):
    """Sequences 2 to 4 use rows 150 to 349 and no others."""
    lengths, part_rows = [100, 50, 120, 80, 90], slice(150, 350 if scattered else 440)
    values, labels, tokens = problem(440, lengths, scattered=scattered)
    if scattered:
        tokens.rows[150:] = 150 + tokens.rows[150:] % 200
        tokens.rows[:150] %= 150
    upstream = torch.linspace(-1, 1, 5, device=DEVICE)
    expected, counts, grads = by_hand(values, labels, tokens, upstream)
    some = [value[part_rows] for value in values]
    leaf = some[0] = some[0].clone().requires_grad_()
    part = tokens.part(part_rows, slice(150, 440), slice(2, 5))
    sums, found_lengths = token_sums(some, part, labels=labels[part_rows], impl=impl)
    torch.testing.assert_close(torch.stack(sums).double().cpu(), expected[:, 2:], rtol=3e-7, atol=1e-5)
    assert found_lengths.tolist() == counts[2:]
    (grad,) = torch.autograd.grad(sums[0], leaf, upstream[2:])
    torch.testing.assert_close(grad.double().cpu(), grads[part_rows], rtol=3e-7, atol=1e-6)


def test_the_same_bits_come_out_every_time():
    values, labels, tokens = problem(300, [900, 1300, 2])
    leaf = values[0].requires_grad_()
    runs = []
    for _ in range(2):
        sums, _ = token_sums(values, tokens, labels=labels, impl="triton")
        runs.append([*sums, *torch.autograd.grad(sums[0].square().sum(), leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_row_that_is_not_there_is_not_read_and_makes_its_sequence_nan():
    values, labels, tokens = problem(10, [2, 2, 2])
    tokens.rows[0], tokens.rows[5] = 10**12, -(10**12)
    leaf = values[0].requires_grad_()
    sums, _ = token_sums(values, tokens, labels=labels, impl="triton")
    assert sums[0].isnan().tolist() == [True, False, True]
    assert torch.autograd.grad(sums[0].sum(), leaf)[0].isfinite().all()


def test_no_sequences_and_no_rows():
    values, labels, tokens = problem(0, [0, 0], scattered=False)
    sums, lengths = token_sums(values, tokens, labels=labels, impl="triton")
    assert [x.tolist() for x in sums] == [[0.0, 0.0]] * 5
    assert lengths.tolist() == [0, 0]
    values, labels, tokens = problem(4, [])
    leaf = values[0].requires_grad_()
    sums, lengths = token_sums(values, tokens, labels=labels, impl="triton")
    assert [x.shape for x in sums] == [(0,)] * 5
    assert torch.autograd.grad(sums[0].sum(), leaf)[0].tolist() == [0.0] * 4


def test_weights_that_want_a_gradient_get_one():
    values, _, tokens = problem(50, [30, 20])
    tokens.weights.requires_grad_()
    sums, _ = token_sums(values[:1], tokens, impl="triton")
    (grad,) = torch.autograd.grad(sums[0].sum(), tokens.weights)
    torch.testing.assert_close(grad, values[0][tokens.rows])


def test_it_is_one_operator_to_torch():
    """What torch.library.opcheck asks: schema, fake tensors, autograd; and nothing beside it is dispatched."""
    values, labels, tokens = problem(40, [30, 0, 12])
    place = (tokens.ends, tokens.rows, tokens.weights, 0, 0, -1)
    leaf = values[0].requires_grad_()
    torch.library.opcheck(module._sums_op, (leaf, values[1:2], labels, *place, torch.float32))
    torch.library.opcheck(module._grads_op, (torch.ones(3, device=DEVICE), 40, *place, torch.float32))

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    seen = []
    with Counted():
        sums, _ = token_sums(values[:1], tokens, labels=labels, impl="triton")
        torch.autograd.grad(sums[0], leaf, torch.ones_like(sums[0]))
    views = ("aten::detach", "aten::unbind.int", "aten::ones_like")
    seen = [name for name in seen if name not in views]
    assert seen == ["fastdpo::token_sums", "fastdpo::row_grads"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_never_waits_for_the_device():
    values, labels, tokens = problem(3000, [1500, 700])
    leaf = values[0].requires_grad_()

    def run():
        sums, _ = token_sums(values, tokens, labels=labels)
        torch.autograd.grad(sums[0].sum(), leaf)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
