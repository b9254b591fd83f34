"""A loss over groups of sequences whose gradient is made in forward equals the loss of plain log-probs."""

import functools

import pytest
import torch
import torch.nn.functional as F
from closeness import distance
from covering import every_pair
from head_cases import BF16, FP32, Case, exact_logps, make_inputs, plain_logps
from torch.utils.flop_counter import FlopCounterMode

from fastdpo.ops import sequence_loss as module
from fastdpo.ops.sequence_loss import GroupEnd, sequence_loss

CUDA = torch.cuda.is_available()
FAST = ("tiled", "triton")
LENGTHS = [5, 9, 3, 20, 7, 1, 40, 41]  # four pairs, the last of 81 rows
REF = torch.tensor([3.0, -2.0, 0.5, 8.0, -6.0, 1.0, 0.0, 2.0])
NUM_ROWS = sum(LENGTHS)


def device_of(impl):
    return "cuda" if CUDA and impl == "triton" else "cpu"


def dpo(sums, sequences):
    """Four pairs at beta = 0.1, their reference sums shifted so that no weight is near 0 or 1."""
    rewards = 0.1 * (sums - REF.to(sums)[sequences]).view(-1, 2)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()


def ends_of(lengths, per_group=2):
    ends = [sum(lengths[:stop]) for stop in range(per_group, len(lengths) + 1, per_group)]
    return [GroupEnd(end, end, per_group * (i + 1)) for i, end in enumerate(ends)]


