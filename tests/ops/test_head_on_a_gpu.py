"""What only a card can show of the head op, and what of it Triton's interpreter can show on a CPU: every test runs on
both where it can, small in the interpreter.
"""

import pytest
import torch
from head_cases import BF16, FP16, FP32, NAMES, Case, assert_at_most_twice_plain, exact_logps, make_inputs, plain_logps
from test_sequence_loss import LENGTHS, NUM_ROWS, cu_seqlens_of, distance, dpo, ends_of, grads_by, ours

from fastdpo import linear_logps, sequence_logps
from fastdpo.kernels import launch, tuning
from fastdpo.kernels.backward import fill_logit_grads
from fastdpo.kernels.forward import fused_forward, fused_forward_with_grads
from fastdpo.kernels.launch import Blocks
from fastdpo.ops.sequence_loss import sequence_loss
from fastdpo.types import TOKEN_OUTPUTS

CUDA = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
ON_BOTH = [
    pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="the interpreter is for machines without a GPU")),
    pytest.param("cuda", marks=GPU),
]
on_both = pytest.mark.parametrize("device", ON_BOTH)


def each_on_both(names, values, slow, id_of):
    """Parameters `names` and `device`. The interpreter takes seconds for what a GPU does in none: there the values for
    which `slow` is true, which show no more of it than the others, are slow tests.
    """
    cases = []
    for value in values:
        for on in ON_BOTH:
            marks = [*on.marks, *([pytest.mark.slow] if on is ON_BOTH[0] and slow(*value) else [])]
            cases.append(pytest.param(*value, *on.values, marks=marks, id=f"{id_of(*value)}-{on.values[0]}"))
    return pytest.mark.parametrize((*names, "device"), cases)


