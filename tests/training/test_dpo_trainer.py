"""DPOTrainer against a plain PyTorch loop written here, and what it promises at step 0."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import logged, tiny_config, tiny_trainer
from transformers import Trainer, TrainingArguments

from fastdpo import DPOTrainer
from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.modeling.prepared import unprepare_model

# A plain loop: padded, full logits, no packing, written without fastdpo's engine


def plain_batch(groups):
    """(2B, L) right-padded ids, chosen first, and a mask of the response tokens."""
    sequences = [(list(g.prompt_ids), list(g.responses[side])) for side in (0, 1) for g in groups]
    width = max(len(p) + len(r) for p, r in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    attention_mask, is_response = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        attention_mask[i, :end] = 1
        is_response[i, len(prompt) : end] = 1
    return ids, attention_mask, is_response


def plain_logps(model, ids, attention_mask, is_response):
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    per_token = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (per_token * is_response[:, 1:]).sum(-1).chunk(2)


def plain_dpo(model, steps_of_groups, learning_rate, beta, max_grad_norm=1.0):
    """Losses of AdamW with a linear schedule, one optimizer step for each list of groups."""
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for step, groups in enumerate(steps_of_groups):
        batch = plain_batch(groups)
        chosen, rejected = plain_logps(model, *batch)
        with torch.no_grad():
            ref_chosen, ref_rejected = plain_logps(reference, *batch)
        loss = -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / len(steps_of_groups))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def stock_trainer_order(tmp_path, num_rows, num_epochs):
    """The order in which transformers.Trainer itself visits the rows of a dataset of this size."""
    visited = []

    def collate(examples):
        visited.extend(e["i"] for e in examples)
        ids = torch.ones(len(examples), 3, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids}

    arguments = TrainingArguments(
        str(tmp_path / "stock"),
        per_device_train_batch_size=4,
        num_train_epochs=num_epochs,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    dataset = Dataset.from_list([{"i": i} for i in range(num_rows)])
    Trainer(make_llama(), arguments, data_collator=collate, train_dataset=dataset).train()
    return visited


def visited_rows(trainer):
    """Records which rows each collated batch holds, by wrapping the collator."""
    visited = []
    collate, rows = trainer.data_collator, [tuple(map(tuple, r)) for r in trainer.train_dataset["responses"]]

    def recording(examples):
        visited.append([rows.index(tuple(map(tuple, e["responses"]))) for e in examples])
        return collate(examples)

    trainer.data_collator = recording
    return visited


def test_a_collator_of_ones_own_needs_example_ids_for_rankings_alone(tmp_path):
    def evaluated(output_dir, *, of_ones_own, **settings):
        trainer = tiny_trainer(
            output_dir,
            eval_dataset=make_rows(5, seed=1),
            compute_metrics=lambda prediction: {"first": float(prediction.predictions["rejected_logps"][0])},
            **settings,
        )
        if of_ones_own:
            trainer.data_collator = lambda rows: {**trainer.collator(rows), "example_ids": None}
        trainer.train()
        metrics = trainer.evaluate()
        return metrics["eval_loss"], metrics["eval_first"]

    assert evaluated(tmp_path / "a", of_ones_own=True) == evaluated(tmp_path / "b", of_ones_own=False)
    with pytest.raises(ValueError, match="data_collator must return example_ids"):
        evaluated(tmp_path / "c", of_ones_own=True, loss_type="plackett_luce")


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "num_rows"), [(8, 1, 48), (1, 8, 48), (2, 3, 5)], ids=["8x1", "1x8", "5 as 2+2+1"]
)
def test_thirty_steps_give_the_losses_of_a_plain_loop(tmp_path, batch_size, accumulation, num_rows):
    """5 pairs as 2 + 2 + 1 are one optimizer step: the loss is the mean over the five, not the mean of three means."""
    fast = tiny_trainer(
        tmp_path,
        num_rows=num_rows,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=30,
        max_grad_norm=1.0,
    )
    visited = visited_rows(fast)
    fast.train()
    groups = [group_from_columns(row) for row in fast.train_dataset]
    per_step = min(batch_size * accumulation, num_rows)
    flat = [groups[i] for batch in visited for i in batch][: 30 * per_step]
    steps = [flat[i : i + per_step] for i in range(0, len(flat), per_step)]
    assert len(steps) == 30
    expected = plain_dpo(make_llama(), steps, learning_rate=1e-3, beta=0.5)
    actual = logged(fast)
    assert len(actual) == 30
    assert max(expected) - min(expected) > 0.1  # training moved
    assert actual == pytest.approx(expected, abs=1e-5)


def test_the_rows_come_in_plain_trainers_order(tmp_path):
    fast = tiny_trainer(tmp_path, num_rows=16, num_train_epochs=2, max_steps=-1)
    visited = visited_rows(fast)
    fast.train()
    assert [i for batch in visited for i in batch] == stock_trainer_order(tmp_path, 16, 2)


def step0_tolerance(log, beta):
    return 1e-6 + 1e-7 * beta * (abs(log["logps/chosen"]) + abs(log["logps/rejected"]))


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("reference", ["frozen", "given", "adapter", "cached"])
def test_the_loss_at_step_0_is_ln_2(tmp_path, reference, packing):
    keywords = {"max_steps": 1, "packing": packing}
    model = make_llama()
    if reference == "given":
        keywords["ref_model"] = copy.deepcopy(model)
    if reference == "adapter":
        from peft import LoraConfig

        keywords["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if reference == "cached":
        fast = cached_trainer(tmp_path, model, **keywords)
    else:
        fast = tiny_trainer(tmp_path, model, 8, **keywords)
    fast.train()
    log = fast.state.log_history[0]
    assert log["loss"] == pytest.approx(math.log(2), abs=step0_tolerance(log, 0.5))
    assert log["logps/chosen"] < -5
    assert log["rewards/weight"] == pytest.approx(0.5, abs=1e-5)


def cached_trainer(tmp_path, model, **settings):
    """A trainer on a dataset that brings the log-probs of its own start, computed by the plain loop's formula."""
    dataset, _ = prepare_preference_dataset(make_rows(8), make_tokenizer(), TokenizationSettings())
    groups = [group_from_columns(row) for row in dataset]
    with torch.no_grad():
        chosen, rejected = plain_logps(model, *plain_batch(groups))
    rows = [
        {
            "prompt_ids": g.prompt_ids,
            "chosen_ids": g.responses[0],
            "rejected_ids": g.responses[1],
            "ref_chosen_logps": c.item(),
            "ref_rejected_logps": r.item(),
        }
        for g, c, r in zip(groups, chosen, rejected, strict=True)
    ]
    fast = DPOTrainer(
        model,
        args=tiny_config(tmp_path, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    assert fast.reference.mode == "cached"
    return fast


def test_reference_free_training_compares_with_nothing(tmp_path):
    fast = tiny_trainer(tmp_path, num_rows=8, reference_free=True, max_steps=1, beta=0.1, per_device_train_batch_size=8)
    assert fast.reference.mode == "none"
    groups = [group_from_columns(row) for row in fast.train_dataset]
    with torch.no_grad():
        chosen, rejected = plain_logps(make_llama(), *plain_batch(groups))
    fast.train()
    assert logged(fast)[0] == pytest.approx(-F.logsigmoid(0.1 * (chosen - rejected)).mean().item(), abs=1e-6)


def test_training_with_an_adapter_changes_the_adapter_only(tmp_path):
    from peft import LoraConfig

    start = make_llama()
    fast = tiny_trainer(
        tmp_path, copy.deepcopy(start), 8, peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    assert fast.reference.mode == "adapter"
    fast.train()
    weights = fast.model.get_base_model().state_dict()
    for name, weight in start.state_dict().items():
        assert torch.equal(weights[name.replace("q_proj.", "q_proj.base_layer.")], weight), name
    assert any(p.abs().max() > 0 for n, p in fast.model.named_parameters() if "lora_B" in n)
    assert logged(fast)[-1] < logged(fast)[0]


def test_a_model_that_comes_with_an_adapter_is_compared_with_its_start(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    fast = tiny_trainer(tmp_path, model, 8, learning_rate=1e-2)
    fast.train()
    assert logged(fast)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(fast)[-1] < math.log(2) - 1e-3
    trainable = [n for n, p in fast.model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".default." in name for name in trainable)


def test_dropout_in_the_config_does_not_reach_the_loss(tmp_path):
    fast = tiny_trainer(tmp_path, make_llama(attention_dropout=0.5), 8, max_steps=1)
    fast.train()
    assert logged(fast)[0] == pytest.approx(math.log(2), abs=1e-5)


TRL_KEYS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
}


def test_metrics_have_trls_keys_in_train_and_eval(tmp_path):
    rows = Dataset.from_list(make_rows(5, seed=1))
    fast = tiny_trainer(tmp_path, num_rows=8, eval_dataset=rows, eval_strategy="steps", eval_steps=3)
    fast.train()
    assert {*TRL_KEYS, "num_tokens", "rewards/weight", "loss"} <= fast.state.log_history[0].keys()
    evaluated = next(entry for entry in fast.state.log_history if "eval_loss" in entry)
    assert {f"eval_{key}" for key in {*TRL_KEYS, "rewards/weight", "loss"}} <= evaluated.keys()


def test_eval_metrics_are_means_over_pairs_whatever_the_batch_size(tmp_path):
    """5 pairs as 2 + 2 + 1: every pair weighs the same."""
    rows = Dataset.from_list(make_rows(5, seed=1))
    reference = make_llama(seed=7)
    results = []
    for batch_size in (2, 5):
        fast = tiny_trainer(
            tmp_path,
            num_rows=8,
            ref_model=copy.deepcopy(reference),
            eval_dataset=rows,
            per_device_eval_batch_size=batch_size,
        )
        results.append(fast.evaluate())
    for key in ["eval_loss", *(f"eval_{key}" for key in TRL_KEYS)]:
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-5), key
    assert results[0]["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_num_tokens_counts_the_prompt_once_for_each_response(tmp_path):
    fast = tiny_trainer(tmp_path, num_rows=4, max_steps=1, per_device_train_batch_size=4)
    fast.train()
    expected = sum(2 * len(r["prompt_ids"]) + sum(map(len, r["responses"])) for r in fast.train_dataset)
    assert logged(fast, "num_tokens") == [expected]


@pytest.mark.parametrize(
    "setting", [{"gradient_checkpointing": True}, {"prefix_sharing": False}, {"packing": "padded"}], ids=str
)
def test_how_it_is_computed_does_not_change_the_losses(tmp_path, setting):
    plain, changed = tiny_trainer(tmp_path, max_steps=5), tiny_trainer(tmp_path, max_steps=5, **setting)
    plain.train()
    changed.train()
    assert logged(changed) == pytest.approx(logged(plain), abs=1e-5)


def test_bf16_autocast_stays_close_to_fp32(tmp_path):
    exact, rounded = tiny_trainer(tmp_path), tiny_trainer(tmp_path, bf16=True)
    exact.train()
    rounded.train()
    assert logged(rounded)[0] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference round alike
    assert logged(rounded) == pytest.approx(logged(exact), abs=2e-2)
    assert logged(rounded) != logged(exact)


def test_a_run_resumes_where_its_checkpoint_was(tmp_path):
    whole = tiny_trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    first = tiny_trainer(tmp_path / "cut", max_steps=6, save_strategy="steps", save_steps=3)
    first.train()
    again = tiny_trainer(tmp_path / "cut", max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert logged(again)[-3:] == pytest.approx(logged(whole)[-3:], abs=1e-6)


def test_a_saved_model_loads_in_transformers_and_gives_the_same_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    fast = tiny_trainer(tmp_path, num_rows=8)
    fast.train()
    fast.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.tensor([[1, 5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, fast.model.eval()(ids).logits)


def test_training_writes_tensorboard_events(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    tiny_trainer(tmp_path, num_rows=8, report_to="tensorboard").train()
    assert list((tmp_path / "tb").rglob("events.out.tfevents.*"))


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_its_batch(tmp_path):
    model = make_llama()
    fast = tiny_trainer(tmp_path, model, 8)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(FloatingPointError, match="nonfinite_batch"):
        fast.train()
    saved = torch.load(tmp_path / "nonfinite_batch_rank0.pt", weights_only=True)
    assert saved["inputs"]["input_ids"].shape[0] == 1
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def test_two_bf16_stages_on_one_model_train_both(tmp_path):
    """The reference of the second stage is a copy of its start, not the policy itself in accelerate's wrapper."""
    model = make_llama()
    for stage in ("first", "second"):
        fast = tiny_trainer(tmp_path / stage, model, 8, bf16=True, max_steps=4)
        fast.train()
        assert logged(fast)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert logged(fast)[-1] < math.log(2) - 0.02


def test_a_bf16_stage_leaves_no_autocast_behind(tmp_path):
    model = make_llama()
    tiny_trainer(tmp_path / "first", model, 8, bf16=True, max_steps=1).train()
    start = copy.deepcopy(model)
    fast = tiny_trainer(tmp_path / "second", model, 8, max_steps=3, per_device_train_batch_size=8)
    fast.train()
    groups = [group_from_columns(row) for row in fast.train_dataset]
    assert logged(fast) == pytest.approx(plain_dpo(unprepare_model(start), [groups] * 3, 1e-3, 0.5), abs=1e-5)


def test_weights_trained_beside_the_adapter_are_not_part_of_the_reference(tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM")
    fast = tiny_trainer(tmp_path, make_llama(attention_bias=True), 8, peft_config=lora)
    assert fast.reference.mode == "frozen"
    assert "bias" in fast.reference_reason
    with pytest.raises(ValueError, match="is trained too"):
        tiny_trainer(tmp_path, make_llama(attention_bias=True), 8, peft_config=lora, reference="adapter")


def test_reference_logps_of_text_rows_and_lists_are_used(tmp_path):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in make_rows(4)]
    for dataset in (rows, Dataset.from_list(rows)):
        fast = DPOTrainer(
            make_llama(),
            args=tiny_config(tmp_path, max_steps=1),
            train_dataset=dataset,
            processing_class=make_tokenizer(),
        )
        assert fast.reference.mode == "cached"
        fast.train()
        log = fast.state.log_history[0]
        assert log["rewards/chosen"] == pytest.approx(0.5 * (log["logps/chosen"] + 1.0), abs=1e-4)


def test_reference_logps_that_the_eval_data_lacks_are_not_relied_on(tmp_path):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in make_rows(4)]
    arguments = {"train_dataset": rows, "eval_dataset": make_rows(2, seed=1), "processing_class": make_tokenizer()}
    assert DPOTrainer(make_llama(), args=tiny_config(tmp_path), **arguments).reference.mode == "frozen"
    cached = DPOTrainer(
        make_llama(), args=tiny_config(tmp_path, reference="cached", ref_cache_dir=str(tmp_path / "cache")), **arguments
    )
    assert cached.train_dataset["ref_logps"][0] == [-1.0, -2.0]
    assert cached.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_reference_logps_of_rows_that_are_cut_are_computed_again(tmp_path):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in make_rows(4)]
    rows[2] |= {"chosen": "the cat sees " * 9}
    arguments = {"train_dataset": rows, "max_length": 20}
    assert tiny_trainer(tmp_path, **arguments).reference.mode == "frozen"
    fast = tiny_trainer(tmp_path, reference="cached", **arguments)
    assert "4 rows: 3 brought by the dataset, 1 computed" in fast.reference_reason
    known = fast.train_dataset["ref_logps"]
    assert [known[i] for i in (0, 1, 3)] == [[-1.0, -2.0]] * 3
    group = group_from_columns(fast.train_dataset[2])
    with torch.no_grad():
        expected = torch.cat(plain_logps(make_llama(), *plain_batch([group])))
    assert known[2] == pytest.approx(expected.tolist(), rel=1e-5)


def test_num_tokens_goes_on_after_a_resume(tmp_path):
    whole = tiny_trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    tiny_trainer(tmp_path / "cut", max_steps=4, save_strategy="steps", save_steps=2).train()
    again = tiny_trainer(tmp_path / "cut", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert logged(again, "num_tokens") == logged(whole, "num_tokens")


def test_predict_takes_raw_rows_too(tmp_path):
    fast = tiny_trainer(tmp_path, num_rows=8)
    output = fast.predict(Dataset.from_list(make_rows(3, seed=1)))
    assert output.metrics["test_loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "settings", [{"bf16": False}, {"bf16": True}, {"bf16": False, "gradient_checkpointing": True}], ids=str
)
def test_training_on_a_gpu_follows_the_cpu(tmp_path, settings):
    on_gpu = tiny_trainer(tmp_path / "gpu", max_steps=8, use_cpu=False, **settings)
    on_cpu = tiny_trainer(tmp_path / "cpu", max_steps=8)
    on_gpu.train()
    on_cpu.train()
    assert on_gpu.model.device.type == "cuda"
    assert logged(on_gpu)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(on_gpu) == pytest.approx(logged(on_cpu), abs=3e-2 if settings["bf16"] else 1e-4)
