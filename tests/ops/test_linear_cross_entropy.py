"""linear_cross_entropy against torch's cross entropy of the logits, and torch's own function where it exists."""

import dataclasses
import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_exact
from covering import every_pair

from fastdpo import linear_cross_entropy

N, H, V = 67, 40, 257
IMPLS = ["tiled", "reference"]
X, W, Y = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.int64)


def make(shape=(N,), dtype=torch.float64, ignore_index=-100, has_bias=True):
    """Leaves (input, linear_weight, linear_bias), target with a third of its rows ignored, class weights."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, H, generator=g), torch.randn(V, H, generator=g) / 3, torch.randn(V, generator=g)]
    target = torch.randint(V, shape, generator=g)
    target[torch.rand(shape, generator=g) < 0.3] = ignore_index
    leaves = [x.to(dtype).requires_grad_() for x in leaves[: 3 if has_bias else 2]]
    return leaves, target, torch.rand(V, generator=g, dtype=torch.float64).to(dtype)


def plain(input, linear_weight, target, *, linear_bias=None, **kwargs):
    logits = F.linear(input, linear_weight, linear_bias)
    return F.cross_entropy(logits.reshape(-1, V), target.reshape(-1), **kwargs)


def run(function, leaves, target, **kwargs):
    """The loss and the gradient of every leaf under a fixed upstream gradient."""
    bias = {"linear_bias": leaves[2]} if len(leaves) == 3 else {}
    loss = function(leaves[0], leaves[1], target, **bias, **kwargs)
    upstream = torch.linspace(-1, 2, loss.numel()).view(loss.shape).to(loss)
    return [loss, *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize(
    *every_pair(
        impl=IMPLS,
        reduction=["mean", "sum", "none"],
        ignore_index=[-100, -1, 0, 5, V + 3],
        has_bias=[False, True],
        has_weight=[False, True],
    )
)
def test_loss_and_gradients_are_those_of_the_full_logits(
    impl, reduction, ignore_index, has_bias, has_weight, small_tiles
):
    leaves, target, weight = make(ignore_index=ignore_index, has_bias=has_bias)
    settings = {"reduction": reduction, "ignore_index": ignore_index, "weight": weight if has_weight else None}
    expected = run(plain, leaves, target, **settings)
    ours = run(linear_cross_entropy, leaves, target, **settings, impl=impl)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("shape", [(N,), (), (0,)], ids=["N", "one row", "empty"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torchs_function_can_be_replaced(shape, reduction):
    leaves, target, weight = make(shape)
    expected = run(F.linear_cross_entropy, leaves, target, reduction=reduction, weight=weight)
    ours = run(linear_cross_entropy, leaves, target, reduction=reduction, weight=weight)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_torchs_arguments_come_first_under_the_same_names_and_defaults():
    theirs, ours = (inspect.signature(f).parameters for f in (F.linear_cross_entropy, linear_cross_entropy))
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind), name


@pytest.mark.parametrize(
    *every_pair(
        impl=IMPLS,
        reduction=["mean", "sum", "none"],
        label_smoothing=[0.1, 1.0],
        has_bias=[False, True],
        has_weight=[False, True],
        ignore_index=[-100, 5],
    )
)
def test_smoothed_labels_give_the_loss_and_gradients_of_the_full_logits(
    impl, reduction, label_smoothing, has_bias, has_weight, ignore_index, small_tiles
):
    leaves, target, weight = make(ignore_index=ignore_index, has_bias=has_bias)
    settings = {"reduction": reduction, "label_smoothing": label_smoothing, "weight": weight if has_weight else None}
    settings["ignore_index"] = ignore_index
    expected = run(plain, leaves, target, **settings)
    ours = run(linear_cross_entropy, leaves, target, **settings, impl=impl)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    *every_pair(
        impl=IMPLS,
        reduction=["mean", "sum", "none"],
        label_smoothing=[0.0, 0.2],
        has_bias=[False, True],
        has_weight=[False, True],
    )
)
def test_class_probabilities_give_the_loss_and_gradients_of_the_full_logits(
    impl, reduction, label_smoothing, has_bias, has_weight, small_tiles
):
    leaves, _, weight = make(has_bias=has_bias)
    shares = torch.rand(N, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # they need not sum to 1
    shares.requires_grad_()
    settings = {"reduction": reduction, "label_smoothing": label_smoothing, "weight": weight if has_weight else None}
    bias = {"linear_bias": leaves[2]} if has_bias else {}
    logits = F.linear(*leaves)
    expected = F.cross_entropy(logits, shares, **settings)
    ours = linear_cross_entropy(leaves[0], leaves[1], shares, **bias, **settings, impl=impl)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    upstream = torch.linspace(-1, 2, expected.numel()).view(expected.shape).to(expected)
    gradients = [torch.autograd.grad(loss, [*leaves, shares], upstream) for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def make_places(lead, places, kind, dtype=torch.float64):
    """Leaves (input, linear_weight, linear_bias) with a head for each place, and a target of each kind."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*lead, H, generator=g), torch.randn(V, *places, H, generator=g) / 3]
    leaves = [x.to(dtype).requires_grad_() for x in (*leaves, torch.randn(V, *places, generator=g))]
    if kind == "probabilities":
        return leaves, torch.rand(*lead, V, *places, generator=g, dtype=dtype)
    target = torch.randint(V, (*lead, *places), generator=g)
    target[torch.rand(target.shape, generator=g) < 0.3] = -100
    return leaves, target


