"""LinearDPOLoss against the full logits in fp64, and against the loss of Liger whose place it takes."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from covering import every_pair
from linear_batches import Batch, V, make_batch, run

from fastdpo import LOSSES, LinearDPOLoss, PairScores, preference_loss
from fastdpo.integrations.linear_losses import LINEAR_DPO_LOSSES, base

SMOOTHING = {"exo_pair": 0.1, "robust": 0.1}


def full_logits(loss, batch, use_ref_model=True):
    """What LinearDPOLoss promises, written out with log-softmax over the whole vocabulary."""

    def logps_of(weight, hidden, bias):
        logits = F.linear(hidden, weight, bias)
        keep = batch.target != loss.ignore_index
        logps = logits.log_softmax(-1).gather(-1, batch.target.where(keep, 0)[..., None])[..., 0]
        return logits, (logps * keep).sum(1), keep.sum(1)

    logits, sums, lengths = logps_of(batch.weight, batch.hidden, batch.bias)
    ref_sums = torch.zeros_like(sums)
    if use_ref_model:
        ref_sums = logps_of(batch.ref_weight, batch.ref_input, batch.ref_bias)[1].detach()
    scale = lengths if loss.average_log_prob else 1
    policy, reference = sums / scale, ref_sums / scale
    value = LOSSES[loss.loss_type](PairScores(*policy.chunk(2), *reference.chunk(2), *lengths.chunk(2)), loss).mean()
    nll = -sums.chunk(2)[0].sum() / lengths.chunk(2)[0].sum() if loss.compute_nll_loss else torch.zeros(())
    rewards = loss.beta * (policy - reference)
    means = [half.mean() for half in logits.chunk(2)]
    return value + loss.alpha * nll, (*policy.chunk(2), *means, nll, *rewards.chunk(2))


@pytest.mark.parametrize(
    *every_pair(
        loss_type=list(LINEAR_DPO_LOSSES),
        average_log_prob=[False, True],
        compute_nll_loss=[False, True],
        has_bias=[False, True],
    )
)
def test_everything_returned_and_every_gradient_is_that_of_the_full_logits(
    loss_type, average_log_prob, compute_nll_loss, has_bias
):
    batch = make_batch(has_bias=has_bias)
    average_log_prob = average_log_prob and loss_type != "ipo"  # which takes means by itself
    settings = {"average_log_prob": average_log_prob, "compute_nll_loss": compute_nll_loss, "alpha": 0.7, "beta": 0.3}
    loss = LinearDPOLoss(loss_type=loss_type, label_smoothing=SMOOTHING.get(loss_type, 0.0), **settings)
    expected = run(full_logits, batch, loss, batch)
    ours = run(loss, batch, *batch.policy(), **batch.reference())
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0])
@pytest.mark.parametrize("use_ref_model", [True, False])
def test_ignore_index_and_a_missing_reference_mean_what_they_say(ignore_index, use_ref_model):
    batch = make_batch(num_pairs=1, ignore_index=ignore_index)
    loss = LinearDPOLoss(ignore_index=ignore_index, use_ref_model=use_ref_model)
    expected = run(full_logits, batch, loss, batch, use_ref_model)
    ours = run(loss, batch, *batch.policy(), **(batch.reference() if use_ref_model else {}))
    torch.testing.assert_close(ours, [x.double() for x in expected])


def test_smoothed_labels_are_those_of_the_original_release():
    batch = make_batch()
    value, (chosen, rejected, _, _, _, chosen_rewards, rejected_rewards) = LinearDPOLoss(label_smoothing=0.2)(
        *batch.policy(), ref_chosen_logps=torch.full((3,), -20.0), ref_rejected_logps=torch.full((3,), -21.0)
    )
    reference = torch.full((3,), -20.0, dtype=torch.float64), torch.full((3,), -21.0, dtype=torch.float64)
    losses, *rewards = preference_loss(chosen, rejected, *reference, beta=0.1, label_smoothing=0.2)
    torch.testing.assert_close([value.detach(), chosen_rewards, rejected_rewards], [losses.mean(), *rewards])


@pytest.mark.parametrize("average_log_prob", [False, True])
def test_a_cached_reference_gives_what_the_reference_gives_that_it_was_cached_from(average_log_prob):
    batch = make_batch(has_bias=True)
    loss = LinearDPOLoss(average_log_prob=average_log_prob)
    with torch.no_grad():
        _, (ref_chosen, ref_rejected, *_) = LinearDPOLoss(average_log_prob=average_log_prob, use_ref_model=False)(
            batch.ref_weight, batch.ref_input, batch.target, batch.ref_bias
        )
    expected = run(loss, batch, *batch.policy(), **batch.reference())
    ours = run(loss, batch, *batch.policy(), ref_chosen_logps=ref_chosen, ref_rejected_logps=ref_rejected)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_at_step_0_the_loss_is_ln_2():
    batch = make_batch(dtype=torch.float32)
    same = {"ref_input": batch.hidden, "ref_weight": batch.weight}
    value, logged = LinearDPOLoss()(*batch.policy(), **same)
    assert value.item() == pytest.approx(math.log(2), abs=1e-6)
    for rewards in logged[-2:]:
        assert rewards.tolist() == pytest.approx([0.0] * len(rewards), abs=1e-6)


def test_ignored_positions_never_reach_the_head(monkeypatch):
    """Not even as nan: loss and gradients are as before; only the mean logits, which are over all positions, change."""
    num_rows = []
    for name in ("sequence_logps", "sequence_loss"):
        original = getattr(base, name)

        def counting(hidden_states, *args, original=original, **kwargs):
            num_rows.append(hidden_states.shape[0])
            return original(hidden_states, *args, **kwargs)

        monkeypatch.setattr(base, name, counting)
    batch = make_batch()
    expected = run(LinearDPOLoss(), batch, *batch.policy(), **batch.reference())
    ignored = batch.target == -100
    with torch.no_grad():
        batch.hidden[ignored] = torch.nan
    ours = run(LinearDPOLoss(), batch, *batch.policy(), **batch.reference())
    assert num_rows == [int((~ignored).sum())] * 4  # reference and policy, twice
    for i in (0, 1, 2, 5, 6, 7, 8, 9):
        assert torch.equal(ours[i], expected[i]), i
    assert ours[3].isnan()
    assert not ours[9][ignored].any()


def test_torch_compile_takes_it_as_one_graph():
    """There every position is a row of the head, so that no shape depends on the targets."""
    batch = make_batch()
    loss = LinearDPOLoss(compute_nll_loss=True)
    expected = run(loss, batch, *batch.policy(), **batch.reference())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, batch, *batch.policy(), **batch.reference()), expected)


def test_the_kernels_give_what_tiled_gives():
    batch = make_batch(dtype=torch.float32, has_bias=True)
    if torch.cuda.is_available():
        moved = {name: x if x is None else x.detach().cuda() for name, x in vars(batch).items()}
        batch = Batch(**moved).to(torch.float32)
    tiled, triton = (
        run(LinearDPOLoss(impl=impl), batch, *batch.policy(), **batch.reference()) for impl in ("tiled", "triton")
    )
    torch.testing.assert_close(triton, tiled, rtol=1e-4, atol=1e-5)


def test_hidden_states_may_be_a_shifted_view():
    batch = make_batch()
    longer = torch.cat([batch.hidden, batch.hidden[:, :1]], 1).detach().requires_grad_()
    for target in (batch.target, batch.target.clamp(min=0)):  # some rows, and all
        value, _ = LinearDPOLoss()(batch.weight, longer[:, :-1], target, **batch.reference())
        expected, _ = LinearDPOLoss()(batch.weight, batch.hidden, target, **batch.reference())
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        (grad,) = torch.autograd.grad(value, longer)
        assert grad[:, :-1].any()
        assert not grad[:, -1].any()


def test_a_sequence_without_targets_counts_zero_and_nothing_is_nan():
    batch = make_batch()
    batch.target[0] = -100
    for settings in ({}, {"average_log_prob": True, "compute_nll_loss": True}, {"loss_type": "ipo"}):
        value, (chosen, *rest) = LinearDPOLoss(**settings)(*batch.policy(), **batch.reference())
        assert chosen[0] == 0
        assert all(x.isfinite().all() for x in (value, chosen, *rest))


def test_only_the_loss_carries_a_gradient_and_only_to_what_needs_one():
    batch = make_batch(has_bias=True)
    batch.weight.requires_grad_(False)
    batch.ref_input.requires_grad_()
    value, logged = LinearDPOLoss(compute_nll_loss=True)(*batch.policy(), **batch.reference())
    assert not any(x.requires_grad for x in logged)
    value.backward()
    assert batch.weight.grad is None
    assert batch.ref_input.grad is None
    assert batch.hidden.grad.any()
    assert batch.bias.grad.any()
    with torch.no_grad():
        without, _ = LinearDPOLoss(compute_nll_loss=True)(*batch.policy(), **batch.reference())
    torch.testing.assert_close(without, value.detach(), rtol=1e-12, atol=0)


BATCH = make_batch()
LOGPS = torch.zeros(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": BATCH.target[:5], "hidden": BATCH.hidden[:5]}, r"target must have shape \(2B, L\).* got \(5, 7\)"),
        ({"target": BATCH.target[:0], "hidden": BATCH.hidden[:0]}, r"target must have shape \(2B, L\).* got \(0, 7\)"),
        ({"target": BATCH.target.flatten()}, r"target must have shape \(2B, L\).* got \(42,\)"),
        ({"target": BATCH.target.double()}, "target must hold class indices as integers.*float64"),
        ({"target": BATCH.target.clamp(min=0) + V}, rf"must lie in \[0, {V}\)"),
        ({"hidden": BATCH.hidden[:, :6]}, r"hidden must have shape \(6, 7, H\) to match target, got \(6, 6, 24\)"),
        ({"lm_head_weight": BATCH.weight[:, :9]}, r"lm_head_weight must have shape \(V, 24\) .* got \(131, 9\)"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \(131,\)"),
        ({"ref_input": None, "ref_weight": None}, "ref_input and ref_weight, or ref_chosen_logps .* got neither"),
        ({"ref_weight": None}, "ref_weight must be given with ref_input, got None"),
        ({"ref_input": None}, "ref_input must be given with ref_weight, got None"),
        (
            {"ref_input": BATCH.ref_input[:4]},
            r"ref_input must have shape \(6, 7, H\) to match target, got \(4, 7, 24\)",
        ),
        ({"ref_chosen_logps": LOGPS}, "ref_chosen_logps must be None .*ref_input"),
        (
            {"ref_input": None, "ref_weight": None, "ref_rejected_logps": LOGPS},
            "ref_chosen_logps and ref_rejected_logps must be given together",
        ),
        (
            {"ref_input": None, "ref_weight": None, "ref_chosen_logps": LOGPS, "ref_rejected_logps": LOGPS[:2]},
            r"ref_rejected_logps must have one value per pair, shape \(3,\) on cpu, got \(2,\) on cpu",
        ),
    ],
)
def test_a_mistake_is_named(changes, message):
    call = {"lm_head_weight": BATCH.weight, "hidden": BATCH.hidden, "target": BATCH.target, **BATCH.reference()}
    with pytest.raises(ValueError, match=message):
        LinearDPOLoss()(**{**call, **changes})


def test_a_reference_that_would_not_be_used_is_refused():
    with pytest.raises(ValueError, match=r"ref_input must be None .*use_ref_model is False"):
        LinearDPOLoss(use_ref_model=False)(*BATCH.policy(), **BATCH.reference())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmoyd"}, "loss_type must be one of .* got 'sigmoyd'"),
        ({"loss_type": "aot"}, "loss_type must be one of .*got 'aot': DPOTrainer"),
        ({"loss_type": "ipo", "average_log_prob": True}, "average_log_prob must be False for loss_type 'ipo'"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing must be 0 for loss_type 'hinge'"),
        ({"beta": -0.1}, "beta must be > 0 and finite, got -0.1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_first_batch(settings, message):
    with pytest.raises(ValueError, match=message):
        LinearDPOLoss(**settings)


def liger(**settings):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    return chunked_loss.LigerFusedLinearDPOLoss(compiled=False, **settings)


@pytest.mark.parametrize(
    *every_pair(
        loss_type=sorted(set(LINEAR_DPO_LOSSES) - {"ipo"}),
        settings=[
            {},
            {"compute_nll_loss": True, "alpha": 0.7},
            {"average_log_prob": True},
            {"chunk_size": 2, "beta": 0.5},
        ],
        has_bias=[False, True],
    ),
    ids=lambda value: "-".join(value) or "default" if isinstance(value, dict) else str(value),
)
def test_results_are_ligers_in_fp32(loss_type, settings, has_bias):
    batch = make_batch(dtype=torch.float32, has_bias=has_bias)
    settings = {"loss_type": loss_type, "label_smoothing": SMOOTHING.get(loss_type, 0.0), **settings}
    arguments = (*batch.policy(), *batch.reference().values())
    theirs, ours = (run(loss, batch, *arguments) for loss in (liger(**settings), LinearDPOLoss(**settings)))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6, i


def test_results_are_ligers_without_a_reference():
    batch = make_batch(dtype=torch.float32)
    settings = {"use_ref_model": False, "compute_nll_loss": True}
    theirs, ours = (run(loss, batch, *batch.policy()) for loss in (liger(**settings), LinearDPOLoss(**settings)))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_errors_in_bf16_are_at_most_twice_ligers():
    """Root mean square over 20 batches: one batch's loss or mean logit can be right by luck."""
    settings = {"compute_nll_loss": True}
    squares = torch.zeros(2, 10, dtype=torch.float64)
    for seed in range(20):
        batch = make_batch(dtype=torch.bfloat16, seed=seed)
        exact = batch.to(torch.float64)
        expected = run(full_logits, exact, LinearDPOLoss(**settings), exact)
        for row, loss in zip(squares, (LinearDPOLoss(**settings), liger(**settings)), strict=True):
            found = run(loss, batch, *batch.policy(), **batch.reference())
            row += torch.stack([(a.double() - b).square().sum() for a, b in zip(found, expected, strict=True)]).detach()
    ours, theirs = squares.sqrt()
    assert (ours <= 2 * theirs + 1e-7).all(), (ours / theirs).tolist()


def test_the_constructor_and_the_call_take_ligers_arguments_in_its_order():
    theirs, ours = type(liger()), LinearDPOLoss
    for name, parameter in inspect.signature(theirs.__init__).parameters.items():
        assert inspect.signature(ours.__init__).parameters[name].default == parameter.default, name
    positional = [
        [p.name for p in inspect.signature(f).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        for f in (theirs.__init__, ours.__init__, theirs.forward, ours.forward)
    ]
    assert positional[0] == positional[1]
    assert positional[2][3:] == positional[3][3:]  # self, and what Liger calls lin_weight and _input, are ours by place
    assert len(positional[2]) == len(positional[3])
