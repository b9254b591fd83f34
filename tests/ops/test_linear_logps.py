"""The contract of linear_logps, for every implementation."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from closeness import assert_as_exact
from covering import every_pair
from head_cases import BF16, CASES, FP32, Case, assert_at_most_twice_plain, exact_logps, make_inputs, plain_logps
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo import linear_logps
from fastdpo.types import IGNORE_INDEX, TOKEN_OUTPUTS

CUDA = torch.cuda.is_available()
FAST = ("tiled", "triton")
ALL = ("reference", *FAST)


def device_of(impl):
    return "cuda" if CUDA and impl == "triton" else "cpu"


def logps_by(impl):
    def logps(*args, **kwargs):
        return linear_logps(*args, **kwargs, impl=impl).logps

    return logps


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("impl", FAST)
def test_error_is_at_most_twice_that_of_plain_pytorch(impl, case, small_tiles):
    assert_at_most_twice_plain(logps_by(impl), case, device_of(impl))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_default_tiles_are_as_good(case):
    assert_at_most_twice_plain(logps_by("tiled"), case)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(
    "case", [*CASES, Case(1000, 1024, 32003, BF16), Case(300, 512, 5003, FP32)], ids=lambda c: c.id
)
def test_error_on_a_gpu_is_at_most_twice_that_of_plain_pytorch(impl, case):
    assert_at_most_twice_plain(logps_by(impl), case, "cuda")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_tiled_gradients_pass_gradcheck(softcap, has_bias, frozen_head, small_tiles, monkeypatch):
    from fastdpo.ops import eager, tiled

    monkeypatch.setattr(tiled, "MAX_TILE_ELEMENTS", 20)
    monkeypatch.setattr(eager, "max_chunk_rows", lambda *_, **__: 4)
    leaves, labels, _ = make_inputs(Case(6, 5, 11, torch.float64, has_bias=has_bias), 0)
    names = list(leaves)
    for name in names[1:]:
        leaves[name].requires_grad_(not frozen_head)

    def logps(*tensors):
        args = dict(zip(names, tensors, strict=True))
        hidden_states, lm_head_weight = args.pop("hidden_states"), args.pop("lm_head_weight")
        settings = {"logit_scale": 0.7, "softcap": softcap, "impl": "tiled"}
        return linear_logps(hidden_states, lm_head_weight, labels, **args, **settings).logps

    assert torch.autograd.gradcheck(logps, tuple(leaves.values()))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_statistics_match_their_definitions(impl, softcap, small_tiles):
    case = Case(67, 40, 257, FP32, has_bias=True, logit_scale=1.5, softcap=softcap)
    leaves, labels, _ = make_inputs(case, 0, device_of(impl))
    hidden_states, weight, bias = (x.detach() for x in leaves.values())
    labels[0] = (hidden_states[0] @ weight.T + bias).argmax()
    tokens = linear_logps(hidden_states, weight, labels, bias=bias, **case.settings, outputs=TOKEN_OUTPUTS, impl=impl)

    z = (hidden_states.double() @ weight.double().T + bias.double()) * 1.5
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    probs, keep = z.softmax(-1), labels != IGNORE_INDEX
    expected = {
        "lse": z.logsumexp(-1),
        "entropy": -(probs * probs.log()).sum(-1),
        "mean_logits": z.mean(-1),
        "log_sum_sq_probs": probs.square().sum(-1).log(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(tokens, name).double(), value * keep, rtol=1e-5, atol=2e-6, msg=name)
    assert tokens.is_top1.dtype == torch.bool
    assert tokens.is_top1.tolist() == ((z.argmax(-1) == labels) & keep).tolist()
    assert tokens.is_top1[0]


@pytest.mark.parametrize("impl", ALL)
def test_statistics_carry_no_gradient_and_are_absent_unless_asked_for(impl):
    leaves, labels, _ = make_inputs(Case(5, 8, 11, FP32), 0, device_of(impl))
    tokens = linear_logps(*leaves.values(), labels, outputs=["entropy", "lse"], impl=impl)
    assert tokens.logps.requires_grad
    assert not tokens.entropy.requires_grad
    assert not tokens.lse.requires_grad
    assert tokens.mean_logits is tokens.is_top1 is tokens.log_sum_sq_probs is None


@pytest.mark.parametrize("impl", ALL)
def test_ignored_labels_give_zero_and_no_gradient(impl):
    leaves, labels, upstream = make_inputs(Case(67, 40, 257, FP32), 0, device_of(impl))
    logps = linear_logps(*leaves.values(), labels, impl=impl).logps
    (logps * upstream).sum().backward()
    ignored = labels == IGNORE_INDEX
    assert ignored.sum() == 14
    assert (logps[ignored] == 0).all()
    assert (leaves["hidden_states"].grad[ignored] == 0).all()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("wanted", [(0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_only_the_gradients_asked_for_are_computed(impl, wanted, monkeypatch):
    from fastdpo.ops import autograd

    case = Case(20, 8, 30, FP32, has_bias=True)
    leaves, labels, upstream = make_inputs(case, 0, device_of(impl))
    for leaf, needed in zip(leaves.values(), wanted, strict=True):
        leaf.requires_grad_(bool(needed))
    computed, head_gradients = [], autograd.head_gradients

    def spy(*args):
        computed.append(head_gradients(*args))
        return computed[-1]

    monkeypatch.setattr(autograd, "head_gradients", spy)
    logps = linear_logps(
        leaves["hidden_states"], leaves["lm_head_weight"], labels, bias=leaves["bias"], impl=impl
    ).logps
    (logps * upstream).sum().backward()
    assert [grad is not None for grad in computed[0]] == [bool(needed) for needed in wanted]
    expected = exact_logps(leaves["hidden_states"], leaves["lm_head_weight"], labels, bias=leaves["bias"])
    needed_leaves = [leaf for leaf in leaves.values() if leaf.requires_grad]
    for leaf, grad in zip(needed_leaves, torch.autograd.grad((expected * upstream).sum(), needed_leaves), strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("impl", FAST)
def test_with_a_frozen_head_the_gradient_is_made_in_forward_and_as_exact(impl, case, monkeypatch):
    from fastdpo.ops import autograd, eager

    def refuse(*args):
        raise AssertionError("backward recomputes logits for a frozen head")

    monkeypatch.setattr(autograd, "head_gradients", refuse)
    monkeypatch.setattr(eager, "max_chunk_rows", lambda *_, **__: 31)

    def frozen(hidden_states, lm_head_weight, labels, *, bias=None, **settings):
        frozen_bias = None if bias is None else bias.detach()
        head = (hidden_states, lm_head_weight.detach(), labels)
        logps = linear_logps(*head, bias=frozen_bias, impl=impl, **settings).logps
        anchors = [lm_head_weight] if bias is None else [lm_head_weight, bias]
        return logps + 0.0 * sum(x.sum() for x in anchors)  # their gradients exist, and are zero

    assert_at_most_twice_plain(frozen, case, device_of(impl), only=("logps", "grad of hidden_states"))


@pytest.mark.parametrize("impl", FAST)
def test_a_frozen_head_gives_the_same_statistics(impl):
    leaves, labels, _ = make_inputs(Case(67, 40, 257, FP32, softcap=4.0), 0, device_of(impl))
    hidden_states, weight = leaves["hidden_states"], leaves["lm_head_weight"].detach()
    tokens = linear_logps(hidden_states, weight, labels, softcap=4.0, outputs=TOKEN_OUTPUTS, impl=impl)
    without_grad = linear_logps(
        hidden_states.detach(), weight, labels, softcap=4.0, outputs=TOKEN_OUTPUTS, impl="reference"
    )
    for name in TOKEN_OUTPUTS:
        torch.testing.assert_close(getattr(tokens, name), getattr(without_grad, name), rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_ignored_rows_leave_no_nan_where_they_cannot_be_left_out(softcap, monkeypatch):
    """What happens on a GPU, where counting the kept rows would stop the host."""
    from fastdpo.ops import autograd, eager

    monkeypatch.setattr(autograd, "_rows_where", lambda keep: None)
    monkeypatch.setattr(eager, "RowGradients", functools.partial(eager.RowGradients, leaves_out=False))
    case = Case(67, 40, 257, FP32, softcap=softcap)
    leaves, labels, upstream = make_inputs(case, 0)
    for frozen_head in (False, True):
        weight = leaves["lm_head_weight"].detach() if frozen_head else leaves["lm_head_weight"]
        logps = linear_logps(leaves["hidden_states"], weight, labels, softcap=softcap).logps
        grad = torch.autograd.grad((logps * upstream).sum(), leaves["hidden_states"])[0]
        exact = exact_logps(leaves["hidden_states"], weight, labels, softcap=softcap)
        expected = torch.autograd.grad((exact * upstream).sum(), leaves["hidden_states"])[0]
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen_head", [False, True])
def test_a_second_derivative_is_refused(frozen_head):
    leaves, labels, _ = make_inputs(Case(5, 8, 11, FP32, ignored="none"), 0)
    hidden_states, weight = leaves["hidden_states"], leaves["lm_head_weight"].requires_grad_(not frozen_head)
    loss = linear_logps(hidden_states, weight, labels).logps.sum()
    (grad,) = torch.autograd.grad(loss, hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(loss + grad.square().sum(), hidden_states)


@pytest.mark.parametrize(*every_pair(impl=FAST, workspace_bytes=[8000, 30_000, 10**6], frozen_head=[False, True]))
def test_any_workspace_gives_the_same_numbers(impl, workspace_bytes, frozen_head):
    leaves, labels, upstream = make_inputs(Case(67, 40, 257, FP32, has_bias=True), 0, device_of(impl))
    hidden_states, weight, bias = leaves.values()
    if frozen_head:
        weight, bias = weight.detach(), bias.detach()
    wanted = [x for x in (hidden_states, weight, bias) if x.requires_grad]
    results = []
    for settings in ({"workspace_bytes": workspace_bytes}, {}):
        logps = linear_logps(hidden_states, weight, labels, bias=bias, impl=impl, **settings).logps
        results.append([logps, *torch.autograd.grad((logps * upstream).sum(), wanted)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype != torch.uint8:  # as which the interpreter copies its arguments
                self.largest = max(self.largest, x.numel())
        return out


def largest_tensor(case, impl, frozen_head, outputs=()):
    """In elements, of what is made inside the operators, which are one operation each to those outside."""
    from fastdpo.ops import autograd

    leaves, labels, upstream = make_inputs(case, 0, device_of(impl))
    tensors = (*(x.detach() for x in (leaves["hidden_states"], leaves["lm_head_weight"], leaves["bias"])), labels)
    settings = (1.0, 4.0, ",".join(outputs), 0.0, None, impl, BF16, "", case.V)
    with Allocations() as seen:
        values = autograd.forward(*tensors, frozen_head, *settings)
        if not frozen_head:
            autograd.backward(upstream, *tensors, *values[1:3], None, None, [True, True, True], *settings)
    return seen.largest


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("outputs", [(), TOKEN_OUTPUTS])
def test_with_tiles_and_chunks_of_some_size_nothing_larger_is_created(
    impl, frozen_head, outputs, small_tiles, monkeypatch
):
    from fastdpo.ops import eager

    case = Case(201, 8, 509, BF16, has_bias=True, softcap=4.0)
    tile = 20000 if impl == "triton" else 3000
    monkeypatch.setattr(eager, "max_chunk_rows", lambda *_, **__: tile // case.V)
    largest = largest_tensor(case, impl, frozen_head, outputs)
    partials = 6 * -(-case.V // 64) * case.T  # the forward kernel's, at most six fp32 per row and tile
    assert 0 < largest <= max(tile, case.V * case.H, partials if impl == "triton" else 0)
    assert largest < case.T * case.V / 5


@pytest.mark.parametrize(
    "impl",
    [
        "tiled",
        pytest.param(
            "triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="the interpreter takes minutes")]
        ),
    ],
)
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("outputs", [(), TOKEN_OUTPUTS])
def test_nothing_as_large_as_the_logits_is_created(impl, frozen_head, outputs):
    """With the tiles and chunks that runs have."""
    case = Case(16384, 8, 32003, BF16, has_bias=True, softcap=4.0)
    if impl == "tiled":
        case = Case(2048, 8, 16411, BF16, has_bias=True, softcap=4.0)
    assert 0 < largest_tensor(case, impl, frozen_head, outputs) < case.T * case.V / 3
    rows, vocab, labels = (torch.empty(*shape, device="meta") for shape in ((case.T, 8), (case.V, 8), (case.T,)))
    with Allocations() as seen:
        plain_logps(rows, vocab, labels.long())
    assert seen.largest == case.T * case.V  # so it would have been seen


@pytest.mark.parametrize("impl", FAST)
def test_tiles_do_not_grow_with_the_vocabulary(impl):
    from fastdpo.ops import fused, tiled

    engine = {"tiled": tiled, "triton": fused}[impl]
    for V in (32000, 262144):
        hidden_states, weight = torch.empty(16384, 4096, device="meta"), torch.empty(V, 4096, device="meta")
        tiling = engine.choose_tiling(hidden_states, weight)
        limit = engine.WORKSPACE_BYTES // 8 if impl == "triton" else engine.MAX_TILE_ELEMENTS
        assert tiling.block_rows * tiling.block_vocab <= limit


@pytest.mark.parametrize("impl", ALL)
def test_autocast_casts_mixed_dtypes_and_returns_each_gradient_in_its_inputs_dtype(impl):
    leaves, labels, upstream = make_inputs(Case(20, 16, 37, FP32, has_bias=True), 0, device_of(impl))
    hidden_states = leaves["hidden_states"].detach().bfloat16().requires_grad_()
    weight, bias = leaves["lm_head_weight"], leaves["bias"]
    with torch.autocast(device_of(impl), dtype=torch.bfloat16):
        logps = linear_logps(hidden_states, weight, labels, bias=bias, impl=impl).logps
    (logps * upstream).sum().backward()
    assert logps.dtype == torch.float32
    assert (hidden_states.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, FP32, FP32)

    cast = [x.detach().to(torch.bfloat16).requires_grad_() for x in (hidden_states, weight, bias)]
    expected = exact_logps(cast[0], cast[1], labels, bias=cast[2])
    torch.testing.assert_close(logps, expected.float(), rtol=1e-5, atol=1e-6)
    for ours, grad in zip(
        (hidden_states, weight, bias), torch.autograd.grad((expected * upstream).sum(), cast), strict=True
    ):
        torch.testing.assert_close(ours.grad.double(), grad.double(), rtol=2e-2, atol=1e-2 * float(grad.abs().max()))


@pytest.mark.parametrize("impl", ALL)
def test_fp32_inputs_under_autocast_are_multiplied_in_its_dtype(impl):
    leaves, labels, _ = make_inputs(Case(20, 16, 37, FP32), 0, device_of(impl))
    with torch.autocast(device_of(impl), dtype=torch.bfloat16):
        under_autocast = linear_logps(*leaves.values(), labels, impl=impl).logps
    by_hand = linear_logps(*(x.bfloat16() for x in leaves.values()), labels, impl=impl).logps
    assert torch.equal(under_autocast, by_hand)


@pytest.mark.parametrize("impl", FAST)
def test_same_input_gives_the_same_bits(impl, small_tiles):
    results = []
    for _ in range(2):
        leaves, labels, upstream = make_inputs(Case(67, 40, 257, BF16), 0, device_of(impl))
        logps = linear_logps(*leaves.values(), labels, impl=impl).logps
        results.append([logps, *torch.autograd.grad((logps * upstream).sum(), list(leaves.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", ALL)
def test_strides_of_the_inputs_do_not_matter(impl, small_tiles):
    leaves, labels, upstream = make_inputs(Case(67, 40, 257, FP32), 0, device_of(impl))
    hidden_states, weight = (x.detach() for x in leaves.values())
    strided = [
        hidden_states.repeat_interleave(2, 0)[::2].requires_grad_(),
        weight.T.contiguous().T.requires_grad_(),
        labels.repeat_interleave(3)[::3],
    ]
    assert not any(x.is_contiguous() for x in strided)
    results = []
    for h, w, l in (strided, [hidden_states.clone().requires_grad_(), weight.clone().requires_grad_(), labels]):
        logps = linear_logps(h, w, l, impl=impl).logps
        results.append([logps, *torch.autograd.grad((logps * upstream).sum(), [h, w])])
    exact_leaves = [x.double().requires_grad_() for x in (hidden_states, weight)]
    logps = exact_logps(*exact_leaves, labels)
    assert_as_exact(*results, [logps, *torch.autograd.grad((logps * upstream).sum(), exact_leaves)])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])  # whose gradient is in forward
@pytest.mark.parametrize("impl", ALL)
def test_masked_out_vocabulary_has_no_probability_and_no_gradient(impl, frozen, small_tiles):
    leaves, labels, upstream = make_inputs(Case(40, 16, 200, FP32, has_bias=True), 0, device_of(impl))
    labels.clamp_(max=49)
    bias = leaves["bias"].detach()
    bias[50:] = -torch.inf  # more than one whole tile
    hidden_states, weight = leaves["hidden_states"], leaves["lm_head_weight"].requires_grad_(not frozen)
    wanted = [x for x in (hidden_states, weight) if x.requires_grad]
    tokens = linear_logps(hidden_states, weight, labels, bias=bias, outputs=("entropy",), impl=impl)
    grads = torch.autograd.grad((tokens.logps * upstream).sum(), wanted)
    small = linear_logps(hidden_states, weight[:50], labels, bias=bias[:50], outputs=("entropy",), impl="reference")
    expected = torch.autograd.grad((small.logps * upstream).sum(), wanted)
    torch.testing.assert_close(tokens.logps, small.logps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens.entropy, small.entropy, rtol=1e-5, atol=1e-5)
    for ours, grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", FAST)
def test_an_out_of_range_label_that_nobody_could_check_makes_its_row_nan(impl, small_tiles, monkeypatch):
    """What happens on a GPU, where reading the labels back would stop the host."""
    from fastdpo.ops import autograd
    from fastdpo.ops.head import Head

    monkeypatch.setattr(autograd, "check_labels", lambda labels, num_vocab: None)
    leaves, labels, _ = make_inputs(Case(67, 40, 257, FP32, ignored="none"), 0, device_of(impl))
    labels[3], labels[5] = 257, -1
    tokens = autograd.differentiable_logps(*leaves.values(), None, labels, Head(), impl, FP32)
    grad = torch.autograd.grad(tokens.logps.sum(), leaves["hidden_states"])[0]
    bad = torch.zeros(67, dtype=torch.bool)
    bad[[3, 5]] = True
    assert tokens.logps.isnan().cpu().equal(bad)
    assert grad.isnan().any(1).cpu().equal(bad)


def test_auto_takes_tiled_on_the_cpu_and_for_fp64():
    from fastdpo.ops.engine import resolve_impl

    assert resolve_impl("auto", torch.device("cpu"), FP32) == "tiled"
    assert resolve_impl("auto", torch.device("cuda"), torch.float64) == "tiled"


@pytest.mark.skipif(CUDA, reason="needs a machine without a GPU")
def test_triton_named_on_a_cpu_without_the_interpreter_is_refused_with_the_reason():
    program = """
