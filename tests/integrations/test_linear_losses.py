"""CPO, SimPO, ORPO and KTO straight from hidden states: against the full logits in fp64, and against the losses of
Liger whose places they take. tests/integrations/test_linear_dpo_loss.py has what all losses of pairs share.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from covering import every_pair
from linear_batches import Batch, V, make_batch, run
from peers import peer

import fastdpo
from fastdpo import LOSSES, LinearCPOLoss, LinearKTOLoss, LinearORPOLoss, LinearSimPOLoss, PairScores
from fastdpo.integrations.linear_losses import base
from fastdpo.integrations.linear_losses.rows import Rows

PAIR_LOSSES = {"CPO": LinearCPOLoss, "SimPO": LinearSimPOLoss, "ORPO": LinearORPOLoss}
WANTED = torch.tensor([True, False, False, True, True, False])


def liger(name, **settings):
    return getattr(peer("liger_kernel.chunked_loss"), f"LigerFusedLinear{name}Loss")(compiled=False, **settings)


def log_probs(loss, weight, hidden, target, bias):
    """Logits, and log-probs and lengths per sequence."""
    logits = F.linear(hidden, weight, bias)
    keep = target != loss.ignore_index
    logps = logits.log_softmax(-1).gather(-1, target.where(keep, 0)[..., None])[..., 0]
    return logits, (logps * keep).sum(1), keep.sum(1)


def pair_loss(loss, chosen, rejected):
    if isinstance(loss, LinearORPOLoss):
        odds = [logps.exp() / (1 - logps.exp()) for logps in (chosen, rejected)]
        return -loss.beta * F.logsigmoid((odds[0] / odds[1]).log())
    logits = loss.beta * (chosen - rejected) - getattr(loss, "gamma", 0.0)
    return -(1 - loss.label_smoothing) * F.logsigmoid(logits) - loss.label_smoothing * F.logsigmoid(-logits)


def pairs_from_full_logits(loss, batch, nll_target=None):
    """What the modules promise, written out with log-softmax over the whole vocabulary."""
    logits, sums, lengths = log_probs(loss, batch.weight, batch.hidden, batch.target, batch.bias)
    chosen, rejected = (sums / lengths if loss.average_log_prob else sums).chunk(2)
    nll = torch.zeros(())
    if loss.compute_nll_loss:
        target = batch.target if nll_target is None else nll_target
        _, sums, lengths = log_probs(loss, batch.weight, batch.hidden, target, batch.bias)
        nll = -sums.chunk(2)[0].sum() / lengths.chunk(2)[0].sum()
    means = [half.mean() for half in logits.chunk(2)]
    logged = [chosen, rejected, *means, nll, loss.beta * chosen, loss.beta * rejected]
    if isinstance(loss, LinearORPOLoss):
        ratios = [logps - torch.log1p(-logps.exp()) for logps in (chosen, rejected)]
        logged += [F.logsigmoid(ratios[0] - ratios[1]).mean(), (ratios[0] - ratios[1]).mean()]
    return pair_loss(loss, chosen, rejected).mean() + loss.alpha * nll, logged


def kto_from_full_logits(loss, batch, kl=None):
    logits, sums, lengths = log_probs(loss, batch.weight, batch.hidden, batch.target, batch.bias)
    ref_sums = torch.zeros_like(sums)
    if loss.use_ref_model:
        ref_sums = log_probs(loss, batch.ref_weight, batch.ref_input, batch.target, batch.ref_bias)[1].detach()
    scale = lengths if loss.average_log_prob else 1
    logps, ratios = sums / scale, (sums - ref_sums) / scale
    values = torch.sigmoid(loss.beta * (ratios - (0 if kl is None else kl)) * (2.0 * WANTED - 1))
    logged = [x[half].sum() for x in (logps, logits, loss.beta * ratios) for half in (WANTED, ~WANTED)]
    return (1 - values).mean(), logged


def assert_exact(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-9, atol=1e-11)


def assert_as_ligers(ours, theirs):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6, i


# every value of a setting, where the module has it
PAIR_CASES = every_pair(
    name=list(PAIR_LOSSES),
    compute_nll_loss=[True, False],
    has_bias=[False, True],
    ignore_index=[-100, 0],
    more=[{}, {"alpha": 0.7}, {"label_smoothing": 0.1}, {"average_log_prob": True}, {"gamma": 1.3, "beta": 2.0}],
)


def settings_of(module, compute_nll_loss, ignore_index, more):
    taken = inspect.signature(module).parameters
    more = {"beta": 0.3, **{key: value for key, value in more.items() if key in taken}}
    return {"compute_nll_loss": compute_nll_loss, "ignore_index": ignore_index, **more}


@pytest.mark.parametrize(*PAIR_CASES)
def test_pairs_give_what_the_full_logits_give(name, compute_nll_loss, has_bias, ignore_index, more):
    batch = make_batch(has_bias=has_bias, ignore_index=ignore_index)
    loss = PAIR_LOSSES[name](**settings_of(PAIR_LOSSES[name], compute_nll_loss, ignore_index, more))
    assert_exact(run(loss, batch, *batch.policy()), run(pairs_from_full_logits, batch, loss, batch))


@pytest.mark.parametrize(*PAIR_CASES)
def test_pairs_give_ligers_results_in_fp32(name, compute_nll_loss, has_bias, ignore_index, more):
    batch = make_batch(dtype=torch.float32, has_bias=has_bias, ignore_index=ignore_index)
    settings = settings_of(PAIR_LOSSES[name], compute_nll_loss, ignore_index, more)
    theirs = run(liger(name, **settings, chunk_size=2), batch, *batch.policy())
    assert_as_ligers(run(PAIR_LOSSES[name](**settings), batch, *batch.policy()), theirs)


@pytest.mark.parametrize("name", ["cpo", "simpo", "orpo"])
def test_the_trainers_loss_of_the_same_name_is_the_same(name):
    """Its NLL is a mean over tokens too, and its margin gamma is given as a multiple of beta."""

    class Config:
        beta, label_smoothing, cpo_alpha, gamma_beta_ratio = 2.0, 0.1 if name != "orpo" else 0.0, 0.7, 0.25

    batch, zeros = make_batch(), torch.zeros(3)
    loss = {
        "cpo": LinearCPOLoss(beta=2.0, label_smoothing=0.1, alpha=0.7),
        "simpo": LinearSimPOLoss(beta=2.0, label_smoothing=0.1, gamma=0.5, compute_nll_loss=False),
        "orpo": LinearORPOLoss(beta=2.0),
    }[name]
    value, _ = loss(*batch.policy())
    _, sums, lengths = log_probs(loss, batch.weight, batch.hidden, batch.target, batch.bias)
    scores = PairScores(*sums.chunk(2), zeros, zeros, *lengths.chunk(2))
    torch.testing.assert_close(value, LOSSES[name](scores, Config).mean(), rtol=1e-9, atol=0)


def nll_target_of(batch, kind):
    """The prompts' tokens too, some other tokens, or fewer tokens than `target` has."""
    g = torch.Generator().manual_seed(7)
    other = torch.randint(V, batch.target.shape, generator=g)
    if kind == "prompts too":
        return batch.target.where(batch.target != -100, other)
    if kind == "other tokens":
        return other.where(torch.rand(other.shape, generator=g) < 0.5, batch.target)
    return batch.target.where(torch.rand(other.shape, generator=g) < 0.5, -100)


