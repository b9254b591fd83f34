"""Every loss through DPOTrainer: its value, gradient and rewards against log-probs of separate, unpadded forwards with
full logits, packed, padded, split, with each reference, and with LoRA.
"""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from closeness import distance, relative_error
from datasets import Dataset
from tiny import make_llama, make_tokenizer

from fastdpo import LOSSES, DPOConfig, DPOTrainer, PairScores
from fastdpo.losses import looks_at_whole_batch, preference_losses
from fastdpo.training.inputs.collator import microbatches_of
from fastdpo.training.precompute import precompute_ref_logps

BETA = 0.5
SETTINGS = {
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "beta": BETA,
}


def row(prompt, chosen, rejected):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


ROWS = [
    row([1, 5, 6], [7], [8]),
    row([1], [9, 10, 11], [12, 13]),
    row([1, 8], [9, 10, 11, 12, 13, 14], [9, 10, 11, 15]),  # a common start, and a shared length beyond it
    row([1, 9, 9], [5, 6, 7, 8, 9], [12, 13, 14, 15, 16, 17]),
    row([1, 5, 6], [7], [9, 10]),  # the first prompt again
    row([1, 20, 21, 22], [23, 24], [25, 26, 27]),
]

ALONE = {
    name: {"loss_type": name, "label_smoothing": 0.1 if LOSSES[name].smoothed else 0.0}
    for name in LOSSES
    if name != "plackett_luce"  # below
}
CHANGED = {
    "list": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward_kl": {"loss_type": ["ipo", "sft"], "f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"loss_type": "hinge", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "ld": {"ld_alpha": 0.3},
    "ld-norm-sft": {"ld_alpha": 0.3, "loss_type": ["sigmoid_norm", "sft"]},
    "wpo": {"use_weighting": True},
    "wpo-sft": {"use_weighting": True, "loss_type": ["sigmoid", "sft"]},
    "wpo-ld-simple": {"use_weighting": True, "ld_alpha": 0.5, "loss_type": "apo_zero"},
    "wpo-simpo": {"use_weighting": True, "loss_type": "simpo"},
    "no-reference": {"reference_free": True, "loss_type": ["sigmoid", "sft"]},
}
CASES = {**ALONE, **CHANGED}


def make_trainer(tmp_path, rows=ROWS, model=None, **settings):
    keywords = {name: settings.pop(name) for name in ("ref_model", "peft_config", "eval_dataset") if name in settings}
    args = DPOConfig(str(tmp_path), **{**SETTINGS, "ref_cache_dir": str(tmp_path / "cache"), **settings})
    model = make_llama() if model is None else model
    return DPOTrainer(model, args=args, train_dataset=rows, processing_class=make_tokenizer(), **keywords)


def reference_of(settings):
    """A model that is not the policy, where there is a reference."""
    is_free = settings.get("reference_free") or settings.get("loss_type") in ("simpo", "orpo", "cpo")
    return {} if is_free else {"ref_model": make_llama(seed=1)}


def gradients(trainer):
    """Loss and flat gradient of one step over all rows, and in how many micro-batches it ran."""
    trainer.model.zero_grad()
    trainer.model.train()
    if trainer.optimizer is None:
        trainer.create_optimizer()
    inputs = trainer.collator(list(trainer.train_dataset))
    loss = trainer.training_step(trainer.model, inputs)
    return loss, flat_gradient(trainer.model), len(microbatches_of(inputs))


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


# The same loss from full logits, sequence by sequence


def per_token(model, prompt, response):
    """(n,) log-probs of the response's tokens, and of what is sampled there: log sum_v p_v^2."""
    ids = torch.tensor([prompt + response])
    logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, ids[0, len(prompt) :, None])[:, 0], (2 * logps).logsumexp(1)


def tokens_of(model, reference, rows):
    """Of every response: its tokens' log-probs, those of what is sampled there, and the reference's, by forwards."""
    found = []
    for one in rows:
        for side in (one["chosen_ids"], one["rejected_ids"]):
            logps, squares = per_token(model, one["prompt_ids"], side)
            with torch.no_grad():
                known = (
                    torch.zeros_like(logps) if reference is None else per_token(reference, one["prompt_ids"], side)[0]
                )
            found.append((logps, squares, known))
    return found