import torch
from fastdpo import linear_logps
try:
    linear_logps(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.long), impl="triton")
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith('impl="triton" needs a CUDA device')


def test_fp64_inputs_stay_fp64():
    leaves, labels, _ = make_inputs(Case(20, 16, 37, torch.float64), 0)
    logps = linear_logps(*leaves.values(), labels).logps
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, exact_logps(*leaves.values(), labels), rtol=1e-12, atol=1e-12)


H, W, L = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.int64)
call = functools.partial


@pytest.mark.parametrize(
    ("bad_call", "message"),
    [
        (call(linear_logps, H[0], W, L), r"hidden_states must have shape \(T, H\), got \(3,\)"),
        (call(linear_logps, H, W[:, :2], L), r"lm_head_weight must have shape \(V, 3\).*got \(7, 2\)"),
        (call(linear_logps, H, W, L[:2]), r"labels must have shape \(4,\).*got \(2,\)"),
        (call(linear_logps, H, W, L.float()), "labels must hold integers, got torch.float32"),
        (call(linear_logps, H.long(), W, L), "hidden_states must be fp16, bf16, fp32 or fp64, got torch.int64"),
        (call(linear_logps, H.bfloat16(), W, L), "one dtype outside autocast.*bfloat16.*float32"),
        (call(linear_logps, H, W, L.to("meta")), "labels must be on cpu like hidden_states, got meta"),
        (call(linear_logps, H, W, L + 7), r"labels must lie in \[0, 7\).*got 7 in row 0"),
        (call(linear_logps, H, W, L - 1), r"labels must lie in \[0, 7\).*got -1 in row 0"),
        (call(linear_logps, H, W, L, bias=torch.zeros(3)), r"bias must have shape \(7,\).*got \(3,\)"),
        (call(linear_logps, H, W, L, softcap=0.0), "softcap must be a positive finite number or None, got 0.0"),
        (call(linear_logps, H, W, L, logit_scale=0.0), "logit_scale must be finite and not zero, got 0.0"),
        (call(linear_logps, H, W, L, outputs=["perplexity"]), "outputs must be .*got 'perplexity'"),
        (call(linear_logps, H, W, L, workspace_bytes=0), "workspace_bytes must be a positive int.*got 0"),
        (call(linear_logps, H, W, L, workspace_bytes=1e6), "workspace_bytes must be a positive int.*got 1000000.0"),
        (call(linear_logps, H, W, L, skip_tolerance="a"), "skip_tolerance must be a number, got 'a'"),
        (call(linear_logps, H, W, L.tolist()), "labels must be a tensor, got list"),
        (call(linear_logps, H, torch.nn.Linear(3, 7), L), "lm_head_weight must be a tensor, got Linear"),
        (call(linear_logps, H, W, L, impl="cuda"), "impl must be one of.*got 'cuda'"),
        (call(linear_logps, H, W, L, skip_tolerance=1.0), r"skip_tolerance must be a probability mass.*got 1.0"),
        (call(linear_logps, H, W, L, skip_tolerance=0.1, impl="reference"), "skip_tolerance must be 0.0.*got 0.1"),
        (call(linear_logps, H.double(), W.double(), L, impl="triton"), 'impl="triton" takes fp16, bf16 and fp32'),
    ],
)
def test_a_mistake_is_named(bad_call, message):
    with pytest.raises(ValueError, match=message):
        bad_call()
