"""The load-balancing loss of mixture-of-experts models: transformers' number, on packed rows too."""

import copy

import pytest
import torch
from closeness import distance
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import SILENT, logged, tiny_trainer, trl_trainer

from fastdpo import SFTConfig, SFTTrainer, TokenizedGroup, TokenizedPair, pack_pairs
from fastdpo.data.batches.packing import pad_pairs
from fastdpo.modeling import packed_logps
from fastdpo.modeling.router import load_balancing_loss
from fastdpo.types import PackedBatch

PAIRS = [TokenizedPair([5, 6, 7, 8], [9, 10], [9, 11, 12]), TokenizedPair([13, 14], [15], [16, 17, 18, 19])]


def make_moe(kind, seed=0, **overrides):
    import transformers

    config_class, model_class, experts = {
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, "num_local_experts"),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, "num_experts"),
    }[kind]
    settings = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        experts: 4,
        "router_aux_loss_coef": 0.1,
        **({"moe_intermediate_size": 32, "head_dim": 8} if kind == "qwen3_moe" else {}),
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**{**settings, **overrides}))
    with torch.no_grad():  # routers that send most tokens to few experts
        for name, parameter in model.named_parameters():
            if "gate.weight" in name:
                parameter.mul_(100)
    return model


def transformers_aux_loss(model, pairs):
    """Of the stock forward on right-padded rows, chosen and rejected apart."""
    rows = [[*p.prompt_ids, *r] for p in pairs for r in p.responses]
    ids, mask = torch.zeros(2, len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss


def grads_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_formula_by_hand():
    """2 tokens, 2 experts, 1 expert a token, probabilities (3/4, 1/4) and (1/4, 3/4); the first token counts twice.

    f = (2/3, 1/3), P = ((2 * 3/4 + 1/4) / 3, (2 * 1/4 + 3/4) / 3) = (7/12, 5/12): 2 * (14/36 + 5/36) = 19/18.
    """
    odds = torch.log(torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
    assert load_balancing_loss((odds,), torch.tensor([2, 1]), 1).item() == pytest.approx(19 / 18)
    assert load_balancing_loss((odds, odds), torch.tensor([1, 1]), 1).item() == pytest.approx(1.0)  # balanced


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("collate", [pack_pairs, lambda p: pack_pairs(p, prefix_sharing=False), pad_pairs])
def test_the_loss_and_its_gradients_are_transformers_own(kind, collate):
    """Shared prompts are computed once and count for both responses; padding counts for nothing."""
    stock, model, exact = make_moe(kind), make_moe(kind), make_moe(kind).double()
    exact.set_experts_implementation("eager")  # the default has no fp64
    losses = [transformers_aux_loss(exact, PAIRS), transformers_aux_loss(stock, PAIRS)]
    losses.append(packed_logps(model, collate(PAIRS), router_aux_loss=True).aux_loss)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-5, atol=0)
    assert abs(losses[0] - 2) > 0.01  # 2 would be balanced
    exact_grads, plain_grads, grads = map(grads_of, (exact, stock, model), losses)
    assert any("gate" in name for name in exact_grads)
    floor = 1e-6 * max(float(grad.norm()) for grad in exact_grads.values())
    for name, grad in exact_grads.items():
        assert distance(grads[name], grad) <= 2 * distance(plain_grads[name], grad) + floor, name


def test_a_response_of_two_pairs_counts_twice_and_one_of_none_not_at_all():
    group = TokenizedGroup([5, 6], [[7, 8], [9], [10], [11, 12]], preferences=((0, 1), (0, 2)))
    batch = pack_pairs([group])
    uses = dict(zip(batch.input_ids[0].tolist(), batch.uses[0].tolist(), strict=True))
    assert uses == {5: 4, 6: 4, 7: 2, 8: 2, 9: 1, 10: 1, 11: 0, 12: 0}
    padded = pad_pairs([group])
    assert padded.uses.tolist() == [[2, 2, 2, 2], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert PackedBatch(**batch.asdict()).uses is batch.uses


def test_training_adds_it_with_the_weight_of_the_config(tmp_path):
    fast = tiny_trainer(tmp_path, make_moe("mixtral"), max_steps=1)
    fast.train()
    aux_loss = logged(fast, "aux_loss")[0]
    assert logged(fast)[0] == pytest.approx(0.693147 + 0.1 * aux_loss, abs=1e-5)
    assert aux_loss > 2.05


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"packing": "padded"}, {"prefix_sharing": False}], ids=str
)
def test_its_gradient_is_the_same_however_it_is_computed(tmp_path, settings):
    def gates(coefficient=10.0, **some):
        sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 100.0, "max_steps": 2}
        fast = tiny_trainer(tmp_path, make_moe("mixtral"), router_aux_loss_coef=coefficient, **sgd, **some)
        fast.train()
        return {name: p.detach() for name, p in fast.model.named_parameters() if "gate.weight" in name}

    plain, other, without = gates(), gates(**settings), gates(coefficient=0.0)
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-5, atol=1e-6)
        assert (plain[name] - without[name]).abs().max() > 1e-3