def plain_loss(tokens, rows, config):
    """Mean loss of the pairs, and the mean rewards of both sides."""
    policy, ref, weights, lengths, chosen_sums = [], [], [], [], []
    values = iter(tokens)
    for one in rows:
        sides = [one["chosen_ids"], one["rejected_ids"]]
        num_shared = min(map(len, sides))
        for side in sides:
            logps, squares, known = next(values)
            factor = torch.ones_like(logps)
            if config.ld_alpha is not None:
                factor[num_shared:] = config.ld_alpha
            policy.append((factor * logps).sum())
            weights.append((logps - squares).mean().exp().detach())
            lengths.append(len(side))
            if side is sides[0]:
                chosen_sums.append(logps.sum())
            ref.append((factor * known).sum())
    policy, ref, weights, lengths = (
        torch.stack(list(map(torch.as_tensor, x))) for x in (policy, ref, weights, lengths)
    )
    scores = PairScores(
        policy[0::2],
        policy[1::2],
        ref[0::2],
        ref[1::2],
        lengths[0::2],
        lengths[1::2],
        chosen_sums=torch.stack(chosen_sums),
        pair_weights=weights[0::2] * weights[1::2] if config.use_weighting else None,
    )
    per = lengths if config.loss_type[0] in ("simpo", "orpo") else 1
    rewards = BETA * (policy - ref).detach() / per
    return preference_losses(scores, config).mean(), rewards[0::2].mean().item(), rewards[1::2].mean().item()


@dataclass
class Expected:
    """In fp64, from weights in fp32, and how far numbers in fp32 may be off."""

    config: DPOConfig
    loss: float
    gradient: torch.Tensor
    rewards: tuple[float, float]
    loss_error: float
    gradient_error: float
    reward_error: float