def cu_seqlens_of(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def grads_by(logps_fn, case, dtype=None):
    """Loss, log-probs and gradients by plain autograd through `logps_fn`, in `dtype`."""
    leaves, labels, _ = make_inputs(case, 0)
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
    args = dict(leaves)
    logps = logps_fn(args.pop("hidden_states"), args.pop("lm_head_weight"), labels, **args, **case.settings)
    sums = torch.stack([part.sum() for part in logps.split(LENGTHS)])
    loss = dpo(sums, slice(0, 8)) / 4
    return [loss, logps, *torch.autograd.grad(loss, list(leaves.values()))]


def ours(case, impl, **settings):
    leaves, labels, _ = make_inputs(case, 0, device_of(impl))
    args = dict(leaves)
    loss, found = sequence_loss(
        args.pop("hidden_states"),
        args.pop("lm_head_weight"),
        labels,
        cu_seqlens_of(LENGTHS, device_of(impl)),
        ends_of(LENGTHS),
        lambda sums, lengths, sequences, groups: dpo(sums, sequences),
        impl=impl,
        **args,
        **case.settings,
        **settings,
    )
    loss = loss / 4
    return [loss, found.tokens.logps, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_without_gradients_in_forward_the_loss_and_its_gradients_are_the_same(dtype):
    case = Case(NUM_ROWS, 24, 97, dtype)
    found, expected = ours(case, "tiled", grad_in_forward=False), ours(case, "tiled")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **({"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}))


@pytest.mark.parametrize(
    *every_pair(
        impl=FAST,
        case=[
            Case(NUM_ROWS, 40, 257, FP32),
            Case(NUM_ROWS, 40, 257, FP32, has_bias=True, logit_scale=0.5, softcap=4.0),
            Case(NUM_ROWS, 150, 131, BF16, has_bias=True),
            Case(NUM_ROWS, 40, 257, FP32, ignored="all"),
        ],
        rows_in_workspace=[200, 90, 40, 10],  # all pairs at once; one or two; the last not; only one
    ),
    ids=lambda value: getattr(value, "id", str(value)),
)
def test_loss_and_gradients_are_off_by_at_most_twice_what_plain_pytorch_is(impl, case, rows_in_workspace):
    itemsize = 2 if impl == "triton" and case.dtype == BF16 else 4
    found = ours(case, impl, workspace_bytes=rows_in_workspace * case.V * itemsize)
    exact, plain = grads_by(exact_logps, case, torch.float64), grads_by(plain_logps, case)
    for x, p, e in zip(found, plain, exact, strict=True):
        assert distance(x, e) <= 2 * distance(p, e) + 1e-6 * max(1.0, float(e.detach().norm()))


@pytest.mark.parametrize(("rows_in_workspace", "twice"), [(126, 0), (81, 0), (40, 81), (20, 23 + 81), (1, 126)])
def test_it_is_made_in_forward_unless_a_group_outgrows_the_workspace(rows_in_workspace, twice):
    """Groups of 14, 23, 8 and 81 rows; those that do not fit have their logits computed twice."""
    H, V = 40, 257
    leaves, labels, _ = make_inputs(Case(NUM_ROWS, H, V, FP32, ignored="none"), 0)
    args = (*leaves.values(), labels, cu_seqlens_of(LENGTHS, "cpu"), ends_of(LENGTHS))
    with FlopCounterMode(display=False) as counter:
        sequence_loss(*args, lambda s, l, sequences, g: dpo(s, sequences), workspace_bytes=rows_in_workspace * V * 4)
    assert counter.get_total_flops() == 2 * H * V * (NUM_ROWS + twice + 2 * NUM_ROWS)  # logits; dH and dW


def test_shared_rows_and_token_weights_count_as_in_sequence_logps():
    from fastdpo import sequence_logps

    leaves, labels, _ = make_inputs(Case(8, 16, 50, FP32, ignored="none"), 0)
    # two groups of two sequences; each pair shares its first row
    rows, cu = torch.tensor([0, 1, 2, 0, 3, 4, 5, 6, 4, 7]), torch.tensor([0, 3, 5, 8, 10])
    weights = torch.linspace(0.5, 1.5, 10)
    ends = [GroupEnd(4, 5, 2), GroupEnd(8, 10, 4)]
    coefficients = torch.tensor([0.3, -0.4, 0.2, -0.7])

    def loss_of(sums, lengths, sequences, groups):
        assert lengths.tolist() == [3, 2] * (groups.stop - groups.start)
        return (sums.square() * coefficients[sequences]).sum()

    args = (*leaves.values(), labels, cu)
    for rows_in_workspace in (8, 4, 2):
        loss, found = sequence_loss(
            *args, ends, loss_of, rows=rows, weights=weights, workspace_bytes=rows_in_workspace * 50 * 4
        )
        plain = sequence_logps(*args, rows=rows, weights=weights, impl="reference")
        expected = (plain.sums.square() * coefficients).sum()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.sums, plain.sums, rtol=1e-5, atol=1e-5)
        assert found.lengths.tolist() == plain.lengths.tolist()
        grads, expected_grads = (torch.autograd.grad(x, list(leaves.values())) for x in (loss, expected))
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leaves_out", [True, False])
def test_pairs_without_weight_cost_no_product_where_that_stops_no_gpu(leaves_out, monkeypatch):
    """Hinge: a pair beyond the margin has weight 0; its rows reach no matmul of backward."""
    monkeypatch.setattr(module, "RowGradients", functools.partial(module.RowGradients, leaves_out=leaves_out))
    H, V = 16, 50
    leaves, labels, _ = make_inputs(Case(NUM_ROWS, H, V, FP32, ignored="none"), 0)
    weight_of_pair = torch.tensor([1.0, 0.0, 1e-30, 2.0])

    def loss_of(sums, lengths, sequences, groups):
        return (weight_of_pair[groups] * sums.view(-1, 2).diff(dim=1)[:, 0]).sum()

    args = (*leaves.values(), labels, cu_seqlens_of(LENGTHS, "cpu"), ends_of(LENGTHS), loss_of)
    with FlopCounterMode(display=False) as counter:
        loss, _ = sequence_loss(*args)
    with_weight = 14 + 81 if leaves_out else NUM_ROWS
    assert counter.get_total_flops() == 2 * H * V * (NUM_ROWS + 2 * with_weight)  # logits; dH and dW
    grads = torch.autograd.grad(loss, list(leaves.values()))
    logps = exact_logps(*leaves.values(), labels)
    sums = torch.stack([part.sum() for part in logps.split(LENGTHS)]).view(-1, 2)
    expected = torch.autograd.grad((weight_of_pair * sums.diff(dim=1)[:, 0]).sum(), list(leaves.values()))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [torch.inf, torch.nan])
def test_a_weight_that_is_no_number_is_not_taken_for_none(weight):
    leaves, labels, _ = make_inputs(Case(NUM_ROWS, 16, 50, FP32, ignored="none"), 0)
    weights = torch.tensor([1.0, weight, 1.0, 1.0])
    loss, _ = sequence_loss(
        *leaves.values(),
        labels,
        cu_seqlens_of(LENGTHS, "cpu"),
        ends_of(LENGTHS),
        lambda sums, lengths, sequences, groups: (weights[groups] * sums.view(-1, 2)[:, 0]).sum(),
    )
    assert not all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(leaves.values())))


def test_no_weight_at_all_gives_zero_gradients():
    leaves, labels, _ = make_inputs(Case(NUM_ROWS, 16, 50, FP32, ignored="none"), 0)
    loss, _ = sequence_loss(
        *leaves.values(), labels, cu_seqlens_of(LENGTHS, "cpu"), ends_of(LENGTHS), lambda sums, *_: 0.0 * sums.sum()
    )
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, list(leaves.values())))


