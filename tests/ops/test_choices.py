"""Several labels per row, and the gradients of lse and entropy, against plain PyTorch in fp64."""

import re

import pytest
import torch
from closeness import assert_as_exact

from fastdpo import linear_logps
from fastdpo.types import IGNORE_INDEX

T, H, V, K = 37, 12, 131, 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(dtype=torch.float64, has_bias=True, device="cpu"):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g), torch.randn(V, generator=g)
    labels = torch.randint(0, V, (T, K), generator=g)
    labels[0] = IGNORE_INDEX
    labels[1, 2] = IGNORE_INDEX
    labels[2] = labels[2, 0]  # one id four times
    labels[3, -1] = V - 1
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)[: 2 + has_bias]]
    upstream = [torch.randn(shape, generator=g).to(device, dtype) for shape in ((T, K), (T,), (T,))]
    return leaves, labels.to(device), upstream


def plain(hidden, weight, bias, labels, scale, cap):
    """(T, K) log-probs, (T,) lse and (T,) entropy, from the whole logits."""
    z = hidden @ weight.T * scale if bias is None else (hidden @ weight.T + bias) * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    logps = z.log_softmax(-1)
    keep = labels != IGNORE_INDEX
    of_rows = [x.where(keep.any(1), 0.0) for x in (z.logsumexp(-1), -(logps.exp() * logps).sum(-1))]
    return logps.gather(1, labels.clamp(min=0)).where(keep, 0.0), *of_rows


GRADS = ("lse", "entropy")


def values_of(found):
    return found.logps, found.lse, found.entropy