@pytest.mark.parametrize("kind", ["prompts too", "other tokens", "fewer tokens"])
def test_an_nll_target_of_its_own_shares_the_rows_that_it_can(kind, monkeypatch):
    num_rows, original = [], base.sequence_loss

    def counting(hidden_states, *args, **kwargs):
        num_rows.append(len(hidden_states))
        return original(hidden_states, *args, **kwargs)

    monkeypatch.setattr(base, "sequence_loss", counting)
    batch, loss = make_batch(has_bias=True), LinearORPOLoss(beta=0.3)
    nll_target = nll_target_of(batch, kind)
    ours = run(loss, batch, *batch.policy(), nll_target)
    assert_exact(ours, run(pairs_from_full_logits, batch, loss, batch, nll_target))
    chosen, own = batch.target[:3], nll_target[:3]
    assert num_rows == [int((batch.target != -100).sum() + ((own != -100) & (own != chosen)).sum())]
    single = batch.to(torch.float32)
    theirs = run(liger("ORPO", beta=0.3), single, *single.policy(), nll_target)
    assert_as_ligers(run(loss, single, *single.policy(), nll_target), theirs)


def test_rows_of_the_third_sequence_are_those_of_the_first_where_labels_agree():
    a, b, c, d, p, none = 1, 2, 3, 4, 5, -100
    labels = torch.tensor([[[none, a, b], [none, c, d], [p, a, b]], [[a, none, b], [none, none, none], [a, c, none]]])
    positions = torch.arange(18).view(2, 3, 3)
    rows = Rows.of(labels, positions)
    assert rows.labels.tolist() == [a, b, c, d, p, a, b, c]
    assert rows.positions.tolist() == [1, 2, 4, 5, 6, 9, 11, 16]
    assert rows.token_rows.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 5, 7]
    assert rows.cu_seqlens.tolist() == [0, 2, 4, 7, 9, 9, 11]
    assert rows.group_ends == [(5, 7, 3), (8, 11, 6)]