def expected(settings, tmp_path):
    """A number in fp32 may be off by twice what plain PyTorch is off by, at least by what log-probs that are do to it.

    A loss amplifies the rounding of its log-probs by its derivatives: discopop's, whose step is 0.05 wide, by far more
    than others. One plain run may be lucky, so the error of plain log-probs, in random directions, goes through the
    loss in fp64 as well, and what comes out of the worst of them counts.
    """
    config = DPOConfig(str(tmp_path), **{**SETTINGS, **settings})
    model, reference = make_llama(), reference_of(settings).get("ref_model")
    tokens = tokens_of(model, reference, ROWS)
    plain = plain_loss(tokens, ROWS, config)
    plain[0].backward()
    plain_gradient = flat_gradient(model).double()

    model, reference = model.double(), reference if reference is None else reference.double()
    exact_tokens = tokens_of(model, reference, ROWS)
    rounding = max(
        float((a - e).detach().abs().max()) for a, e in zip(sum(tokens, ()), sum(exact_tokens, ()), strict=True)
    )

    def from_exact(tokens):
        model.zero_grad()
        loss, *rewards = plain_loss(tokens, ROWS, config)
        loss.backward(retain_graph=True)
        return loss.item(), flat_gradient(model), rewards

    loss, gradient, rewards = from_exact(exact_tokens)
    losses, gradients = [plain[0].item()], [plain_gradient]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        rounded = [tuple(x + rounding * torch.randn(x.shape, generator=generator) for x in one) for one in exact_tokens]
        value, changed, _ = from_exact(rounded)
        losses.append(value)
        gradients.append(changed)
    return Expected(
        config,
        loss,
        gradient,
        rewards,
        loss_error=2 * max(abs(x - loss) for x in losses) + 2e-6 * abs(loss),
        gradient_error=2 * max(distance(x, gradient) for x in gradients) + 2e-6 * float(gradient.norm()),
        reward_error=2 * BETA * max(len(logps) for logps, _, _ in tokens) * rounding,
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_rewards_are_those_of_separate_forwards(tmp_path, monkeypatch, case):
    exact = expected(CASES[case], tmp_path)
    config = exact.config
    ways = {"packed": (True, None), "padded": (False, None)}
    if not looks_at_whole_batch(config):
        ways |= {"split": (True, 16), "padded and split": (False, 40)}
    ways["in chunks of the head's rows"] = (True, None)  # with the gradient made in forward, pair by pair, but for aot
    trainer = make_trainer(tmp_path, **CASES[case], **reference_of(CASES[case]))
    for way, (trainer.collator.is_packed, trainer.collator.max_tokens) in ways.items():
        if "chunks" in way:
            monkeypatch.setattr("fastdpo.ops.sequence_loss.max_chunk_rows", lambda *args: 9)
        value, gradient, num_parts = gradients(trainer)
        assert (num_parts > 2) == ("split" in way), way
        assert abs(value.item() - exact.loss) <= exact.loss_error, way
        assert distance(gradient, exact.gradient) <= exact.gradient_error, way
        logged = trainer.train_means.pop()
        for name, reward in zip(("rewards/chosen", "rewards/rejected"), exact.rewards, strict=True):
            assert abs(logged[name] - reward) <= exact.reward_error + 1e-6 * abs(reward), (way, name)
    # what is allowed stays far below what a wrong loss would be off by
    assert exact.gradient_error <= 1e-3 * float(exact.gradient.norm())
    assert exact.loss_error <= 1e-3 * abs(exact.loss)


@pytest.mark.parametrize("case", ["sigmoid", "aot", "sft", "ld", "ld-norm-sft", "wpo", "forward_kl"])
def test_a_cached_reference_gives_the_same_loss(tmp_path, case):
    live = make_trainer(tmp_path, **CASES[case], **reference_of(CASES[case]))
    cached = make_trainer(tmp_path, **CASES[case], **reference_of(CASES[case]), reference="cached")
    loss, exact, _ = gradients(live)
    value, gradient, _ = gradients(cached)
    assert cached.reference.mode == "cached"
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_error(gradient, exact) <= 1e-5


def test_precomputed_log_probs_are_found_by_a_run_with_ld_alpha(tmp_path):
    settings = {"ld_alpha": 0.3, "reference": "cached"}
    make_llama(seed=1).save_pretrained(tmp_path / "reference")
    make_tokenizer().save_pretrained(tmp_path / "reference")
    args = DPOConfig(str(tmp_path), **{**SETTINGS, "ref_cache_dir": str(tmp_path / "cache"), **settings})
    done = precompute_ref_logps(str(tmp_path / "reference"), args, {"train": ROWS})
    assert done.counts["train"].num_computed == len(ROWS)
    trainer = make_trainer(tmp_path, **settings, ref_model=make_llama(seed=1))
    assert f"{len(ROWS)} rows: {len(ROWS)} found" in trainer.reference_reason


@pytest.mark.parametrize("case", [*ALONE, "list", "ld", "wpo", "js"])
def test_every_loss_is_learned_by_a_lora_adapter(tmp_path, case):
    from peft import LoraConfig

    # discopop rises with the margin around 0 unless its step is wide: with 0.05 it would learn to prefer the rejected
    settings = {**CASES[case], **({"discopop_tau": 1.0} if case == "discopop" else {})}
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, **settings, peft_config=adapter, max_steps=6, learning_rate=1e-2)
    trainer.train()
    assert trainer.reference.mode == ("none" if case in ("simpo", "orpo", "cpo") else "adapter")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]
    if case not in ("sft", "nca_pair", "apo_down"):
        assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"]


def test_sft_is_a_mean_over_the_tokens_of_the_step_however_it_accumulates(tmp_path):
    """6 pairs as 6, as 2 x 3 and as 4 + 2: chosen responses of uneven length, the same tokens."""
    logs = []
    for batch_size, accumulation in ((6, 1), (2, 3), (4, 2)):
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tmp_path, loss_type=["sigmoid", "sft"], max_steps=3, **settings)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[0]) == 3
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert logs[2] == pytest.approx(logs[0], rel=1e-5)


def test_ld_alpha_counts_no_token_twice(tmp_path):
    """num_tokens is TRL's: prompt and response of both sides, once."""
    counts = []
    for settings in ({}, {"ld_alpha": 0.5}):
        trainer = make_trainer(tmp_path, max_steps=1, **settings)
        trainer.train()
        counts.append(trainer.state.log_history[0]["num_tokens"])
    assert (
        counts[0] == counts[1] == sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"] + r["rejected_ids"]) for r in ROWS)
    )