def test_autocast_does_not_round_it():
    logits, uses = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.ones(64)
    exact = load_balancing_loss((logits,), uses, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(load_balancing_loss((logits,), uses, 2), exact)


def test_its_mean_over_batches_weighs_each_by_its_pairs(tmp_path):
    """5 rows as 4 + 1 in evaluation."""
    rows = make_rows(5, seed=1)
    results = [
        tiny_trainer(
            tmp_path, make_moe("mixtral"), eval_dataset=part, per_device_eval_batch_size=4, router_aux_loss_coef=0.5
        ).evaluate()
        for part in (rows, rows[:4], rows[4:])
    ]
    whole, first, last = (result["eval_aux_loss"] for result in results)
    assert first != pytest.approx(last, rel=1e-3)
    assert whole == pytest.approx((4 * first + last) / 5, rel=1e-5)
    assert results[0]["eval_loss"] == pytest.approx(0.693147 + 0.5 * whole, abs=1e-5)


def test_coefficient_0_turns_it_off(tmp_path):
    fast = tiny_trainer(tmp_path, make_moe("mixtral"), max_steps=1, router_aux_loss_coef=0.0)
    fast.train()
    assert logged(fast)[0] == pytest.approx(0.693147, abs=1e-5)
    assert logged(fast, "aux_loss") == []


@pytest.mark.parametrize(
    ("make", "settings", "match"),
    [
        (None, {"router_aux_loss_coef": 0.1}, "router_aux_loss_coef must be None or 0 for LlamaForCausalLM"),
        (
            "mixtral",
            {"max_tokens_per_microbatch": 64},
            "max_tokens_per_microbatch must be None with the load-balancing",
        ),
        ("mixtral", {"router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be a finite number >= 0"),
    ],
    ids=["no experts", "split", "negative"],
)
def test_what_has_no_such_loss_is_refused(tmp_path, make, settings, match):
    with pytest.raises(ValueError, match=match):
        tiny_trainer(tmp_path, make and make_moe(make), **settings)


def sft_trainer(output_dir, model, rows=None, **settings):
    args = SFTConfig(
        str(output_dir),
        **{**SILENT, "max_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 4, **settings},
    )
    return SFTTrainer(model, args, train_dataset=rows or make_rows(4), processing_class=make_tokenizer())


@pytest.mark.parametrize(
    ("settings", "asks_for_it"),
    [({}, False), ({"prefix_sharing": False}, True), ({"packing": "padded"}, True)],
    ids=["shared", "packed", "padded"],
)
def test_supervised_training_has_the_loss_and_gradient_of_transformers(tmp_path, settings, asks_for_it):
    """On its own forward of right-padded rows with labels; two rows have one prompt, which is computed once."""
    sequences = [([5, 6, 7, 8], [9, 10]), ([5, 6, 7, 8], [11, 12, 13]), ([13, 14], [15])]
    ids, mask = torch.zeros(2, 3, 7, dtype=torch.int64)
    labels = torch.full((3, 7), -100)
    for row, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        ids[row, :length], mask[row, :length] = torch.tensor([*prompt, *response]), 1
        labels[row, len(prompt) : length] = torch.tensor(response)
    stock = make_moe("mixtral")
    found = stock(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=True, use_cache=False)
    plain = found.loss - 0.1 * found.aux_loss
    assert found.aux_loss > 2.05
    expected = grads_of(stock, found.loss)

    rows = [{"prompt_ids": prompt, "responses": [response], "preferences": []} for prompt, response in sequences]
    model = make_moe("mixtral", output_router_logits=asks_for_it)
    fast = sft_trainer(tmp_path, model, rows, max_grad_norm=0, **settings)
    fast.create_optimizer()
    loss = fast.training_step(model, fast.collator(list(fast.train_dataset)))
    torch.testing.assert_close(loss, found.loss.detach(), rtol=1e-5, atol=0)
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-6, msg=name)
    off = sft_trainer(tmp_path, make_moe("mixtral"), rows, router_aux_loss_coef=0.0, **settings)
    inputs = off.collator(list(off.train_dataset))
    torch.testing.assert_close(off.compute_loss(off.model, inputs).detach(), plain.detach(), rtol=1e-5, atol=0)


def test_supervised_training_logs_it_weighed_by_tokens(tmp_path):
    """A step of 3 + 1 rows; with coefficient 1 the loss is that without plus the mean of the two batches' numbers."""
    rows = make_rows(4)
    with_it, without = (
        sft_trainer(tmp_path, make_moe("mixtral"), rows, train_sampling_strategy="sequential", **settings)
        for settings in (
            {"router_aux_loss_coef": 1.0, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
            {"router_aux_loss_coef": 0.0},
        )
    )
    batches = [with_it.collator([with_it.train_dataset[i] for i in part]) for part in ([0, 1, 2], [3])]
    found = [
        packed_logps(make_moe("mixtral"), PackedBatch(**batch), router_aux_loss=True).aux_loss for batch in batches
    ]
    num_tokens = [len(batch["token_rows"]) for batch in batches]
    mean = sum(n * aux.item() for n, aux in zip(num_tokens, found, strict=True)) / sum(num_tokens)
    for trainer in (with_it, without):
        trainer.train()
    assert logged(with_it, "aux_loss") == [pytest.approx(mean, rel=1e-5)]
    assert logged(with_it)[0] == pytest.approx(logged(without)[0] + mean, rel=1e-5)
    assert logged(without, "aux_loss") == []


@pytest.mark.parametrize(
    ("make", "settings", "match"),
    [
        (make_llama, {"router_aux_loss_coef": 0.1}, "must be None or 0 for LlamaForCausalLM"),
        (make_moe, {"max_tokens_per_microbatch": 64}, "max_tokens_per_microbatch must be None with the load-balancing"),
        (make_moe, {"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef must be a finite number >= 0"),
    ],
    ids=["no experts", "split", "no number"],
)
def test_supervised_training_refuses_the_same(tmp_path, make, settings, match):
    with pytest.raises(ValueError, match=match):
        sft_trainer(tmp_path, make() if make is make_llama else make("mixtral"), **settings)


def test_losses_and_metrics_are_trls(tmp_path):
    pytest.importorskip("trl")
    model = make_moe("qwen3_moe")
    fast = tiny_trainer(tmp_path / "ours", copy.deepcopy(model))
    fast.train()
    theirs = trl_trainer(tmp_path / "theirs", copy.deepcopy(model), copy.deepcopy(model))
    theirs.train()
    for key in ("loss", "aux_loss"):
        assert logged(fast, key) == pytest.approx(logged(theirs, key), abs=1e-4), key
