"""The sparse backward: exact over what is kept, and it touches nothing else."""

import math

import pytest
import torch
from closeness import assert_same_to_rounding
from covering import every_pair
from head_cases import BF16, FP16, FP32, Case, assert_at_most_twice_plain, exact_logps, make_inputs

from fastdpo.kernels import products, sparse
from fastdpo.kernels.forward import fused_forward
from fastdpo.kernels.launch import device_blocks
from fastdpo.kernels.logits import describe
from fastdpo.kernels.products import product_blocks
from fastdpo.types import IGNORE_INDEX

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAVES = ("hidden_states", "lm_head_weight", "bias")
FEW_ELEMENTS = 1  # a workspace as small as it gets: two blocks of the outer side


def block_shape(hidden_states):
    blocks = device_blocks(hidden_states, "skipping")
    return blocks.block_t, blocks.block_v


def kept_of(hidden_states, weight, share, seed=0):
    block_t, block_v = block_shape(hidden_states)
    shape = (-(-hidden_states.shape[0] // block_t), -(-weight.shape[0] // block_v))
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share).to(hidden_states.device)


def sparse_gradients(case, leaves, labels, upstream, kept, wanted=(1, 1, 1), max_elements=2**25, poison=()):
    """dH, dW and db (None where not wanted) of sum(upstream * logps).

    `poison`: (name, rows) that are nan by the time of the backward pass.
    """
    inputs = {name: x.detach().clone() for name, x in leaves.items()}
    values = fused_forward(*map(inputs.get, LEAVES), labels, case.logit_scale, case.softcap, ())
    row_scale = -upstream * case.logit_scale * torch.exp(-values["lse_rest"])
    row_scale = row_scale.masked_fill(labels == IGNORE_INDEX, 0.0)
    for name, rows in poison:
        inputs[name][rows] = torch.nan
    block_t, block_v = block_shape(inputs["hidden_states"])
    dtypes = [case.dtype if wants else None for wants in wanted]
    return sparse.sparse_head_gradients(
        *map(inputs.get, LEAVES), labels, values["lse_whole"], values["lse_rest"], row_scale, kept,
        block_t=block_t, block_v=block_v, logit_scale=case.logit_scale, softcap=case.softcap,
        hidden_dtype=dtypes[0], weight_dtype=dtypes[1], bias_dtype=dtypes[2], max_tile_elements=max_elements,
    )  # fmt: skip


def all_kept_logps(max_elements, **fixed):
    """The log-probs with the sparse backward, for the bar that every implementation of the op is held to."""

    def logps(hidden_states, weight, labels, *, bias=None, logit_scale=1.0, softcap=None):
        case = Case(*hidden_states.shape, weight.shape[0], hidden_states.dtype, bias is not None, logit_scale, softcap)

        class Logps(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *leaves):
                values = fused_forward(hidden_states, weight, bias, labels, logit_scale, softcap, ())
                ctx.leaves = leaves
                return values["logps"]

            @staticmethod
            def backward(ctx, upstream):
                leaves = dict(zip(LEAVES, ctx.leaves, strict=False))
                kept = torch.ones_like(kept_of(hidden_states, weight, 1.0))
                wanted = (1, 1, bias is not None)
                grads = sparse_gradients(case, leaves, labels, upstream, kept, wanted, max_elements)
                return grads[: len(ctx.leaves)]

        return Logps.apply(hidden_states, weight, *([] if bias is None else [bias]))

    return logps


def masked_truth(case, leaves, labels, upstream, kept, dtype):
    """Gradients over the kept tiles, from logits' gradients in fp64 rounded to `dtype` and multiplied in it."""
    hidden_states, weight = leaves["hidden_states"].detach(), leaves["lm_head_weight"].detach()
    logits = torch.zeros(case.T, case.V, dtype=torch.float64, device=DEVICE, requires_grad=True)
    a = hidden_states.double() @ weight.double().T
    one = torch.eye(case.V, dtype=torch.float64, device=DEVICE)
    bias = leaves["bias"].detach().double() if case.has_bias else 0.0
    logps = exact_logps(a + bias + logits, one, labels, **case.settings)
    (grad,) = torch.autograd.grad((logps * upstream).sum(), logits)
    block_t, block_v = block_shape(hidden_states)
    mask = kept.repeat_interleave(block_t, 0)[: case.T].repeat_interleave(block_v, 1)[:, : case.V]
    grad = (grad * mask).to(dtype)
    return grad @ weight.to(dtype), grad.T @ hidden_states.to(dtype), grad.sum(0)


def made_of(grads):
    """Those that were asked for."""
    return [grad for grad in grads if grad is not None]


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))


