"""The head op is an operator like torch's own: it compiles, traces, checkpoints and takes whatever tensors come."""

import pytest
import torch
from closeness import assert_same_to_rounding
from head_cases import BF16, FP32, Case, make_inputs
from torch.utils.checkpoint import checkpoint

from fastdpo import linear_logps, sequence_logps
from fastdpo.types import TOKEN_OUTPUTS

CUDA = torch.cuda.is_available()
FAST = ("tiled", "triton")
CASE = Case(67, 40, 257, FP32, has_bias=True, softcap=4.0)


def device_of(impl):
    return "cuda" if CUDA and impl == "triton" else "cpu"


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("skip_tolerance", "grad_in_forward", "outputs"), [(0.0, False, "lse,is_top1"), (0.0, True, ""), (1e-3, False, "")]
)
def test_opcheck_passes(impl, dtype, skip_tolerance, grad_in_forward, outputs):
    leaves, labels, _ = make_inputs(Case(20, 16, 70, dtype, has_bias=True), 0, device_of(impl))
    if grad_in_forward:
        for name in ("lm_head_weight", "bias"):
            leaves[name].requires_grad_(False)
    args = (*leaves.values(), labels, grad_in_forward, 1.0, 4.0, outputs, skip_tolerance, None, impl, dtype, "", 70)
    result = torch.library.opcheck(torch.ops.fastdpo.linear_logps.default, args)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("outputs", [(), TOKEN_OUTPUTS])
def test_compiled_in_one_graph_it_gives_the_same_numbers(impl, frozen_head, outputs):
    def step(hidden_states, weight, bias, labels, upstream):
        tokens = linear_logps(hidden_states, weight, labels, bias=bias, softcap=4.0, outputs=outputs, impl=impl)
        statistics = [getattr(tokens, name) for name in outputs]
        return (tokens.logps * upstream).sum(), tokens.logps, *statistics

    fast = compiled(step)
    for T in (67, 30):  # the second time with another number of rows
        case = Case(T, 40, 257, FP32, has_bias=True, softcap=4.0)
        results = []
        for function in (step, fast):
            leaves, labels, upstream = make_inputs(case, 0, device_of(impl))
            wanted = [leaves["hidden_states"]] if frozen_head else list(leaves.values())
            for leaf in leaves.values():
                leaf.requires_grad_(any(leaf is x for x in wanted))
            loss, *values = function(*leaves.values(), labels, upstream)
            results.append([*values, *torch.autograd.grad(loss, wanted)])
        assert_same_to_rounding(*results)


def test_sequence_logps_compiles_in_one_graph_too():
    leaves, labels, _ = make_inputs(Case(6, 8, 30, FP32), 0)
    cu_seqlens, rows = torch.tensor([0, 3, 7]), torch.tensor([0, 1, 2, 0, 3, 4, 5])

    def step(hidden_states, weight):
        found = sequence_logps(hidden_states, weight, labels, cu_seqlens, rows=rows)
        return found.sums, found.lengths

    sums, lengths = compiled(step)(*leaves.values())
    expected, expected_lengths = step(*leaves.values())
    grads = [torch.autograd.grad(x.sum(), list(leaves.values())) for x in (sums, expected)]
    assert_same_to_rounding([sums, lengths, *grads[0]], [expected, expected_lengths, *grads[1]])


def test_the_reference_compiles_too():
    leaves, labels, _ = make_inputs(CASE, 0)

    def step(*floats):
        return linear_logps(floats[0], floats[1], labels, bias=floats[2], impl="reference").logps

    torch.testing.assert_close(compiled(step)(*leaves.values()), step(*leaves.values()))


