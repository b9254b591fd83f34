"""A row that runs in parts gives the loss, the gradient and the metrics of the whole row."""

import pytest
import torch
from closeness import relative_error
from datasets import Dataset
from test_out_of_memory import Allocator
from tiny import make_llama, make_tokenizer
from tiny_runs import make_lora, tiny_config, tiny_trainer

from fastdpo import DPOTrainer, SFTConfig
from fastdpo.losses import LOSSES, losses_where
from fastdpo.training.inputs.collator import PackingCollator
from fastdpo.training.memory.estimate import estimate_peak_memory
from fastdpo.training.memory.largest_batch import largest_microbatch, largest_row_in_parts
from fastdpo.training.memory.row_parts import halves_of_part, parts_of_row
from fastdpo.types import TokenizedGroup

# rows 1 and 2 have more than 9 tokens, but no sequence of them does
ROWS = [
    {"prompt_ids": [1, 5], "chosen_ids": [6, 7], "rejected_ids": [8]},
    {"prompt_ids": [1, 9, 9], "chosen_ids": [10, 11, 12, 13, 14, 15], "rejected_ids": [10, 11, 16, 17]},
    {"prompt_ids": [1, 20], "chosen_ids": [21, 22, 23, 24, 25, 26, 27], "rejected_ids": [9, 8, 7, 6, 5]},
    {"prompt_ids": [1, 5, 6], "chosen_ids": [7], "rejected_ids": [9, 10]},
]
RANKING = [
    {
        "prompt_ids": [1, 7, 7],
        "responses": [[5, 6, 7, 8, 9, 10], [5, 6, 12, 13], [14, 15, 16, 17, 18], [19]],
        "preferences": [[0, 1], [1, 2], [2, 3]],
    },
    {"prompt_ids": [1, 4], "responses": [[5, 6], [7], [8, 9]], "preferences": [[0, 1], [1, 2]]},
]
SPLIT = {"max_tokens_per_microbatch": 9, "on_oversized_row": "split"}