def without_waits(run):
    """Runs once to compile, and again where every wait for the device is an error."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# A loss whose gradient is made in forward

LOSS_CASES = [
    *(Case(NUM_ROWS, 72, 521, dtype) for dtype in (FP32, BF16, FP16)),
    Case(NUM_ROWS, 72, 521, BF16, has_bias=True, logit_scale=0.5, softcap=4.0),
]


@each_on_both(
    ("case", "rows_in_workspace"),
    [(case, rows) for case in LOSS_CASES for rows in (20, 90)],
    slow=lambda case, rows: rows == 20 if case.dtype != BF16 else rows == 90 or not case.has_bias,
    id_of=lambda case, rows: f"{case.id}-{'many chunks, a group alone too large' if rows == 20 else 'two chunks'}",
)
def test_a_loss_made_in_forward_is_off_by_at_most_twice_what_plain_pytorch_is(case, rows_in_workspace, device):
    found = ours(case, "triton", workspace_bytes=rows_in_workspace * 528 * case.dtype.itemsize)
    exact, plain = grads_by(exact_logps, case, torch.float64), grads_by(plain_logps, case)
    for x, p, e in zip(found, plain, exact, strict=True):
        assert distance(x, e) <= 2 * distance(p, e) + 1e-6 * max(1.0, float(e.detach().norm()))


def loss_inputs(device, dtype=BF16, num_columns=0):
    case = Case(NUM_ROWS, 64, 528, dtype, ignored="none")
    leaves, labels, _ = make_inputs(case, 0, device)
    hidden_states, weight = leaves["hidden_states"], leaves["lm_head_weight"]
    adapter = None
    if num_columns:
        g = torch.Generator().manual_seed(1)
        extra, adapter = (torch.randn(n, num_columns, generator=g).to(device, dtype) for n in (NUM_ROWS, 528))
        hidden_states = torch.cat([hidden_states.detach(), extra], 1).requires_grad_()
        weight, adapter = weight.detach(), adapter.requires_grad_()
    return hidden_states, weight, labels, adapter


def loss_step(device, dtype=BF16, num_columns=0, **settings):
    hidden_states, weight, labels, adapter = loss_inputs(device, dtype, num_columns)
    leaves = [x for x in (hidden_states, weight, adapter) if x is not None and x.requires_grad]
    ends, cu_seqlens = ends_of(LENGTHS), cu_seqlens_of(LENGTHS, device)

    from test_sequence_loss import REF

    ref = REF.to(device)

    def loss_of(sums, lengths, sequences, groups):
        rewards = 0.1 * (sums - ref[sequences]).view(-1, 2)
        return -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()

    def run():
        args = (hidden_states, weight, labels, cu_seqlens, ends, loss_of)
        loss, found = sequence_loss(*args, impl="triton", adapter_weight=adapter, **settings)
        return [loss.detach(), found.sums, *torch.autograd.grad(loss, leaves)]

    return run


@each_on_both(("num_columns",), [(3,), (8,)], slow=lambda num: num == 8, id_of=str)
def test_an_adapter_on_the_head_gives_what_a_wide_head_gives(num_columns, device):
    small = {"workspace_bytes": 20 * 528 * 2}
    found = loss_step(device, num_columns=num_columns, **small)()
    hidden_states, weight, labels, adapter = loss_inputs(device, num_columns=num_columns)
    wide = torch.cat([weight, adapter.detach()], 1).requires_grad_()
    args = (hidden_states, wide, labels, cu_seqlens_of(LENGTHS, device), ends_of(LENGTHS))
    loss, _ = sequence_loss(*args, lambda sums, _, sequences, __: dpo(sums.cpu(), sequences).to(device), impl="tiled")
    expected = torch.autograd.grad(loss, [hidden_states, wide])
    torch.testing.assert_close(found[0], loss.detach(), rtol=1e-3, atol=1e-3)
    for ours_, theirs in ((found[2], expected[0]), (found[3], expected[1][:, 64:])):
        assert float((ours_.double() - theirs.double()).norm() / theirs.double().norm()) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("num_columns", [0, 3])
def test_a_loss_made_in_forward_never_waits_for_the_device(num_columns):
    without_waits(loss_step("cuda", num_columns=num_columns, workspace_bytes=20 * 528 * 2))


@each_on_both(("num_columns",), [(0,), (3,)], slow=lambda num: num == 0, id_of=str)
def test_two_runs_of_a_loss_give_the_same_bits(num_columns, device):
    run = loss_step(device, num_columns=num_columns, workspace_bytes=20 * 528 * 2)
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# Precision of the caller


@on_both
def test_autocast_over_fp32_weights_gives_what_their_casts_give(device):
    leaves, labels, upstream = make_inputs(Case(67, 72, 264, FP32), 0, device)
    args = list(leaves.values())
    with torch.autocast(device, BF16):
        logps = linear_logps(*args, labels, impl="triton").logps
    grads = torch.autograd.grad((logps * upstream).sum(), args)
    casts = [x.detach().to(BF16).requires_grad_() for x in args]
    expected = linear_logps(*casts, labels, impl="triton").logps
    expected_grads = torch.autograd.grad((expected * upstream).sum(), casts)
    assert [grad.dtype for grad in grads] == [FP32, FP32]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert float((grad - other.float()).norm() / grad.norm()) < 1e-2


@on_both
def test_a_gradient_scaler_that_meets_an_inf_skips_the_step_and_scales_less(device):
    leaves, labels, upstream = make_inputs(Case(67, 72, 264, FP16), 0, device)
    masters = [x.detach().float().requires_grad_() for x in leaves.values()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, backoff_factor=2.0**-16)
    seen = []
    for _ in range(8):
        before = [x.detach().clone() for x in masters]
        optimizer.zero_grad()
        with torch.autocast(device, FP16):
            hidden_states = masters[0].to(FP16)  # as a layer under autocast gives it
            logps = linear_logps(hidden_states, masters[1], labels, impl="triton").logps
        scaler.scale(-(logps * upstream).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(all(torch.equal(x, y) for x, y in zip(before, masters, strict=True)))
        if not seen[-1]:
            break
    assert seen[0]  # an inf: nothing was changed
    assert not seen[-1]  # and in the end something is
    assert scaler.get_scale() < 2.0**40
    assert all(x.isfinite().all() for x in masters)


# Blocks, descriptors and pointers


def block_inputs(device, V=4096):
    """In the interpreter as small as still has a ragged tile in every direction."""
    T, H, V = (300, 128, V) if device == "cuda" else (70, 72, 264)
    g = torch.Generator().manual_seed(0)
    hidden_states, weight = (torch.randn(n, H, generator=g).to(device, BF16) for n in (T, V))
    return hidden_states, weight * 0.1, torch.randint(V, (T,), generator=g).to(device)


def both_ways(device, hidden_states, weight, labels):
    """logps, lse and D through tensor descriptors where the operands allow it, and through pointers."""
    blocks = Blocks(128, 128, 64, 8, 3, tma=True) if device == "cuda" else Blocks(32, 64, 64, 1, 1, tma=True)
    found = []
    for some in (blocks, blocks._replace(tma=False)):
        out = torch.empty(len(labels), len(weight), dtype=weight.dtype, device=device)
        values = fused_forward_with_grads(out, hidden_states, weight, None, labels, 1.0, None, ("lse",), some)
        again = torch.empty_like(out)
        lse = values["lse_whole"], values["lse_rest"]
        one = torch.ones_like(lse[0])
        fill_logit_grads(again, hidden_states, weight, None, labels, *lse, one, 0, len(weight), 1.0, None, some)
        found.append([values["logps"], values["lse"], out, again])
    return found


OPERANDS = {
    "whole": lambda h, w, y: (h, w, y),
    "slices of rows": lambda h, w, y: (h[5:], w[3:], y[5:] % (len(w) - 3)),
    "slices of columns, aligned": lambda h, w, y: (h[:, 8:], w[:, 8:], y),
    "slices of columns, odd": lambda h, w, y: (h[:, 3:], w[:, 3:], y),
    "an odd row stride": lambda h, w, y: (pad_columns(h, 5), pad_columns(w, 3), y),
    "columns that are not contiguous": lambda h, w, y: (h.T.contiguous().T, w.T.contiguous().T, y),
    "a ragged vocabulary": lambda h, w, y: (h, w[:-7], y % (len(w) - 7)),
    "one row": lambda h, w, y: (h[7:8], w, y[7:8]),
}


def pad_columns(x, more):
    """x in rows that are longer than it."""
    wide = torch.zeros(len(x), x.shape[1] + more, dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@on_both
@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_descriptors_and_pointers_give_the_same_bits(operands, device):
    """The same sums in the same order, however the tiles come in."""
    descriptors, pointers = both_ways(device, *operands(*block_inputs(device, V=528)))
    for x, y in zip(descriptors, pointers, strict=True):
        assert torch.equal(x, y)


@on_both
@pytest.mark.parametrize("kernel", launch.Row._fields)
@pytest.mark.parametrize("dtype", [BF16, FP32, FP16], ids=NAMES.get)
def test_every_row_of_the_table_launches_and_agrees(kernel, dtype, device):
    if device == "cpu" and dtype != BF16:
        pytest.skip("other modules have the interpreter's other dtypes")
    T, H, V = (150, 128, 528) if device == "cuda" else (67, 72, 264)
    case = Case(T, H, V, dtype, has_bias="options" in kernel, softcap=9.0 if "options" in kernel else None)
    outputs = TOKEN_OUTPUTS if "options" in kernel else ()
    tolerance = 2.0**-20 if kernel == "skipping" else 0.0

    def op(hidden_states, weight, labels, **settings):
        settings |= {"outputs": outputs, "skip_tolerance": tolerance, "impl": "triton"}
        if kernel.startswith("eager"):
            frozen = {name: x.detach() for name, x in settings.items() if torch.is_tensor(x)}
            weight, settings = weight.detach(), settings | frozen
        return linear_logps(hidden_states, weight, labels, **settings).logps

    if kernel.startswith("eager"):  # the gradient of a frozen head is made in forward
        leaves, labels, upstream = make_inputs(case, 0, device)
        args = dict(leaves)
        hidden_states, weight = args.pop("hidden_states"), args.pop("lm_head_weight")
        logps = op(hidden_states, weight, labels, **args, **case.settings)
        (grad,) = torch.autograd.grad((logps * upstream).sum(), hidden_states)
        errors = []
        for dtype_, by in ((torch.float64, exact_logps), (None, plain_logps)):
            casts = {name: x.detach().to(dtype_ or x.dtype).requires_grad_() for name, x in leaves.items()}
            given = dict(casts)
            found = by(given.pop("hidden_states"), given.pop("lm_head_weight"), labels, **given, **case.settings)
            errors.append(torch.autograd.grad((found * upstream.to(found)).sum(), casts["hidden_states"])[0].double())
        exact, plain = errors
        assert (grad.double() - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()
    else:
        assert_at_most_twice_plain(op, case, device)


@each_on_both(
    ("family",), [(name,) for name in tuning.TASKS], slow=lambda family: family in ("eager", "products"), id_of=str
)
def test_every_candidate_of_the_tuner_launches_and_agrees(family, device):
    """What does not launch would be left out by the tuner; here it fails."""
    hidden_states, weight, labels = block_inputs(device)
    task = tuning.TASKS[family](hidden_states, weight, labels)
    expected = [x.clone() for x in task.run(task.default)]
    wrong = {}
    for blocks in task.candidates:
        for x in task.run(task.default):
            x.fill_(torch.nan)
        try:
            found = task.run(blocks)
            errors = [tuning._relative_error(x, y) for x, y in zip(found, expected, strict=True)]
            if not all(error <= tuning._tolerance(y) for error, y in zip(errors, expected, strict=True)):
                wrong[blocks] = f"off by {max(errors):.1e}"
        except Exception as error:
            wrong[blocks] = f"{type(error).__name__}: {error}"[:200]
    assert wrong == {}


# Compilers and graphs


@on_both
def test_a_compiled_sum_of_sequences_gives_what_an_eager_one_gives(device):
    leaves, labels, _ = make_inputs(Case(67, 72, 264, FP32), 0, device)
    args, ends = list(leaves.values()), torch.tensor([0, 30, 67], device=device)

    def sums(hidden_states, weight):
        return sequence_logps(hidden_states, weight, labels, ends, impl="triton").sums

    compiled = torch.compile(sums, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    results = []
    for function in (sums, compiled):
        found = function(*args)
        results.append([found, *torch.autograd.grad(found.square().sum(), args)])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("frozen_head", [False, True])
def test_a_captured_graph_replays_on_new_numbers(frozen_head):
    leaves, labels, upstream = make_inputs(Case(300, 128, 4096, BF16), 0, "cuda")
    hidden_states, weight = leaves["hidden_states"], leaves["lm_head_weight"].requires_grad_(not frozen_head)
    wanted = [hidden_states] if frozen_head else [hidden_states, weight]
    ends = torch.tensor([0, 100, 300], device="cuda")

    def run():
        found = sequence_logps(hidden_states, weight, labels, ends, impl="triton")
        loss = (found.tokens.logps * upstream).sum() + found.sums.sum()
        return [found.sums, *torch.autograd.grad(loss, wanted)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (1, 2):
        with torch.no_grad():
            hidden_states.copy_(torch.randn(hidden_states.shape, generator=torch.Generator().manual_seed(seed)))
            labels.copy_(torch.randint(4096, labels.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(torch.equal(x, y) for x, y in zip(replayed, run(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_sums_of_log_probs_never_wait_for_the_device():
    leaves, labels, _ = make_inputs(Case(300, 128, 4096, BF16), 0, "cuda")
    ends = torch.tensor([0, 100, 300], device="cuda")

    def run():
        found = sequence_logps(*leaves.values(), labels, ends, outputs=("entropy",))
        return torch.autograd.grad(found.sums.sum(), list(leaves.values()))

    without_waits(run)


@on_both
def test_partials_of_persistent_programs_are_those_of_others(device):
    hidden_states, weight, labels = block_inputs(device, V=528)
    plain = Blocks(128, 128, 64, 8, 3) if device == "cuda" else Blocks(32, 64, 64, 1, 1)
    expected = fused_forward(hidden_states, weight, None, labels, 1.0, None, ("lse",), plain)
    for tma in (False, True):
        blocks = plain._replace(persistent=2, tma=tma)
        found = fused_forward(hidden_states, weight, None, labels, 1.0, None, ("lse",), blocks)
        for name, x in found.items():
            assert torch.equal(x, expected[name]), name
