"""The logits' gradient that forward leaves behind, against fp64, plain PyTorch and the kernel that recomputes it."""

import pytest
import torch
from closeness import assert_same_to_rounding
from head_cases import BF16, CASES, FP32, Case, make_inputs

from fastdpo.kernels import forward
from fastdpo.ops.fused import FusedLogitGrads
from fastdpo.ops.head import Head, SplitLse
from fastdpo.types import IGNORE_INDEX

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VALUES = ("logps", "lse_whole", "lse_rest")


def inputs(case, seed=0):
    leaves, labels, _ = make_inputs(case, seed, DEVICE)
    hidden_states, weight, bias = (
        None if x is None else x.detach()
        for x in (leaves["hidden_states"], leaves["lm_head_weight"], leaves.get("bias"))
    )
    return hidden_states, weight, bias, labels, case.logit_scale, case.softcap


def with_grads(args, outputs=(), fill=torch.nan):
    hidden_states, weight = args[:2]
    out = torch.full((len(hidden_states), len(weight)), fill, dtype=weight.dtype, device=weight.device)
    return out, forward.fused_forward_with_grads(out, *args, outputs)


def d_logps(d, lse_rest):
    """d logp / d a over logit_scale, whatever the split of lse: what D stands for in eq. (10)."""
    return -d.double() * torch.exp(-lse_rest.double())[:, None]


def recomputed(args, values):
    hidden_states, weight, bias, labels, logit_scale, softcap = args
    lse = SplitLse(values["lse_whole"], values["lse_rest"])
    grads = FusedLogitGrads(
        hidden_states, weight, bias, labels, lse, Head(logit_scale, softcap), torch.ones_like(lse.rest)
    )
    d = torch.empty(len(hidden_states), len(weight), dtype=weight.dtype, device=weight.device)
    for vocab in grads.tiling.vocab():
        for rows in grads.tiling.rows():
            d[rows, vocab] = grads.tile(rows, vocab, weight)
    return d


def from_autograd(args, dtype):
    """The same by autograd; in the operands' dtype as a training script would have it, in fp64 as the truth."""
    hidden_states, weight, bias, labels, logit_scale, softcap = args
    bias = None if bias is None else bias.to(dtype)
    a = torch.nn.functional.linear(hidden_states.to(dtype), weight.to(dtype), bias).requires_grad_()
    z = (a if dtype == torch.float64 else a.float()) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    keep = labels != IGNORE_INDEX
    logps = z.log_softmax(-1).gather(-1, labels.where(keep, 0)[:, None])[:, 0].where(keep, 0.0)
    return torch.autograd.grad(logps.sum(), a)[0].double() / logit_scale


@pytest.mark.parametrize("case", [case for case in CASES if case.T > 0], ids=lambda case: case.id)
def test_gradient_made_in_forward_is_as_exact_as_the_recomputed_one(case):
    wrong = {"forward": 0.0, "recomputed": 0.0, "plain": 0.0, "one rounding": 0.0}
    for seed in range(1 if case.T > 8 else 16):  # so that one row's lucky rounding does not decide
        args = inputs(case, seed)
        d, values = with_grads(args)
        exact = from_autograd(args, torch.float64)
        found = {
            "forward": d_logps(d, values["lse_rest"]),
            "recomputed": d_logps(recomputed(args, values), values["lse_rest"]),
            "plain": from_autograd(args, case.dtype),
            "one rounding": exact * (1 + torch.finfo(case.dtype).eps / 4),
        }
        for name, grads in found.items():
            wrong[name] += float((grads - exact).square().mean())
        assert (d[args[3] == IGNORE_INDEX] == 0).all()
    error, recompute_error, plain_error, rounding = (value**0.5 for value in wrong.values())
    # one rounding to the operands' dtype more than in the kernel that knows lse from the start
    assert error <= 2 * plain_error + rounding + 1e-7
    assert error <= 1.5 * recompute_error + 1e-7


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_values_are_those_of_the_plain_forward(dtype):
    args = inputs(Case(67, 40, 257, dtype, has_bias=True, softcap=4.0))
    outputs = ("entropy", "is_top1", "lse")
    plain = forward.fused_forward(*args, outputs)
    _, values = with_grads(args, outputs)
    assert values.keys() == plain.keys()
    assert_same_to_rounding(values.values(), [plain[name] for name in values])