def of_places(input, linear_weight, target, *, linear_bias, **kwargs):
    """torch's definition: the logits of all places in one product, classes second."""
    V, *places, H = linear_weight.shape
    logits = F.linear(input.reshape(-1, H), linear_weight.reshape(-1, H), linear_bias.reshape(-1))
    logits = logits.view(-1, V, *places)
    rows = len(logits)
    target = target.reshape(rows, V, *places) if target.is_floating_point() else target.reshape(rows, *places)
    losses = F.cross_entropy(logits, target, **kwargs)
    return losses.view(*input.shape[:-1], *places) if kwargs["reduction"] == "none" else losses


@pytest.mark.parametrize(
    *every_pair(
        kind=["indices", "probabilities"],
        places=[(1,), (3,), (2, 3)],
        lead=[(N,), (3, 7), (0,)],
        reduction=["mean", "sum", "none"],
        label_smoothing=[0.0, 0.2],
        has_weight=[False, True],
    )
)
def test_k_dimensional_targets_have_a_head_for_each_place(
    kind, places, lead, reduction, label_smoothing, has_weight, small_tiles
):
    leaves, target = make_places(lead, places, kind)
    weight = torch.rand(V, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if has_weight else None
    settings = {"reduction": reduction, "label_smoothing": label_smoothing, "weight": weight}
    ours, expected = (run(f, leaves, target, **settings) for f in (linear_cross_entropy, of_places))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_torchs_function_with_k_dimensional_targets_can_be_replaced(kind):
    leaves, target = make_places((N,), (2, 3), kind)
    ours, expected = (run(f, leaves, target, reduction="none") for f in (linear_cross_entropy, F.linear_cross_entropy))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_the_heads_of_the_places_are_as_exact_as_plain_pytorch(impl):
    """The weight of one place is a view with gaps between its rows."""
    device = "cuda" if torch.cuda.is_available() and impl == "triton" else "cpu"
    leaves, target = make_places((N,), (3,), "indices", torch.float32)
    leaves, target = [x.detach().to(device).requires_grad_() for x in leaves], target.to(device)
    exact = run(of_places, [x.detach().double().requires_grad_() for x in leaves], target, reduction="none")
    ours = run(linear_cross_entropy, leaves, target, reduction="none", impl=impl)
    assert_as_exact(ours, run(of_places, leaves, target, reduction="none"), exact)


HAS_OPTIONS = pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no options")


@HAS_OPTIONS
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_chunk_size": 5, "chunking_method": None, "acc_dtype": torch.float32}, {"acc_policy": "compact"}],
    ids=["default", "chunks", "compact"],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_torchs_options_are_taken_and_change_nothing(options, reduction):
    leaves, target, _ = make(dtype=torch.float32)
    options = torch.nn.LinearCrossEntropyOptions(**options)
    ours, without = (
        run(linear_cross_entropy, leaves, target, reduction=reduction, **given) for given in ({"options": options}, {})
    )
    for a, b in zip(ours, without, strict=True):  # the same computation
        assert torch.equal(a, b)


@HAS_OPTIONS
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_retained_graph_gives_the_gradients_again(is_frozen):
    leaves, target, _ = make()
    leaves[1].requires_grad_(not is_frozen)
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    loss = linear_cross_entropy(leaves[0], leaves[1], target, options=options)
    first, second = (torch.autograd.grad(loss, leaves[0], retain_graph=True)[0] for _ in range(2))
    assert first.any()
    assert torch.equal(first, second)


@HAS_OPTIONS
def test_options_that_would_change_the_result_are_refused_by_name():
    half = torch.nn.LinearCrossEntropyOptions(acc_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"options.acc_dtype must be None or torch.float32, .* got torch.bfloat16"):
        linear_cross_entropy(X, W, Y, options=half)

    @dataclasses.dataclass(frozen=True)
    class Later(torch.nn.LinearCrossEntropyOptions):
        z_loss: float = 0.0

    linear_cross_entropy(X, W, Y, options=Later())
    with pytest.raises(ValueError, match=r"options.z_loss must be 0.0, because this op does not know it, got 0.1"):
        linear_cross_entropy(X, W, Y, options=Later(z_loss=0.1))


@pytest.mark.parametrize("impl", ["tiled", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["smoothed", "probabilities"])
def test_smoothed_and_soft_targets_are_as_exact_as_plain_pytorch(impl, dtype, kind):
    device = "cuda" if torch.cuda.is_available() and impl == "triton" else "cpu"
    leaves, target, _ = make(dtype=dtype)
    leaves, settings = [x.detach().to(device).requires_grad_() for x in leaves], {"reduction": "none"}
    if kind == "probabilities":
        target = torch.randn(N, V, generator=torch.Generator().manual_seed(1)).softmax(-1)
    else:
        settings["label_smoothing"] = 0.1
    target = target.to(device)

    def careful(input, linear_weight, target, *, linear_bias, **kwargs):
        return F.cross_entropy(F.linear(input, linear_weight, linear_bias).float(), target, **kwargs)

    def whole(input, linear_weight, target, *, linear_bias, **kwargs):
        target = target.double() if target.is_floating_point() else target
        return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **kwargs)

    exact = run(whole, [x.detach().double().requires_grad_() for x in leaves], target, **settings)
    ours = run(linear_cross_entropy, leaves, target, **settings, impl=impl)
    assert ours[0].dtype == torch.float32
    assert_as_exact(ours, run(careful, leaves, target, **settings), exact)


def test_autocast_rounds_the_operands_of_smoothed_labels_and_leaves_probabilities_as_they_are():
    leaves, target, _ = make(dtype=torch.float32)
    shares = torch.randn(N, V, generator=torch.Generator().manual_seed(1)).softmax(-1)

    def under_autocast(function):  # forward alone, as torch wants it
        return torch.autocast("cpu", torch.bfloat16)(function)

    ours, theirs = under_autocast(linear_cross_entropy), under_autocast(plain)
    smoothed, half = (run(f, leaves, target, label_smoothing=0.1) for f in (ours, theirs))
    soft = run(ours, leaves, shares)
    exact = run(plain, [x.detach().double().requires_grad_() for x in leaves], target, label_smoothing=0.1)
    assert_as_exact(smoothed, half, exact)
    for a, b in zip(soft, run(linear_cross_entropy, leaves, shares), strict=True):  # the same computation
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_leading_dimensions_are_kept(reduction):
    leaves, target, _ = make((3, 2, 7))
    ours = run(linear_cross_entropy, leaves, target, reduction=reduction)
    assert ours[0].shape == (target.shape if reduction == "none" else ())
    expected = plain(leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction).view(ours[0].shape)
    torch.testing.assert_close(ours[0], expected)
    assert [grad.shape for grad in ours[1:]] == [leaf.shape for leaf in leaves]


def test_a_view_with_strides_and_small_integers_give_the_same_loss():
    leaves, target, _ = make((6, 5))
    expected = linear_cross_entropy(*leaves[:2], target)
    for integers in (torch.int32, torch.int16):
        found = linear_cross_entropy(leaves[0].mT.contiguous().mT, leaves[1], target.to(integers))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)  # in fp64


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_where_every_row_is_ignored_the_values_are_torchs_and_the_gradients_zero(reduction):
    leaves, target, _ = make()
    target[:] = -100
    ours = run(linear_cross_entropy, leaves, target, reduction=reduction)
    torch.testing.assert_close(ours[0], run(plain, leaves, target, reduction=reduction)[0], equal_nan=True)
    if reduction != "mean":
        assert all(not grad.any() for grad in ours[1:])


