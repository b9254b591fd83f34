"""The counter of peak live bytes, on functions whose peak can be told by hand."""

import os
import subprocess
import sys

import pytest
import torch

from fastdpo.evidence.memory import peak_live_bytes

N = 1000
MATRIX = 4 * N * N  # bytes
A = torch.ones(N, N)


def two_at_once():
    first = torch.empty(N, N)
    second = torch.empty(N, N)
    del first
    return torch.empty(N, N).add_(second)


def one_after_the_other():
    for _ in range(5):
        torch.empty(N, N)


def inside_an_operator():
    return A.log_softmax(-1).exp().sum()  # two matrices and a number; neither has a name


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x + 1, x + 2)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad


def saved_for_backward():
    x = torch.ones(N, N, requires_grad=True)  # one; forward adds three, backward an expanded gradient and a product
    return torch.autograd.grad(Doubled.apply(x).sum(), x)


@torch.library.custom_op("fastdpo_tests::scratch", mutates_args=())
def _with_scratch(x: torch.Tensor) -> torch.Tensor:
    scratch = torch.empty(3, N, N)
    return x + scratch[0, 0, 0] * 0


@pytest.mark.parametrize(
    ("function", "num_matrices"),
    [
        (two_at_once, 2),
        (one_after_the_other, 1),
        (inside_an_operator, 2),
        (lambda: _with_scratch(A), 4),
        (lambda: A.view(-1)[:10], 0),
        (lambda: torch.mm(A, A, out=torch.empty(N, N)), 1),
    ],
    ids=["two at once", "one by one", "inside operators", "custom op", "view", "out"],
)
def test_peak_is_what_one_counts_by_hand(function, num_matrices):
    assert num_matrices * MATRIX <= peak_live_bytes(function) <= num_matrices * MATRIX + 4096


def test_what_autograd_saves_counts():
    peak = peak_live_bytes(saved_for_backward)
    assert peak >= 4 * MATRIX  # x, x + 1, x + 2 and the product


def test_tensors_from_before_neither_count_nor_make_room():
    held = []

    def function():
        before = torch.empty(4, N, N)
        return torch.empty(N, N), before

    def lets_go_of_it():
        held.pop()
        return torch.empty(N, N)

    assert peak_live_bytes(function) >= 5 * MATRIX
    held.extend([torch.empty(4, N, N), torch.empty(4, N, N)])  # one for each of the two calls
    assert MATRIX <= peak_live_bytes(lets_go_of_it) <= MATRIX + 4096


def test_a_second_measurement_is_not_disturbed_by_the_first():
    kept = []
    for _ in range(3):
        assert MATRIX <= peak_live_bytes(lambda: kept.append(torch.empty(N, N))) <= MATRIX + 4096


def test_an_error_passes_through_and_the_next_measurement_works():
    def fails_at_the_second_call(calls=[]):  # noqa: B006
        calls.append(None)
        if len(calls) > 1:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        peak_live_bytes(fails_at_the_second_call)
    assert peak_live_bytes(two_at_once) >= 2 * MATRIX


def test_nothing_is_written_to_stderr_but_what_the_function_writes():
    code = (
        "import sys, torch; from fastdpo.evidence.memory import peak_live_bytes\n"
        "peak_live_bytes(lambda: print('mine', file=sys.stderr) or torch.empty(10))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stderr == "mine\nmine\n"
    assert done.stdout == ""


def test_a_device_without_a_counter_is_refused():
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        peak_live_bytes(lambda: None, "meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_gpu_is_what_one_counts_by_hand():
    def function():
        first = torch.empty(64, N, N, device="cuda")
        second = torch.empty(64, N, N, device="cuda")
        del first
        return second.sum()

    assert 2 * 64 * MATRIX <= peak_live_bytes(function, "cuda") <= 2 * 64 * MATRIX + 8 * 2**20
