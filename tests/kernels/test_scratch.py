"""The kernels read nothing from their workspace that they have not written there."""

import math

import pytest
import torch
from head_cases import BF16, FP32, Case, make_inputs

from fastdpo import linear_logps
from fastdpo.kernels import launch
from fastdpo.types import TOKEN_OUTPUTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def everything(case):
    leaves, labels, upstream = make_inputs(case, 0, DEVICE)
    args = dict(leaves)
    hidden_states, weight = args.pop("hidden_states"), args.pop("lm_head_weight")
    tokens = linear_logps(hidden_states, weight, labels, **args, **case.settings, outputs=TOKEN_OUTPUTS, impl="triton")
    return [*vars(tokens).values(), *torch.autograd.grad((tokens.logps * upstream).sum(), list(leaves.values()))]


@pytest.mark.parametrize(
    "case",
    [
        Case(67, 40, 257, FP32, has_bias=True, softcap=4.0),
        Case(67, 40, 257, BF16),
        Case(33, 40, 2500, FP32),  # more vocabulary tiles than one step of the merge reads
        Case(5, 40, 70, FP32, ignored="all"),
    ],
    ids=lambda case: case.id,
)
def test_workspace_full_of_nan_changes_no_bit(case, monkeypatch):
    from fastdpo.kernels import forward
    from fastdpo.ops import fused

    monkeypatch.setattr(fused, "WORKSPACE_BYTES", 40000)
    as_it_is = everything(case)
    made = []

    def full_of_nan(shape, like, dtype):
        made.append(math.prod(shape))
        return torch.full(shape, torch.nan, dtype=dtype, device=like.device)

    monkeypatch.setattr(launch, "scratch", full_of_nan)
    monkeypatch.setattr(forward, "scratch", full_of_nan)
    for before, after in zip(as_it_is, everything(case), strict=True):
        assert not after.isnan().any()
        assert torch.equal(before, after)
    assert len(made) == 3  # label logits, partials, gradient tile


def test_merge_spans_several_steps_exactly():
    case = Case(33, 16, 2500, FP32)  # 40 tiles of 64 in the interpreter, merged 32 at a time
    leaves, labels, _ = make_inputs(case, 0, DEVICE)
    ours = linear_logps(*leaves.values(), labels, outputs=TOKEN_OUTPUTS, impl="triton")
    expected = linear_logps(*leaves.values(), labels, outputs=TOKEN_OUTPUTS, impl="reference")
    for name in ("logps", "lse", "entropy", "mean_logits", "log_sum_sq_probs"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=1e-5, atol=2e-6, msg=name)
    assert torch.equal(ours.is_top1, expected.is_top1)


def test_softcap_tanh_is_as_exact_as_fp32():
    """One hidden unit and a weight of ones make every logit softcap * tanh(h / softcap); lse then shows z + log V."""
    h = torch.cat([torch.logspace(-6, 1.5, 300), torch.linspace(0.55, 0.65, 100)])
    h = torch.cat([h, -h])[:, None].to(DEVICE)
    labels = torch.zeros(len(h), dtype=torch.int64, device=DEVICE)
    found = linear_logps(
        h, torch.ones(1, 1, device=DEVICE), labels, softcap=1.0, outputs=["mean_logits"], impl="triton"
    )
    exact = torch.tanh(h[:, 0].double())
    worst = ((found.mean_logits.double() - exact) / exact).abs().max()
    assert worst < 4 * torch.finfo(torch.float32).eps
