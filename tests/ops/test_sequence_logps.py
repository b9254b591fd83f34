"""sequence_logps: sums over sequences, with shared rows, weights and ignored labels."""

import functools

import pytest
import torch
from head_cases import FP32, Case, make_inputs

from fastdpo import linear_logps, sequence_logps
from fastdpo.types import IGNORE_INDEX

IMPLS = ("reference", "tiled", "triton")
CUDA = torch.cuda.is_available()


def inputs(impl, T=6, V=37, ignored="none"):
    device = "cuda" if CUDA and impl == "triton" else "cpu"
    leaves, labels, _ = make_inputs(Case(T, 16, V, FP32, ignored=ignored), 0, device)
    return leaves["hidden_states"], leaves["lm_head_weight"], labels, functools.partial(torch.tensor, device=device)


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_and_lengths_follow_cu_seqlens(impl):
    hidden_states, weight, labels, tensor = inputs(impl)
    labels[1] = IGNORE_INDEX
    found = sequence_logps(hidden_states, weight, labels, tensor([0, 3, 3, 6]), impl=impl)
    logps = found.tokens.logps.tolist()
    assert found.sums.dtype == torch.float32
    assert found.sums.tolist() == pytest.approx([logps[0] + logps[2], 0.0, logps[3] + logps[4] + logps[5]], rel=1e-6)
    assert found.lengths.tolist() == [2, 0, 3]
    assert torch.equal(found.tokens.logps, linear_logps(hidden_states, weight, labels, impl=impl).logps)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_shared_row_counts_in_both_sequences_and_weights_scale_tokens(impl):
    hidden_states, weight, labels, tensor = inputs(impl, T=4)
    rows, cu_seqlens, weights = tensor([0, 1, 2, 0, 3]), tensor([0, 3, 5]), tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    found = sequence_logps(hidden_states, weight, labels, cu_seqlens, rows=rows, weights=weights, impl=impl)
    x, a, _, c = found.tokens.logps.tolist()
    assert found.sums.tolist() == pytest.approx([x + a / 2, 2 * x + c], rel=1e-6)
    assert found.lengths.tolist() == [3, 2]

    upstream = tensor([3.0, -1.0])
    grads = torch.autograd.grad((found.sums * upstream).sum(), [hidden_states, weight])
    exact = [hidden_states.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    logps = (exact[0] @ exact[1].T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    loss = 3 * (logps[0] + logps[1] / 2) - (2 * logps[0] + logps[3])
    for ours, expected in zip(grads, torch.autograd.grad(loss, exact), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_and_token_logps_are_both_differentiable(impl):
    hidden_states, weight, labels, tensor = inputs(impl)
    found = sequence_logps(hidden_states, weight, labels, tensor([0, 2, 6]), impl=impl)
    both = torch.autograd.grad(found.sums.sum() + found.tokens.logps.sum(), hidden_states)[0]
    once = torch.autograd.grad(linear_logps(hidden_states, weight, labels, impl=impl).logps.sum(), hidden_states)[0]
    torch.testing.assert_close(both, 2 * once)


def test_long_sums_are_as_exact_as_fp32_holds():
    """A difference of running sums would be off by the rounding of the whole batch, not of the sequence."""
    hidden_states, weight, labels, _ = inputs("tiled", T=4000)
    cu_seqlens = torch.tensor([0, 3990, 4000])
    found = sequence_logps(hidden_states.detach(), weight.detach(), labels, cu_seqlens)
    exact = found.tokens.logps.double()
    expected = torch.stack([exact[:3990].sum(), exact[3990:].sum()]).float()
    torch.testing.assert_close(found.sums, expected, rtol=torch.finfo(FP32).eps, atol=0)  # the last bit, at a tie


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("cu_seqlens", "sums"), [([0], 0), ([0, 0, 0], 2)])
def test_no_tokens_and_no_sequences(impl, cu_seqlens, sums):
    hidden_states, weight, labels, tensor = inputs(impl, T=0)
    found = sequence_logps(hidden_states, weight, labels, tensor(cu_seqlens), impl=impl)
    assert found.sums.tolist() == [0.0] * sums
    assert found.lengths.tolist() == [0] * sums
    found.sums.sum().backward()
    assert (weight.grad == 0).all()


H, W, L, CU = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    ("cu_seqlens", "settings", "message"),
    [
        (CU[None], {}, r"cu_seqlens must have shape \(S \+ 1,\), got \(1, 3\)"),
        (CU[:0], {}, r"cu_seqlens must have shape \(S \+ 1,\).*got none"),
        (CU.float(), {}, "cu_seqlens must hold integers"),
        (torch.tensor([0, 3]), {}, r"cu_seqlens must rise from 0 to the number of tokens \(4\), got \[0, 3\]"),
        (torch.tensor([0, 3, 2, 4]), {}, "cu_seqlens must rise"),
        (CU, {"rows": torch.tensor([0, 1, 2, 4])}, r"rows must lie in \[0, 4\), got 0 to 4"),
        (CU, {"rows": torch.tensor([0.0, 1, 2, 3])}, "rows must hold integers"),
        (CU, {"weights": torch.ones(3)}, r"weights must have one entry per token, shape \(4,\), got \(3,\)"),
        (CU, {"rows": torch.arange(4), "weights": torch.ones(4, 1)}, "weights must have one entry per token"),
        (CU, {"softcap": -1.0}, "softcap must be"),
    ],
)
def test_a_mistake_is_named(cu_seqlens, settings, message):
    with pytest.raises(ValueError, match=message):
        sequence_logps(H, W, L, cu_seqlens, **settings)