@pytest.mark.parametrize("impl", ["tiled", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_pytorch(impl, dtype):
    """Plain: logits in the inputs' dtype, softmax and loss in fp32, what a careful training script does.

    A loss for every row: one number of plain PyTorch can be right by luck.
    """

    def careful(input, linear_weight, target, *, linear_bias, **kwargs):
        return F.cross_entropy(F.linear(input, linear_weight, linear_bias).float(), target, **kwargs)

    device = "cuda" if torch.cuda.is_available() and impl == "triton" else "cpu"
    leaves, target, weight = make(dtype=dtype)
    leaves, target, weight = (
        [x.detach().to(device).requires_grad_() for x in leaves],
        target.to(device),
        weight.to(device),
    )
    double = [x.detach().double().requires_grad_() for x in leaves]
    exact = run(plain, double, target, weight=weight.double(), reduction="none")
    ours = run(linear_cross_entropy, leaves, target, weight=weight, reduction="none", impl=impl)
    theirs = run(careful, leaves, target, weight=weight.float(), reduction="none")
    assert ours[0].dtype == torch.float32
    assert_as_exact(ours, theirs, exact)


def test_torch_compile_takes_it_as_one_graph():
    leaves, target, _ = make(has_bias=False)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    ours, expected = run(compiled, leaves, target), run(linear_cross_entropy, leaves, target)
    torch.testing.assert_close(ours, expected)


def test_only_the_gradients_that_are_needed_are_computed():
    leaves, target, _ = make()
    leaves[1].requires_grad_(False)
    linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2]).backward()
    assert leaves[1].grad is None
    assert leaves[0].grad.any()
    assert leaves[2].grad.any()