def test_orpo_is_finite_where_a_response_is_certain():
    batch = make_batch(num_pairs=1, dtype=torch.float32)
    with torch.no_grad():
        batch.hidden[0] = batch.weight[5] * 100
    batch.target[0] = 5
    found = run(LinearORPOLoss(), batch, *batch.policy())
    assert found[1] == 0  # log-prob of the chosen response
    assert all(x.isfinite().all() for x in found)


KTO_CASES = every_pair(
    use_ref_model=[True, False],
    average_log_prob=[False, True],
    has_bias=[False, True],
    ignore_index=[-100, 0],
    kl=[None, torch.tensor(0.4), torch.tensor([0.4])],
)


def kto_arguments(batch, use_ref_model):
    reference = batch.reference().values() if use_ref_model else (None, None, None)
    return batch.hidden, batch.weight, batch.target, batch.bias, WANTED, *reference


@pytest.mark.parametrize(*KTO_CASES)
def test_kto_gives_what_the_full_logits_give_and_ligers_results_in_fp32(
    use_ref_model, average_log_prob, has_bias, ignore_index, kl
):
    settings = {"use_ref_model": use_ref_model, "average_log_prob": average_log_prob, "ignore_index": ignore_index}
    loss = LinearKTOLoss(beta=0.3, **settings)
    batch = make_batch(has_bias=has_bias, ignore_index=ignore_index)
    expected = run(kto_from_full_logits, batch, loss, batch, kl)
    assert_exact(run(loss, batch, *kto_arguments(batch, use_ref_model), kl), expected)
    single = batch.to(torch.float32)
    arguments = (*kto_arguments(single, use_ref_model), kl)
    theirs = run(liger("KTO", beta=0.3, chunk_size=2, **settings), single, *arguments)
    assert_as_ligers(run(loss, single, *arguments), theirs)


def test_each_response_of_kto_has_a_kl_of_its_own_as_in_liger_one_response_at_a_time():
    batch, kl = make_batch(dtype=torch.float32), torch.linspace(-1.0, 3.0, 6)
    hidden, weight, target, _, wanted, *_ = kto_arguments(batch, False)
    value, _ = LinearKTOLoss()(hidden, weight, target, None, wanted, kl=kl)
    one_by_one = [
        liger("KTO")(hidden[i : i + 1], weight, target[i : i + 1], None, wanted[i : i + 1], kl=kl[i])[0]
        for i in range(6)
    ]
    torch.testing.assert_close(value, torch.stack(one_by_one).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average_log_prob", [False, True])
def test_kto_takes_a_reference_whose_log_probs_are_known(average_log_prob):
    batch = make_batch(has_bias=True)
    loss = LinearKTOLoss(use_ref_model=True, average_log_prob=average_log_prob)
    reference = (batch.ref_weight, batch.ref_input, batch.target, batch.ref_bias)
    with torch.no_grad():
        _, sums, lengths = log_probs(loss, *reference)
    ref_logps = sums / lengths if average_log_prob else sums
    arguments = kto_arguments(batch, False)[:5]
    ours = run(loss, batch, *arguments, ref_logps=ref_logps)
    assert_exact(ours, run(loss, batch, *kto_arguments(batch, True)))


def test_kto_of_one_kind_of_responses_sums_nothing_for_the_other():
    batch = make_batch()
    for wanted in (torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)):
        value, logged = LinearKTOLoss()(batch.hidden, batch.weight, batch.target, None, wanted)
        assert value.isfinite()
        there, absent = (logged[0::2], logged[1::2]) if wanted.all() else (logged[1::2], logged[0::2])
        assert all(x == 0 for x in absent)
        assert all(x != 0 for x in there)