def make_gpt2(seed=0):
    """In fp64 throughout, where Llama's norms are fp32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0, resid_pdrop=0)
    return GPT2LMHeadModel(config).double()


def of_model(tmp_path, rows, model, **settings):
    options = {"beta": 0.7, "per_device_train_batch_size": len(rows), **settings}
    return tiny_trainer(tmp_path, model, train_dataset=Dataset.from_list(rows), **options)


def gradient(trainer):
    """Loss and flat gradient of a step over all rows, and the sizes of the forwards of the policy."""
    sizes = []
    embeddings = trainer.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    if trainer.optimizer is None:
        trainer.create_optimizer()
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, trainer.collator(list(trainer.train_dataset)))
    handle.remove()
    return loss, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]), sizes


def assert_same_gradients(whole, parts, at_most=1e-12):
    (loss, grad, _), (found_loss, found, _) = whole, parts
    assert relative_error(found, grad) <= at_most
    assert float(found_loss) == pytest.approx(float(loss), rel=1e-6)  # of cached log-probs, which are fp32


def test_every_loss_of_pairs_has_the_gradient_of_the_whole_row(tmp_path):
    settings = {"ref_model": make_gpt2(seed=1)}
    whole = of_model(tmp_path / "whole", ROWS, make_gpt2(), **settings)
    parts = of_model(tmp_path / "parts", ROWS, make_gpt2(), **settings, **SPLIT)
    for name in losses_where(lambda loss: loss.unit in ("pair", "token")):
        for trainer in (whole, parts):
            trainer.args.loss_type = [name]
            trainer.args.label_smoothing = 0.1 if LOSSES[name].smoothed else 0.0
        of_whole, of_parts = gradient(whole), gradient(parts)
        assert max(of_parts[2]) == 7 < max(of_whole[2])  # of responses, behind a prompt of 3 tokens
        assert float(of_whole[1].norm()) > 0, name
        assert_same_gradients(of_whole, of_parts)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_weighting": True},
        {"ld_alpha": 0.3},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "f_divergence_type": "js_divergence"},
        {"packing": "padded"},
        {"prefix_sharing": False, "skip_tolerance": 1e-30, "token_metrics": False},
        {"reference": "cached", "pad_to_multiple_of": 3},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_setting_has_the_gradient_of_the_whole_row(tmp_path, settings):
    models = {} if "reference" in settings else {"ref_model": make_gpt2(seed=1)}
    whole = gradient(of_model(tmp_path / "whole", ROWS, make_gpt2(), **models, **settings))
    parts = gradient(of_model(tmp_path / "parts", ROWS, make_gpt2(), **models, **settings, **SPLIT))
    repeats_prompt = settings.get("packing") == "padded" or not settings.get("prefix_sharing", True)
    assert max(parts[2]) == (9 if repeats_prompt else 7) < max(whole[2])
    assert_same_gradients(whole, parts)


def test_a_ranking_runs_in_parts_of_its_longest_sequence(tmp_path):
    settings = {"loss_type": "plackett_luce", "ref_model": make_gpt2(seed=1)}
    whole = gradient(of_model(tmp_path / "whole", RANKING, make_gpt2(), **settings))
    parts = gradient(of_model(tmp_path / "parts", RANKING, make_gpt2(), **settings, **SPLIT))
    assert max(whole[2]) == 24
    # without a graph, and with one: the prompt of 3 tokens, and responses of 6, of 5 and 1, and of 4; the other ranking
    assert parts[2] == [3, 6, 6, 4, 3, 6, 6, 4, 7]
    assert_same_gradients(whole, parts)


def ran(folder, name, **settings):
    """A trainer of a tiny Llama after three steps, with evaluations."""
    options = {"learning_rate": 1e-2, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, **settings}
    if "peft_config" not in options:
        options["ref_model"] = make_llama(seed=1).double()
    trainer = of_model(
        folder / name,
        ROWS,
        make_llama().double(),
        eval_dataset=Dataset.from_list(ROWS[::-1]),
        per_device_eval_batch_size=4,
        **options,
    )
    trainer.train()
    return trainer


def assert_same_run(found, expected):
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # Llama's norms are in fp32
    for entry, other in zip(found.state.log_history, expected.state.log_history, strict=True):
        keys = [key for key in other if "runtime" not in key and "per_second" not in key and key != "total_flos"]
        assert {key: entry[key] for key in keys} == pytest.approx({key: other[key] for key in keys}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": True},
        {"gradient_checkpointing": True, "peft_config": make_lora()},
    ],
    ids=["accumulation", "lora"],
)
def test_a_run_in_parts_logs_what_a_run_of_whole_rows_logs(tmp_path, settings):
    expected = ran(tmp_path, "whole", **settings)
    assert_same_run(ran(tmp_path, "parts", **settings, **SPLIT), expected)
    names = {"loss", "rewards/margins", "entropy", "logits/chosen", "mean_token_accuracy", "num_tokens", "grad_norm"}
    assert names <= set(expected.state.log_history[0])


def test_predictions_are_those_of_whole_rows(tmp_path):
    trainer = of_model(tmp_path, ROWS, make_gpt2(), ref_model=make_gpt2(seed=1))
    whole = trainer.predict(trainer.train_dataset)
    trainer.collator.max_tokens, trainer.out_of_memory.on_oversized_row = 9, "split"
    parts = trainer.predict(trainer.train_dataset)
    for name, values in whole.predictions.items():
        assert parts.predictions[name] == pytest.approx(values, rel=1e-6), name
    assert parts.metrics["test_loss"] == pytest.approx(whole.metrics["test_loss"], rel=1e-6)


# Without a limit: what does not fit runs in parts


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_row_that_does_not_fit_runs_in_parts(tmp_path, where, caplog):
    settings = {"ref_model": make_gpt2(seed=1), "loss_type": "plackett_luce"}
    whole = gradient(of_model(tmp_path / "whole", RANKING, make_gpt2(), **settings))
    trainer = of_model(tmp_path / "parts", RANKING, make_gpt2(), **settings, on_oversized_row="split")
    memory = GPT2Memory(trainer.model, 10, where)
    with caplog.at_level("WARNING"):
        parts = gradient(trainer)
    told = [record.message for record in caplog.records if "do not fit into memory. Its sequences" in record.message]
    assert memory.failures == 1 + len(told)  # the batch of two rows, and then a row, or parts of it
    assert_same_gradients(whole, parts)
    again = gradient(trainer)
    assert memory.failures == 1 + len(told)  # what does not fit is known
    assert_same_gradients(whole, again)


class GPT2Memory(Allocator):
    """Out of memory in passes of more than `most` tokens through GPT-2."""

    def __init__(self, model, most, where):
        self.most, self.attempts, self.failures, self.where = most, [], 0, where
        model.get_input_embeddings().register_forward_pre_hook(self.before)
        model.transformer.h[0].register_full_backward_hook(self.backward)


def test_an_evaluation_runs_a_row_that_does_not_fit_in_parts(tmp_path):
    trainer = of_model(tmp_path, ROWS, make_gpt2(), ref_model=make_gpt2(seed=1), on_oversized_row="split")
    whole = trainer.evaluate(trainer.train_dataset)
    memory = GPT2Memory(trainer.model, 10, "forward")
    parts = trainer.evaluate(trainer.train_dataset)
    assert memory.failures > 0
    names = [name for name in whole if "runtime" not in name and "per_second" not in name]
    assert {name: parts[name] for name in names} == pytest.approx({name: whole[name] for name in names}, rel=1e-6)


def test_a_sequence_that_does_not_fit_ends_the_run_with_its_row(tmp_path):
    trainer = of_model(tmp_path, RANKING, make_gpt2(), on_oversized_row="split")
    GPT2Memory(trainer.model, 5, "forward")
    with pytest.raises(ValueError, match=r"row 0 of the prepared train .* has a sequence of 9 tokens that does not"):
        trainer.train()


def test_the_error_of_a_row_that_does_not_fit_names_the_setting(tmp_path):
    trainer = of_model(tmp_path, ROWS, make_gpt2())
    GPT2Memory(trainer.model, 10, "forward")
    with pytest.raises(ValueError, match="one by one with on_oversized_row='split'"):
        trainer.train()


# Parts


def test_sequences_that_fit_together_share_a_part_and_the_prompt():
    group = TokenizedGroup([1, 2, 3], [[4] * 6, [5] * 2, [6] * 3, [4, 4, 7]], preferences=[(0, 1), (2, 3)])
    parts = parts_of_row((5, group), PackingCollator(), 10, torch.zeros(1))
    assert [part.sequences for part in parts] == [(0, 3), (1, 2)]  # 3 + 6 + 1 tokens, and 3 + 2 + 3
    assert [part.inputs["input_ids"].numel() for part in parts] == [10, 8]
    assert all(part.inputs["example_ids"].tolist() == [5, 5] for part in parts)
    alone = parts_of_row((5, group), PackingCollator(), 1, torch.zeros(1))
    assert sorted(part.sequences for part in alone) == [(0,), (1,), (2,), (3,)]
    halves = halves_of_part(parts[0], PackingCollator())
    assert [(half.sequences, places) for half, places in halves] == [((0,), (0,)), ((3,), (1,))]


def test_the_estimate_of_a_ranking_is_that_of_its_longest_sequence_beside_the_prompt(tmp_path):
    rows = [{"prompt_ids": [1] * 40, "responses": [[5 + i] * 60 for i in range(4)], "preferences": [[0, 1], [2, 3]]}]
    alone = [{"prompt_ids": [1] * 40, "responses": [[5] * 60], "preferences": []}]
    settings = {"max_tokens_per_microbatch": 100, "on_oversized_row": "split", "reference_free": True}
    trainer = of_model(tmp_path, rows, make_llama(), **settings)
    found = estimate_peak_memory(trainer)
    assert largest_microbatch(trainer).num_tokens == 100
    assert largest_row_in_parts(trainer).segments == ((40, 100, 0, 40),)
    trainer.train_dataset = Dataset.from_list(alone)
    assert largest_row_in_parts(trainer) is None
    of_sequence = estimate_peak_memory(trainer)
    assert of_sequence.total <= found.total < 1.1 * of_sequence.total
    trainer.args.prefix_sharing = False  # prompts repeat
    trainer.train_dataset = Dataset.from_list(rows)
    assert largest_row_in_parts(trainer) is None
    assert found.total >= estimate_peak_memory(trainer).total == of_sequence.total
    trainer.args.prefix_sharing = True
    trainer.args.on_oversized_row, trainer.train_dataset = "alone", Dataset.from_list(rows)
    assert largest_microbatch(trainer).num_tokens == 280
    assert estimate_peak_memory(trainer).activations > 2 * found.activations


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "aot"}, r"for loss_type \['aot'\], got 'split': the loss depends on the whole batch"),
        ({"disable_dropout": False}, "disable_dropout must be True if on_oversized_row is 'split', got False"),
        ({"neftune_noise_alpha": 5.0, "packing": "padded"}, "neftune_noise_alpha must be None if on_oversized_row is"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, on_oversized_row="split", **settings)


def test_supervised_fine_tuning_has_nothing_to_split(tmp_path):
    with pytest.raises(ValueError, match="in supervised fine-tuning, got 'split': a row is one response"):
        SFTConfig(str(tmp_path), on_oversized_row="split")


def test_a_collator_of_ones_own_tells_no_rows(tmp_path):
    with pytest.raises(ValueError, match="the data_collator, function, does not tell which rows a batch holds"):
        DPOTrainer(
            make_gpt2(),
            args=tiny_config(tmp_path, on_oversized_row="split"),
            data_collator=lambda rows: PackingCollator()(rows).asdict(),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=make_tokenizer(),
        )


def test_the_loss_of_experts_is_not_split(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=2, **sizes))
    with pytest.raises(ValueError, match="must not be 'split' with the load-balancing loss of MixtralForCausalLM"):
        of_model(tmp_path, ROWS, model, on_oversized_row="split", router_aux_loss_coef=0.1)