def test_softcap_and_scale_reach_the_op():
    leaves, target, _ = make(has_bias=False)
    logits = 3.0 * torch.tanh(F.linear(*leaves) * 0.5 / 3.0)
    ours = linear_cross_entropy(*leaves, target, logit_scale=0.5, softcap=3.0)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((X, W, Y), {"reduction": "avg"}, r"reduction must be one of \('mean', 'sum', 'none'\), got 'avg'"),
        ((X, W, Y), {"label_smoothing": 1.1}, r"label_smoothing must be in \[0, 1\], got 1.1"),
        ((X, W, Y), {"label_smoothing": 0.1, "softcap": 3.0}, "softcap must be None with label_smoothing or class"),
        ((X, W, Y), {"label_smoothing": 0.1, "skip_tolerance": 0.1}, "skip_tolerance must be 0.0 with label_smoothing"),
        ((X, W, torch.zeros(4, 7)), {"logit_scale": 2.0}, "logit_scale must be 1.0 with label_smoothing or class"),
        ((X, W, Y), {"options": object()}, "options must be None or a torch.nn.LinearCrossEntropyOptions, got <object"),
        (
            (X, W, torch.zeros(4, 7)),
            {"ignore_index": -100},
            "ignore_index must be None if target holds prob",
        ),
        ((X, W, torch.zeros(4, 6)), {}, r"target must have shape \(4, 7\) if it holds probabilities, got \(4, 6\)"),
        ((X, W, Y.bool()), {}, "target must hold class indices as integers.*bool"),
        ((X, W, Y[:3]), {}, r"target must have shape \(4,\) to match input, got \(3,\)"),
        ((X, torch.zeros(7, 2, 3), Y), {}, r"target must have shape \(4, 2\) to match input, got \(4,\)"),
        ((X, torch.zeros(7, 2, 3), torch.zeros(4, 2, 7)), {}, r"target must have shape \(4, 7, 2\) if it holds prob"),
        ((X, torch.zeros(3), Y), {}, r"linear_weight must have shape \(V, H\) or \(V, d1, .* got \(3,\)"),
        ((X, torch.zeros(7, 0, 3), Y), {}, r"without a dimension of 0, got \(7, 0, 3\)"),
        (
            (X, torch.zeros(7, 2, 3), torch.zeros(4, 2, dtype=torch.int64)),
            {"linear_bias": torch.zeros(14)},
            r"linear_bias must have shape \(7, 2\) .* got \(14,\)",
        ),
        ((X[:, :2], W, Y), {}, r"input must have shape \(\.\.\., 3\) to match linear_weight, got \(4, 2\)"),
        ((X, W, Y), {"linear_bias": torch.zeros(6)}, r"linear_bias must have shape \(7,\) .* got \(6,\)"),
        ((X, W, Y), {"weight": torch.ones(4)}, r"weight must have shape \(7,\) to match linear_weight, got \(4,\)"),
        ((X, W, Y + 7), {}, r"must lie in \[0, 7\).*got 7"),
        ((X, W, Y - 100), {"ignore_index": 0}, r"must lie in \[0, 7\)"),
        ((X, W, Y), {"impl": "fast"}, "impl must be one of"),
    ],
)
def test_a_mistake_is_named(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **settings)


def test_a_target_out_of_range_never_reads_beyond_the_class_weights(monkeypatch):
    """What a GPU does, where no value is checked: the row is nan."""
    module = sys.modules["fastdpo.ops.linear_cross_entropy"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "linear_logps", nan_out_of_range)
    losses = linear_cross_entropy(X, W, torch.tensor([0, 7, -5, -100]), weight=torch.ones(7), reduction="none")
    assert losses.isnan().tolist() == [False, True, True, False]


def nan_out_of_range(hidden_states, lm_head_weight, labels, *, bias, **_):
    from fastdpo import TokenLogps

    outside = (labels != -100) & ((labels < 0) | (labels >= lm_head_weight.shape[0]))
    return TokenLogps(torch.zeros(labels.shape).masked_fill(outside, torch.nan))