MODULES = {**PAIR_LOSSES, "KTO": LinearKTOLoss}


def arguments_of(name, batch):
    return kto_arguments(batch, False)[:5] if name == "KTO" else batch.policy()


@pytest.mark.parametrize("name", list(MODULES))
def test_a_sequence_without_targets_counts_zero_and_nothing_is_nan(name):
    batch = make_batch()
    batch.target[0] = -100
    found = run(MODULES[name](), batch, *arguments_of(name, batch))
    assert all(x.isfinite().all() for x in found)
    if name != "KTO":
        assert found[1][0] == 0


@pytest.mark.parametrize("name", ["ORPO", "KTO"])
def test_torch_compile_takes_each_module_as_one_graph(name):
    batch, loss = make_batch(), MODULES[name]()
    arguments = arguments_of(name, batch)
    if name == "ORPO":
        arguments = (*arguments, nll_target_of(batch, "other tokens"))
    expected = run(loss, batch, *arguments)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, batch, *arguments), expected)


@pytest.mark.parametrize("name", list(MODULES))
def test_every_implementation_gives_the_same(name):
    batch = make_batch(dtype=torch.float32, has_bias=True)
    if torch.cuda.is_available():
        moved = {key: x if x is None else x.detach().cuda() for key, x in vars(batch).items()}
        batch = Batch(**moved).to(torch.float32)
    arguments = [x.to(batch.target.device) if torch.is_tensor(x) else x for x in arguments_of(name, batch)]
    if name == "ORPO":
        arguments.append(nll_target_of(batch.to(torch.float32), "prompts too"))
    tiled, *others = (run(MODULES[name](impl=impl), batch, *arguments) for impl in ("tiled", "triton", "reference"))
    for found in others:
        torch.testing.assert_close(found, tiled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(MODULES))
def test_only_the_loss_carries_a_gradient_and_only_to_what_needs_one(name):
    batch = make_batch(has_bias=True)
    batch.weight.requires_grad_(False)
    value, logged = MODULES[name]()(*arguments_of(name, batch))
    assert not any(x.requires_grad for x in logged)
    value.backward()
    assert batch.weight.grad is None
    assert batch.hidden.grad.any()
    assert batch.bias.grad.any()


@pytest.mark.parametrize("name", list(MODULES))
def test_errors_in_bf16_are_at_most_twice_ligers(name):
    """Root mean square over 20 batches: one batch's loss or mean logit can be right by luck."""
    squares = {"ours": 0.0, "theirs": 0.0}
    for seed in range(20):
        batch = make_batch(dtype=torch.bfloat16, seed=seed)
        exact = batch.to(torch.float64)
        expected = run(MODULES[name](impl="reference"), exact, *arguments_of(name, exact))
        for side, loss in (("ours", MODULES[name]()), ("theirs", liger(name))):
            found = run(loss, batch, *arguments_of(name, batch))
            errors = [(a.double() - b).square().sum() for a, b in zip(found, expected, strict=True)]
            squares[side] += torch.stack(errors).detach()
    ours, theirs = (x.sqrt() for x in squares.values())
    assert (ours <= 2 * theirs + 1e-7).all(), (ours / theirs).tolist()