CASES = [
    Case(67, 40, 257, FP32),
    Case(130, 150, 321, BF16),
    Case(67, 40, 257, FP16),
    Case(67, 40, 257, FP32, has_bias=True, logit_scale=1.5, softcap=4.0),
    Case(67, 40, 257, BF16, has_bias=True, logit_scale=1.5, softcap=4.0),
    Case(67, 40, 257, FP32, logit_std=30.0),
    Case(1, 16, 7, FP32, ignored="none"),
    Case(0, 40, 257, BF16, has_bias=True),
    Case(67, 40, 257, BF16, ignored="all"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_with_every_tile_kept_it_is_as_exact_as_plain_pytorch(case):
    assert_at_most_twice_plain(all_kept_logps(2**25), case, DEVICE)


@pytest.mark.parametrize(
    *every_pair(case=CASES[:5], share=[0.2, 0.7], wanted=[(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]),
    ids=lambda value: getattr(value, "id", str(value)),
)
def test_dropped_tiles_are_missing_and_nothing_else_is(case, share, wanted):
    leaves, labels, upstream = make_inputs(case, 0, DEVICE)
    kept = kept_of(leaves["hidden_states"], leaves["lm_head_weight"], share)
    exact = masked_truth(case, leaves, labels, upstream, kept, torch.float64)
    plain = masked_truth(case, leaves, labels, upstream, kept, case.dtype)
    grads = sparse_gradients(case, leaves, labels, upstream, kept, wanted)
    for name, found, should, rounded, wants in zip(("dH", "dW", "db"), grads, exact, plain, wanted, strict=True):
        assert (found is not None) == bool(wants)
        if wants:
            assert found.dtype == case.dtype
            assert error(found, should) <= 2 * error(rounded, should) + 1e-6, name


def three_by_five(dtype, **head):
    """Inputs of three row blocks and a rest, five vocabulary tiles and a rest, all tiles kept."""
    block_t, block_v = block_shape(torch.empty(0, dtype=dtype, device=DEVICE))
    case = Case(3 * block_t + 5, 24, 5 * block_v + 3, dtype, **head)
    leaves, labels, upstream = make_inputs(case, 0, DEVICE)
    kept = kept_of(leaves["hidden_states"], leaves["lm_head_weight"], 1.1)
    return case, leaves, labels, upstream, kept, slice(block_t, 2 * block_t), slice(2 * block_v, 3 * block_v)


@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0)], ids=["all", "dH"])
def test_what_is_not_kept_is_not_read_and_its_gradient_is_zero(wanted):
    case, leaves, labels, upstream, kept, rows, vocab = three_by_five(BF16, has_bias=True)
    kept[1], kept[:, 2], kept[3, 4] = False, False, False
    before = sparse_gradients(case, leaves, labels, upstream, kept, wanted)
    poison = [("hidden_states", rows), ("lm_head_weight", vocab), ("bias", vocab)]
    after = sparse_gradients(case, leaves, labels, upstream, kept, wanted, poison=poison)
    for one, other in zip(before, after, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert not after[0][rows].any()
    if wanted[1]:
        assert not after[1][vocab].any()
        assert not after[2][vocab].any()


def test_row_blocks_whose_pairs_have_no_weight_are_not_read():
    case, leaves, labels, upstream, kept, rows, _ = three_by_five(FP32)
    upstream[rows] = 0.0
    without = kept.clone()
    without[1] = False
    should = sparse_gradients(case, leaves, labels, upstream, without, (1, 1, 0))
    found = sparse_gradients(case, leaves, labels, upstream, kept, (1, 1, 0), poison=[("hidden_states", rows)])
    assert_same_to_rounding(found[:2], should[:2])


@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0), (0, 1, 0)], ids=["all", "dH", "dW"])
def test_nothing_kept_gives_zeros(wanted):
    case = Case(67, 40, 257, FP32, has_bias=True)
    leaves, labels, upstream = make_inputs(case, 0, DEVICE)
    kept = kept_of(leaves["hidden_states"], leaves["lm_head_weight"], 0.0)
    for grad, wants in zip(sparse_gradients(case, leaves, labels, upstream, kept, wanted), wanted, strict=True):
        assert (grad is not None and not grad.any()) if wants else grad is None