def test_a_stream_gives_the_tokens_of_each_step_to_sft(tmp_path):
    stream, settings = Dataset.from_list(ROWS).to_iterable_dataset(), CASES["wpo-sft"]
    logs = []
    for rows in (ROWS, stream):
        trainer = make_trainer(tmp_path, rows, **settings, max_steps=2)
        trainer.train()
        logs.append(
            [entry[key] for entry in trainer.state.log_history for key in ("loss", "num_tokens") if "loss" in entry]
        )
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def test_rows_that_were_not_made_for_ld_alpha_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, ld_alpha=0.5)
    with pytest.raises(ValueError, match="ld_alpha must be None for these rows"):
        trainer.training_step(trainer.model, trainer.collator(ROWS))


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo"])
def test_losses_without_a_reference_refuse_one(tmp_path, name):
    trainer = make_trainer(tmp_path, loss_type=name)
    assert trainer.reference.mode == "none"
    assert name in trainer.reference_reason
    with pytest.raises(ValueError, match=f"ref_model must be None .*{name}"):
        make_trainer(tmp_path, loss_type=name, ref_model=make_llama(seed=1))


@pytest.mark.parametrize("batch_size", [6, 4, 1])
def test_evaluation_has_the_loss_of_training_whatever_the_batch_size(tmp_path, batch_size):
    for case in ("list", "ld-norm-sft", "wpo", "orpo"):
        trainer = make_trainer(tmp_path, **CASES[case], eval_dataset=ROWS, per_device_eval_batch_size=batch_size)
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(gradients(trainer)[0].item(), rel=1e-5), case


# Rankings


RANKED = [
    {"prompt_ids": [1, 2], "responses": [[5, 6], [7], [8, 9, 10]], "preferences": [[0, 1], [0, 2], [1, 2]]},
    {"prompt_ids": [1, 3], "responses": [[15], [11, 12], [13], [14, 4]], "preferences": [[1, 0], [0, 3], [3, 2]]},
    {"prompt_ids": [1, 2], "responses": [[16], [17, 18]], "preferences": [[0, 1]]},  # the first prompt again
]
ORDERS = [[0, 1, 2], [1, 0, 3, 2], [0, 1]]


@pytest.mark.parametrize(
    "changed", [{}, {"packing": "padded"}, {"max_tokens_per_microbatch": 12}, {"reference": "cached"}]
)
def test_plackett_luce_is_the_likelihood_of_drawing_each_ranking(tmp_path, monkeypatch, changed):
    model, reference = make_llama(), make_llama(seed=1)
    total = 0.0
    for one, order in zip(RANKED, ORDERS, strict=True):
        prompt, responses = one["prompt_ids"], one["responses"]
        with torch.no_grad():
            known = [per_token(reference, prompt, response)[0].sum() for response in responses]
        ratios = [per_token(model, prompt, r)[0].sum() - k for r, k in zip(responses, known, strict=True)]
        odds = (BETA * torch.stack(ratios)).exp()
        for place, drawn in enumerate(order):
            total = total - (odds[drawn] / odds[order[place:]].sum()).log()
    (total / len(RANKED)).backward()
    settings = {"loss_type": "plackett_luce", "ref_model": copy.deepcopy(reference), **changed}
    trainer = make_trainer(tmp_path, RANKED, copy.deepcopy(make_llama()), **settings)
    for _ in ("at once", "prompt by prompt"):
        loss, gradient, _ = gradients(trainer)
        assert loss.item() == pytest.approx((total / len(RANKED)).item(), rel=1e-5)
        assert relative_error(gradient, flat_gradient(model)) <= 1e-5
        monkeypatch.setattr("fastdpo.ops.sequence_loss.max_chunk_rows", lambda *args: 9)


def test_plackett_luce_of_pairs_trains_as_sigmoid_does(tmp_path):
    logs = []
    for name in ("plackett_luce", "sigmoid"):
        trainer = make_trainer(tmp_path, loss_type=name, max_steps=3)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    assert logs[0][0] == pytest.approx(math.log(2), rel=1e-5)