def test_without_gradients_it_computes_none_and_a_second_backward_is_refused(monkeypatch):
    case = Case(NUM_ROWS, 16, 50, FP32)
    leaves, labels, _ = make_inputs(case, 0)
    args = (labels, cu_seqlens_of(LENGTHS, "cpu"), ends_of(LENGTHS), lambda s, l, sequences, g: dpo(s, sequences))
    loss, _ = sequence_loss(*leaves.values(), *args)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"gradients of this loss .*one backward"):
        loss.backward()
    monkeypatch.setattr(module, "engine_of", None)
    with torch.no_grad():
        without, found = sequence_loss(*leaves.values(), *args)
    assert not without.requires_grad
    assert not found.sums.requires_grad
    torch.testing.assert_close(without, loss.detach())


def test_under_autocast_gradients_have_their_inputs_dtypes():
    case = Case(NUM_ROWS, 16, 50, FP32)
    leaves, labels, _ = make_inputs(case, 0)
    args = (labels, cu_seqlens_of(LENGTHS, "cpu"), ends_of(LENGTHS), lambda s, l, sequences, g: dpo(s, sequences))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = sequence_loss(leaves["hidden_states"].bfloat16(), leaves["lm_head_weight"], *args)
    loss.backward()
    assert found.sums.dtype == loss.dtype == torch.float32
    exact = grads_by(exact_logps, case, torch.float64)
    assert leaves["lm_head_weight"].grad.dtype == torch.float32
    for leaf, grad in zip(leaves.values(), exact[2:], strict=True):
        assert distance(leaf.grad / 4, grad) <= 0.03 * float(grad.norm())


H, W, L, CU = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    ("ends", "settings", "message"),
    [
        ([], {}, "group_ends must rise to GroupEnd"),
        ([(4, 4, 1)], {}, r"group_ends must rise to GroupEnd\(row=4, token=4, sequence=2\)"),
        ([(3, 3, 1), (2, 4, 1), (4, 4, 2)], {}, "group_ends must rise"),
        ([(2, 3, 1), (4, 4, 2)], {}, r"group_ends must .*tokens \[2, 4\], got"),
        ([(2, 2, 1), (4, 4, 2)], {"rows": torch.tensor([0, 2, 2, 3])}, r"rows must .*0 to 2, got"),
        ([(4, 4, 2)], {"impl": "reference"}, "impl must be .*got 'reference'"),
        ([(4, 4, 2)], {"softcap": -1.0}, "softcap must be"),
    ],
)
def test_a_mistake_is_named(ends, settings, message):
    with pytest.raises(ValueError, match=message):
        sequence_loss(H, W, L, CU, ends, lambda sums, *_: sums.sum(), **settings)


def test_labels_outside_the_vocabulary_are_refused_on_the_cpu():
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\)"):
        sequence_loss(H.requires_grad_(), W, L + 7, CU, [(4, 4, 2)], lambda sums, *_: sums.sum())


@pytest.mark.parametrize("impl", FAST)
def test_a_workspace_full_of_nan_changes_no_bit(impl, monkeypatch):
    case = Case(NUM_ROWS, 40, 257, FP32, has_bias=True, softcap=4.0)
    as_it_is = ours(case, impl, workspace_bytes=40 * 257 * 4)
    workspace = module.workspace
    monkeypatch.setattr(module, "workspace", lambda *args: workspace(*args).fill_(torch.nan))
    for before, after in zip(as_it_is, ours(case, impl, workspace_bytes=40 * 257 * 4), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("num_pairs", "V", "workspace_bytes"),
    [(16, 4000, 2**21), (16, 8000, 2**21), (32, 4000, 2**21), (32, 16000, None)],
)
def test_peak_memory_is_workspace_sums_and_results(num_pairs, V, workspace_bytes):
    from fastdpo.evidence.memory import peak_live_bytes
    from fastdpo.ops import tiled_eager

    T, H = 64 * num_pairs, 64
    torch.manual_seed(0)
    hidden_states, weight = torch.randn(T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels, cu_seqlens = torch.randint(V, (T,)), torch.arange(0, T + 1, 32)
    ends = [GroupEnd(64 * i, 64 * i, 2 * i) for i in range(1, num_pairs + 1)]

    def step():
        loss, _ = sequence_loss(
            hidden_states,
            weight,
            labels,
            cu_seqlens,
            ends,
            lambda sums, *_: -F.logsigmoid(sums.view(-1, 2).diff(dim=1)).sum(),
            workspace_bytes=workspace_bytes,
        )
        return torch.autograd.grad(loss, [hidden_states, weight])

    sums = 4 * (T + V) * H  # which are the results as well: fp32 gradients are scaled where they lie
    softmax_slices = 3 * 4 * 2**19 // 4  # what a slice's statistics are made from
    row_numbers = 30 * 4 * T
    space = workspace_bytes or tiled_eager.WORKSPACE_BYTES
    rows = space // (4 * V) * H * 4  # c * H of a chunk
    assert peak_live_bytes(step) <= space + sums + rows + softmax_slices + row_numbers
    assert space < 4 * T * V / 3