def test_a_wrong_label_is_refused_by_the_compiled_op_as_well():
    fast = compiled(lambda h, w, labels: linear_logps(h, w, labels).logps)
    h, w = torch.randn(4, 3), torch.randn(7, 3)
    fast(h, w, torch.tensor([0, 1, 2, 6]))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\)"):
        fast(h, w, torch.tensor([0, 1, 2, 7]))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint_it_gives_the_same_bits(impl, frozen_head, use_reentrant):
    results = []
    for checkpointed in (False, True):
        leaves, labels, upstream = make_inputs(CASE, 0, device_of(impl))
        leaves["lm_head_weight"].requires_grad_(not frozen_head)
        leaves["bias"].requires_grad_(not frozen_head)

        def logps(hidden_states, weight, bias, labels=labels):
            return linear_logps(hidden_states, weight, labels, bias=bias, impl=impl).logps

        if checkpointed:
            found = checkpoint(logps, *leaves.values(), use_reentrant=use_reentrant)
        else:
            found = logps(*leaves.values())
        wanted = [x for x in leaves.values() if x.requires_grad]
        (found * upstream).sum().backward()
        results.append([found, *(x.grad for x in wanted)])
    # a reentrant checkpoint's first forward wants no gradient, so a frozen head's log-probs come from the other pass
    first = 1 if use_reentrant and frozen_head else 0
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(results[0][first:], results[1][first:], strict=True))


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode

    leaves, labels, _ = make_inputs(Case(20, 16, 70, BF16), 0)
    real = linear_logps(*leaves.values(), labels, outputs=TOKEN_OUTPUTS)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = linear_logps(
            *(mode.from_tensor(x) for x in leaves.values()), mode.from_tensor(labels), outputs=TOKEN_OUTPUTS
        )
    for name, value in vars(real).items():
        assert getattr(fake, name).shape == value.shape
        assert getattr(fake, name).dtype == value.dtype


@pytest.mark.parametrize("impl", FAST)
def test_views_with_offsets_and_labels_of_any_integer_type(impl):
    leaves, labels, upstream = make_inputs(Case(67, 40, 257, FP32, ignored="none"), 0, device_of(impl))
    hidden_states, weight = leaves.values()
    padded_h = torch.zeros(70, 43, device=labels.device)
    padded_h[2:69, 1:41] = hidden_states.detach()
    padded_w = torch.zeros(300, 41, device=labels.device)
    padded_w[7:264, 1:] = weight.detach()
    padded_h.requires_grad_()
    padded_w.requires_grad_()
    for dtype in (torch.int32, torch.int16):
        logps = linear_logps(padded_h[2:69, 1:41], padded_w[7:264, 1:], labels.to(dtype), impl=impl).logps
        expected = linear_logps(hidden_states, weight, labels, impl=impl).logps
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad((logps * upstream).sum(), [padded_h, padded_w])
        expected = torch.autograd.grad((expected * upstream).sum(), [hidden_states, weight])
        torch.testing.assert_close(grads[0][2:69, 1:41], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads[1][7:264, 1:], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_another_stream_and_another_device():
    leaves, labels, upstream = make_inputs(CASE, 0, "cuda")
    expected = linear_logps(*list(leaves.values())[:2], labels).logps
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        logps = linear_logps(*list(leaves.values())[:2], labels).logps
        grad = torch.autograd.grad((logps * upstream).sum(), leaves["hidden_states"])[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(logps, expected)
    assert torch.equal(grad, torch.autograd.grad((expected * upstream).sum(), leaves["hidden_states"])[0])
    if torch.cuda.device_count() > 1:
        second = [x.detach().to("cuda:1") for x in leaves.values()]
        assert torch.equal(linear_logps(*second[:2], labels.to("cuda:1")).logps.cpu(), expected.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_more_logits_than_32_bits_can_count():
    """T * V = 2.4e9: the last rows of a chunk would be written elsewhere with 32-bit offsets."""
    T, H, V = 16400, 64, 150_001
    torch.manual_seed(0)
    hidden_states = torch.randn(T, H, device="cuda", dtype=BF16, requires_grad=True)
    weight = torch.randn(V, H, device="cuda", dtype=BF16, requires_grad=True)
    labels = torch.randint(V, (T,), device="cuda")
    logps = linear_logps(hidden_states, weight, labels).logps
    last = slice(T - 64, T)
    exact = linear_logps(hidden_states[last].double(), weight.double(), labels[last], impl="reference").logps
    assert float((logps[last] - exact).abs().max()) < 1e-3
    grad = torch.autograd.grad(logps[last].sum(), hidden_states)[0][last]
    expected = torch.autograd.grad(exact.sum(), hidden_states)[0][last]
    assert float((grad - expected).norm() / expected.norm()) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_nothing_in_the_hot_path_waits_for_the_device():
    leaves, labels, upstream = make_inputs(CASE, 0, "cuda")
    hidden_states, weight, bias = leaves.values()

    def step(tolerance=0.0):
        logps = linear_logps(hidden_states, weight, labels, bias=bias, skip_tolerance=tolerance).logps
        return torch.autograd.grad((logps * upstream).sum(), [hidden_states, weight, bias])

    for tolerance in (0.0, 1e-3):
        step(tolerance)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(tolerance)
        finally:
            torch.cuda.set_sync_debug_mode("default")