def test_old_contents_of_the_gradient_tensor_change_no_bit():
    args = inputs(Case(67, 40, 257, BF16))
    assert torch.equal(with_grads(args)[0], with_grads(args, fill=7.0)[0])


def test_a_label_outside_the_vocabulary_makes_its_row_nan_and_no_other():
    *head, labels, logit_scale, softcap = inputs(Case(67, 40, 257, FP32, ignored="none"))
    labels[3], labels[40] = 257, -1
    d, values = with_grads((*head, labels, logit_scale, softcap))
    wrong = torch.zeros(67, dtype=torch.bool, device=DEVICE)
    wrong[[3, 40]] = True
    assert torch.equal(d.isnan().all(dim=1), wrong)
    assert torch.equal(d.isnan().any(dim=1), wrong)
    assert torch.equal(values["logps"].isnan(), wrong)


def test_an_ignored_row_of_nan_has_no_gradient():
    hidden_states, *rest = inputs(Case(67, 40, 257, FP32))
    hidden_states = hidden_states.clone()
    hidden_states[1] = torch.nan  # make_inputs ignores rows 1, 6, 11, ...
    d, _ = with_grads((hidden_states, *rest))
    assert (d[1] == 0).all()
    assert not d.isnan().any()


def test_tokens_ruled_out_by_a_bias_of_minus_infinity_have_no_gradient():
    hidden_states, weight, bias, *rest = inputs(Case(20, 40, 257, FP32, has_bias=True))
    bias[70:200] = -torch.inf  # one whole tile of the interpreter's 64 columns among them
    rest[0] = rest[0].where((rest[0] < 70) | (rest[0] >= 200), 3)
    d, values = with_grads((hidden_states, weight, bias, *rest))
    assert (d[:, 70:200] == 0).all()
    assert d.isfinite().all()
    assert all(values[name].isfinite().all() for name in VALUES)


@pytest.mark.parametrize("case", [Case(67, 40, 257, FP32, has_bias=True, softcap=4.0), Case(67, 40, 257, BF16)])
def test_partials_kept_are_every_rows_share_in_every_tile(case):
    args = inputs(case)
    values = forward.fused_forward(*args, (), keep_partials=True)
    assert set(values) == {*VALUES, "tile_max", "tile_sumexp"}
    block_v = forward.device_blocks(args[0], "skipping").block_v
    num_tiles = -(-case.V // block_v)
    assert values["tile_max"].shape == values["tile_sumexp"].shape == (num_tiles, case.T)
    hidden_states, weight, bias, labels, logit_scale, softcap = args
    a = torch.nn.functional.linear(hidden_states.double(), weight.double(), None if bias is None else bias.double())
    z = a * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    for j, tile in enumerate(z.split(block_v, dim=1)):
        largest = tile.max(dim=1).values
        torch.testing.assert_close(values["tile_max"][j].double(), largest, rtol=1e-5, atol=1e-5)
        mass = torch.exp(tile - largest[:, None]).sum(dim=1)
        torch.testing.assert_close(values["tile_sumexp"][j].double(), mass, rtol=2e-5, atol=1e-6)
    lse = values["tile_max"].double() + values["tile_sumexp"].double().log()
    keep = labels != IGNORE_INDEX
    torch.testing.assert_close(
        torch.logsumexp(lse, 0)[keep], (values["lse_whole"].double() + values["lse_rest"])[keep], rtol=1e-6, atol=1e-6
    )


def test_nothing_is_launched_for_no_rows():
    args = inputs(Case(0, 40, 257, BF16, has_bias=True))
    d, values = with_grads(args)
    assert d.shape == (0, 257)
    assert values["logps"].shape == (0,)
    assert forward.fused_forward(*args, (), keep_partials=True)["tile_max"].shape[1] == 0