@pytest.mark.parametrize("name", list(MODULES))
def test_constructors_and_calls_take_ligers_arguments_in_its_order(name):
    theirs, ours = type(liger(name)), MODULES[name]
    for argument, parameter in inspect.signature(theirs.__init__).parameters.items():
        assert inspect.signature(ours.__init__).parameters[argument].default == parameter.default, argument
    positional = [
        [p.name for p in inspect.signature(f).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        for f in (theirs.__init__, ours.__init__, theirs.forward, ours.forward)
    ]
    assert positional[0] == positional[1]
    assert positional[2][3:] == positional[3][3:]  # self, and what Liger calls lin_weight and _input, are ours by place
    assert sorted(positional[2].index(x) for x in ("lin_weight", "_input")) == [1, 2]
    assert positional[2].index("_input") == positional[3].index("hidden")


def test_each_place_of_liger_has_its_module():
    chunked_loss = peer("liger_kernel.chunked_loss")
    for name in ("DPO", "CPO", "SimPO", "ORPO", "KTO"):
        assert hasattr(chunked_loss, f"LigerFusedLinear{name}Loss")
        assert hasattr(fastdpo, f"Linear{name}Loss")


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (LinearCPOLoss, {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (LinearCPOLoss, {"alpha": -1.0}, "alpha must be a finite number >= 0, got -1.0"),
        (LinearSimPOLoss, {"gamma": float("nan")}, "gamma must be a finite number >= 0, got nan"),
        (LinearORPOLoss, {"beta": 0.0}, "beta must be > 0 and finite, got 0.0"),
        (LinearKTOLoss, {"beta": -0.1}, "beta must be > 0 and finite, got -0.1"),
        (LinearKTOLoss, {"impl": "fast"}, "impl must be one of"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_first_batch(module, settings, message):
    with pytest.raises(ValueError, match=message):
        module(**settings)


BATCH = make_batch()


def kto_call(settings=None, **changes):
    call = {"hidden": BATCH.hidden, "lm_head_weight": BATCH.weight, "target": BATCH.target}
    return LinearKTOLoss(**(settings or {})), {**call, "preference_labels": WANTED, **changes}


def orpo_call(settings=None, **changes):
    call = {"hidden": BATCH.hidden, "lm_head_weight": BATCH.weight, "target": BATCH.target}
    return LinearORPOLoss(**(settings or {})), {**call, **changes}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (kto_call(preference_labels=None), "preference_labels must say which responses are wanted, got None"),
        (kto_call(preference_labels=WANTED.int()), r"preference_labels must be booleans of shape \(6,\).*int32"),
        (kto_call(preference_labels=WANTED[:4]), r"preference_labels must be booleans of shape \(6,\).*\(4,\)"),
        (kto_call(kl=torch.zeros(4)), r"kl must be a scalar or have shape \(6,\), got \(4,\)"),
        (kto_call(kl=torch.zeros(6, 1)), r"kl must be a scalar or have shape \(6,\), got \(6, 1\)"),
        (kto_call(target=BATCH.target.flatten()), r"target must have shape \(B, L\) .* got \(42,\)"),
        (kto_call(hidden=BATCH.hidden[:, :6]), r"hidden must have shape \(6, 7, H\) to match target"),
        (kto_call(lm_head_weight=BATCH.weight[:, :9]), r"lm_head_weight must have shape \(V, 24\)"),
        (kto_call(ref_logps=torch.zeros(6)), "ref_logps must be None if use_ref_model is False"),
        (kto_call({"use_ref_model": True}), "ref_input and ref_weight, or ref_logps, must be given"),
        (
            kto_call({"use_ref_model": True}, ref_logps=torch.zeros(4)),
            r"ref_logps must have one value per response, shape \(6,\) on cpu, got \(4,\)",
        ),
        (orpo_call(nll_target=BATCH.target[:3]), r"nll_target must have shape \(6, 7\), got \(3, 7\)"),
        (
            orpo_call({"compute_nll_loss": False}, nll_target=BATCH.target),
            "nll_target must be None if compute_nll_loss is False",
        ),
        (orpo_call(nll_target=BATCH.target.double()), "target must hold class indices as integers.*float64"),
        (orpo_call(target=BATCH.target[:5], hidden=BATCH.hidden[:5]), r"target must have shape \(2B, L\)"),
    ],
)
def test_a_mistake_is_named(call, message):
    loss, arguments = call
    with pytest.raises(ValueError, match=message):
        loss(**arguments)