@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0)], ids=["all", "dH"])
@pytest.mark.parametrize("dtype", [pytest.param(FP32, marks=pytest.mark.slow), BF16], ids=["fp32", "bf16"])
def test_old_contents_of_the_workspace_change_no_bit_and_its_size_no_number(dtype, wanted, monkeypatch):
    case = Case(67, 40, 521, dtype, has_bias=True, softcap=4.0)
    leaves, labels, upstream = make_inputs(case, 0, DEVICE)
    kept = kept_of(leaves["hidden_states"], leaves["lm_head_weight"], 0.6)
    as_it_is = sparse_gradients(case, leaves, labels, upstream, kept, wanted)
    made = []

    def full_of_nan(shape, like, dtype):
        made.append(math.prod(shape))
        return torch.full(shape, torch.nan, dtype=dtype, device=like.device)

    monkeypatch.setattr(sparse, "scratch", full_of_nan)
    again = sparse_gradients(case, leaves, labels, upstream, kept, wanted)
    in_rounds = sparse_gradients(case, leaves, labels, upstream, kept, wanted, FEW_ELEMENTS)
    for before, after in zip(as_it_is, again, strict=True):
        assert before is after is None or torch.equal(before, after)
    assert_same_to_rounding(made_of(in_rounds), made_of(as_it_is))
    block_t, block_v = block_shape(leaves["hidden_states"])
    inner = kept.shape[0] if wanted[1] else kept.shape[1]
    assert made == [kept.numel() * block_t * block_v, 2 * inner * block_t * block_v]


def test_fp16_keeps_small_row_factors():
    case = Case(67, 40, 257, FP16)
    leaves, labels, upstream = make_inputs(case, 0, DEVICE)
    kept = kept_of(leaves["hidden_states"], leaves["lm_head_weight"], 1.1)
    small = sparse_gradients(case, leaves, labels, upstream * 2.0**-14, kept)
    exact = masked_truth(case, leaves, labels, upstream * 2.0**-14, kept, torch.float64)
    assert (
        error(small[0], exact[0]) < 2e-2
    )  # fp16 results of 1e-5 have 7 bits; products of fp16 factors would have none
    assert error(small[1], exact[1]) < 2e-2


def test_a_label_out_of_range_makes_its_row_nan_and_no_other():
    case = Case(67, 40, 257, FP32)
    leaves, labels, upstream = make_inputs(case, 0, DEVICE)
    labels[40] = case.V
    kept = kept_of(leaves["hidden_states"], leaves["lm_head_weight"], 1.1)
    grad_hidden, *_ = sparse_gradients(case, leaves, labels, upstream, kept, (1, 0, 0))
    assert grad_hidden.isnan().any(1).nonzero()[:, 0].tolist() == [40]


@pytest.mark.parametrize("wanted", [(1, 1, 1), (1, 0, 0)], ids=["all", "dH"])
@pytest.mark.parametrize("hidden_size", [40, 37], ids=["rows of whole 16 bytes", "rows that are not"])
def test_tiles_that_come_through_descriptors_give_the_same_numbers(hidden_size, wanted, monkeypatch):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no copy engine")
    case = Case(67, hidden_size, 257, BF16, has_bias=True)
    leaves, labels, upstream = make_inputs(case, 0, DEVICE)
    kept = kept_of(leaves["hidden_states"], leaves["lm_head_weight"], 0.6)
    found = {}
    for tma in (False, True):
        described = []
        monkeypatch.setattr(
            sparse, "device_blocks", lambda x, kernel, tma=tma: device_blocks(x, kernel)._replace(tma=tma)
        )
        monkeypatch.setattr(products, "product_blocks", lambda *args, tma=tma: product_blocks(*args)._replace(tma=tma))
        monkeypatch.setattr(products, "describe", lambda *args, seen=described: seen.append(args) or describe(*args))
        found[tma] = sparse_gradients(case, leaves, labels, upstream, kept, wanted)
        assert len(described) == (2 * (wanted[0] + wanted[1]) if tma and hidden_size == 40 else 0)
    assert [x is None for x in found[True]] == [x is None for x in found[False]]
    assert_same_to_rounding(made_of(found[True]), made_of(found[False]))


def test_operands_may_be_views_with_any_strides():
    case = Case(67, 40, 257, FP32)
    leaves, labels, upstream = make_inputs(case, 0, DEVICE)
    kept = kept_of(leaves["hidden_states"], leaves["lm_head_weight"], 0.6)
    should = sparse_gradients(case, leaves, labels, upstream, kept, (1, 1, 0))
    views = {name: x.detach().T.contiguous().T for name, x in leaves.items()}
    assert not views["lm_head_weight"].is_contiguous()
    found = sparse_gradients(case, views, labels, upstream, kept, (1, 1, 0))
    assert_same_to_rounding(found[:2], should[:2])