def with_gradients(inputs, values, upstream):
    """The values, and the gradient of every input under the upstream gradients."""
    loss = sum((value * grad.to(value.dtype)).sum() for value, grad in zip(values, upstream, strict=True))
    return [*(value.detach() for value in values), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("impl", ["reference", "tiled", "auto"])
@pytest.mark.parametrize(("scale", "cap", "has_bias"), [(1.0, None, True), (0.5, 3.0, True), (-1.5, None, False)])
@pytest.mark.parametrize("workspace_bytes", [None, 4096])
def test_values_and_gradients_are_those_of_plain_pytorch(impl, scale, cap, has_bias, workspace_bytes):
    leaves, labels, upstream = make(has_bias=has_bias)
    hidden, weight, bias = (*leaves, None)[:3]
    settings = {"bias": bias, "logit_scale": scale, "softcap": cap, "impl": impl, "workspace_bytes": workspace_bytes}
    found = linear_logps(hidden, weight, labels, outputs=GRADS, output_grads=GRADS, **settings)
    ours = with_gradients(leaves, values_of(found), upstream)
    exact = with_gradients(leaves, plain(hidden, weight, bias, labels, scale, cap), upstream)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of the library's logits in both directions, and several tiles of the gradient's workspace."""
    from fastdpo.kernels import library
    from fastdpo.ops import fused

    monkeypatch.setattr(library, "BLOCK_ROWS", 20)
    monkeypatch.setattr(library, "BLOCK_IDS", 64)
    monkeypatch.setattr(fused, "BLOCK_ROWS", 31)


@pytest.mark.parametrize("impl", ["tiled", "triton"])
@pytest.mark.parametrize(
    ("dtype", "scale", "cap", "has_bias"),
    [
        (torch.float32, 0.5, 3.0, True),
        (torch.bfloat16, 1.0, None, True),
        (torch.float16, -1.5, None, False),
    ],
)
def test_low_precision_errs_at_most_twice_as_much_as_plain_pytorch(dtype, impl, scale, cap, has_bias, small_blocks):
    leaves, labels, upstream = make(dtype, has_bias, DEVICE if impl == "triton" else "cpu")
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    settings = {"bias": (*leaves, None)[2], "logit_scale": scale, "softcap": cap, "impl": impl}
    found = linear_logps(*leaves[:2], labels, outputs=GRADS, output_grads=GRADS, workspace_bytes=16384, **settings)
    ours = with_gradients(leaves, values_of(found), upstream)
    half, exact = (
        with_gradients(inputs, plain(*(*inputs, None)[:3], labels, scale, cap), upstream)
        for inputs in (leaves, doubles)
    )
    assert_as_exact(ours, half, exact)


def test_the_kernels_take_more_labels_than_a_program_does_at_once():
    (hidden, weight, _), *_ = make(torch.float32, device=DEVICE)
    hidden, weight = hidden[:5].detach().requires_grad_(), weight.detach()
    labels = torch.randint(V, (5, 70), generator=torch.Generator().manual_seed(1))
    labels[:, 60::3] = IGNORE_INDEX
    labels, g = labels.to(DEVICE), torch.linspace(-1, 2, 350, device=DEVICE).view(5, 70)

    def results(hidden, logps):
        return [logps, *torch.autograd.grad((logps * g.to(logps.dtype)).sum(), hidden)]

    double = hidden.detach().double().requires_grad_()
    ours = results(hidden, linear_logps(hidden, weight, labels, impl="triton").logps)
    half, exact = (results(x, plain(x, weight.to(x.dtype), None, labels, 1.0, None)[0]) for x in (hidden, double))
    assert_as_exact(ours, half, exact)


def test_workspace_full_of_nan_changes_nothing_of_the_kernels(monkeypatch):
    from fastdpo.kernels import forward, launch, library

    leaves, labels, upstream = make(torch.float32, device=DEVICE)

    def results():
        head = {"bias": leaves[2], "outputs": (*GRADS, "is_top1"), "output_grads": GRADS, "impl": "triton"}
        found = linear_logps(*leaves[:2], labels, **head)
        return [found.is_top1, *with_gradients(leaves, values_of(found), upstream)]

    before = results()
    for module in (forward, launch, library):
        nans = lambda shape, like, dtype: torch.full(shape, torch.nan, dtype=dtype, device=like.device)  # noqa: E731
        monkeypatch.setattr(module, "scratch", nans)
    for a, b in zip(results(), before, strict=True):
        assert torch.equal(a, b)


def test_a_label_outside_the_vocabulary_makes_its_row_nan_in_the_kernels():
    """What a GPU does, where no value is checked."""
    from fastdpo.kernels.choices import choice_forward
    from fastdpo.ops.fused import FusedChoiceGrads, fused_choice_forward
    from fastdpo.ops.gradients import head_gradients
    from fastdpo.ops.head import Head, SplitLse, choice_rows

    (hidden, weight, bias), labels, (g, *_) = make(torch.float32, device=DEVICE)
    hidden, weight, bias = (x.detach() for x in (hidden, weight, bias))
    labels[7, 1] = V
    labels[9, 2] = -5
    _, chosen = choice_forward(hidden, weight, bias, labels, labels.amax(1), 1.0, None, ())
    assert chosen.isnan().nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 2], [7, 1], [9, 2]]
    values = fused_choice_forward(hidden, weight, bias, labels, Head())
    assert values["logps"].isnan().nonzero().tolist() == [[7, 1], [9, 2]]
    rows = choice_rows(g, None, None, None, SplitLse(values["lse_whole"], values["lse_rest"]), labels, V, torch.float32)
    tiles = FusedChoiceGrads(hidden, weight, bias, labels, rows, Head())
    grad_hidden, *_ = head_gradients(tiles, hidden, weight, torch.float32, None, None)
    assert grad_hidden.isnan().all(1).nonzero()[:, 0].tolist() == [7, 9]
    assert not grad_hidden[0].any()


@pytest.mark.parametrize("impl", ["reference", "tiled"])
@pytest.mark.parametrize("name", GRADS)
def test_a_frozen_head_and_one_label_per_row_give_one_output_alone_a_gradient(impl, name):
    (hidden, weight, _), labels, (*_, upstream) = make()
    weight = weight.detach()
    found = linear_logps(hidden, weight, labels[:, 0], outputs=GRADS, output_grads=name, impl=impl)
    assert found.logps.shape == (T,)
    assert [getattr(found, output).requires_grad for output in GRADS] == [output == name for output in GRADS]
    (ours,) = torch.autograd.grad(getattr(found, name), hidden, upstream)
    _, *expected = plain(hidden, weight, None, labels[:, :1], 1.0, None)
    (exact,) = torch.autograd.grad(expected[GRADS.index(name)], hidden, upstream)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_statistics_of_several_labels_are_those_of_the_reference(impl, small_blocks):
    dtype, device = (torch.float32, DEVICE) if impl == "triton" else (torch.float64, "cpu")
    (hidden, weight, bias), labels, *_ = make(dtype, device=device)
    names = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    labels[5, 1] = int((hidden[5] @ weight.T + bias).argmax())
    ours = linear_logps(hidden, weight, labels, bias=bias, outputs=names, impl=impl)
    exact = linear_logps(hidden, weight, labels, bias=bias, outputs=names, impl="reference")
    assert ours.is_top1.shape == (T, K)
    assert ours.is_top1[5, 1]
    for name in names:
        close = {"rtol": 1e-5, "atol": 1e-5} if impl == "triton" else {"rtol": 1e-11, "atol": 1e-11}
        torch.testing.assert_close(getattr(ours, name), getattr(exact, name), **close)
        assert not getattr(ours, name).requires_grad


def test_nothing_of_the_size_of_the_logits_is_saved_for_backward():
    (hidden, weight, bias), labels, *_ = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        linear_logps(hidden, weight, labels, bias=bias, outputs=GRADS, output_grads=GRADS)
    assert saved
    assert max(saved) == V * H  # the head itself; logits would be T x V = 4,847


@pytest.mark.parametrize("impl", ["reference", "tiled", "triton"])
def test_no_rows_give_no_log_probs_and_zero_gradients(impl):
    hidden, weight = torch.zeros(0, H, requires_grad=True), torch.ones(V, H, requires_grad=True)
    labels = torch.zeros(0, K, dtype=torch.int64)
    found = linear_logps(hidden, weight, labels, outputs=GRADS, output_grads=GRADS, impl=impl)
    assert found.logps.shape == (0, K)
    grads = torch.autograd.grad(sum(value.sum() for value in values_of(found)), (hidden, weight))
    assert [float(grad.abs().sum()) for grad in grads] == [0.0, 0.0]
    one = linear_logps(hidden, weight, labels[:, 0], outputs=GRADS, output_grads=GRADS, impl=impl)
    assert one.logps.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip_tolerance": 0.1}, "labels must have shape (37,) with skip_tolerance"),
        (
            {"output_grads": "entropy"},
            "output_grads must be among ('lse', 'entropy') and named in outputs, got 'entropy'",
        ),
        (
            {"outputs": "mean_logits", "output_grads": "mean_logits"},
            "output_grads must be among ('lse', 'entropy') and named in outputs, got 'mean_logits'",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    (hidden, weight, _), labels, *_ = make(torch.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_logps(hidden, weight, labels, **change)


def test_a_label_outside_the_vocabulary_is_refused_with_its_row():
    (hidden, weight, _), labels, *_ = make()
    labels[7, 1] = V
    with pytest.raises(ValueError, match="got 131 in row 7"):
        linear_logps(hidden, weight, labels)
