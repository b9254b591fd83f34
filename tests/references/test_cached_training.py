"""Training with a cached reference is training with a live one, at every step and in every evaluation."""

import copy
import math
import weakref

import pytest
import torch
from datasets import Dataset
from processes import on_processes
from tiny import make_llama, make_rows
from tiny_runs import losses, make_lora, tiny_trainer

from fastdpo.references import precompute
from fastdpo.training.setup import reference as reference_module


def make_trainer(tmp_path, model=None, rows=None, **settings):
    """Two epochs over 18 rows; runs of one test share a cache."""
    rows = make_rows(18) if rows is None else rows
    settings = {"num_train_epochs": 2, "max_steps": -1, "ref_cache_dir": str(tmp_path / "cache"), **settings}
    return tiny_trainer(tmp_path / "out", model, train_dataset=Dataset.from_list(rows), **settings)


@pytest.fixture
def computed(monkeypatch):
    """How many rows each dataset has had computed so far."""
    counts = []
    fill = precompute.fill_ref_logps

    def counting(*args, **kwargs):
        filled, count = fill(*args, **kwargs)
        counts.append(count.num_computed)
        return filled, count

    for module in ("fastdpo.training.inputs.cached_reference", "fastdpo.training.precompute"):
        monkeypatch.setattr(f"{module}.fill_ref_logps", counting)
    return counts


def lora_model_under_way():
    """A PeftModel whose adapter has been trained before: its start is the reference, not its base."""
    from peft import get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(make_llama(), make_lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


def ranked_rows(num_rows=8):
    """Three responses to each prompt, with three preferences among them."""
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return torch.randint(4, 30, (length,), generator=generator).tolist()

    return [
        {
            "prompt_ids": [1, *draw(4)],
            "responses": [draw(3 + i % 3), draw(2), draw(5)],
            "preferences": [[0, 1], [0, 2], [1, 2]],
        }
        for i in range(num_rows)
    ]


CASES = {
    "full": dict,
    "given": lambda: {"ref_model": make_llama(seed=4)},
    "lora": lambda: {"peft_config": make_lora(), "learning_rate": 3e-2},
    "lora under way": lambda: {"model": lora_model_under_way()},
    "padded": lambda: {"packing": "padded"},
    "bf16": lambda: {"bf16": True},
    "accumulated": lambda: {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_evaluations_are_those_of_a_live_reference(tmp_path, case):
    evaluated = Dataset.from_list(make_rows(5, seed=1))
    live = make_trainer(tmp_path, eval_dataset=evaluated, **CASES[case]())
    cached = make_trainer(tmp_path, eval_dataset=evaluated, reference="cached", **CASES[case]())
    assert (live.reference.mode == "cached", cached.reference.mode) == (False, "cached")
    expected, found = losses(live), losses(cached)
    assert len(expected) == 10
    assert max(expected) - min(expected) > 0.01
    # in bf16 a log-prob depends in its last bits on which rows it is computed with
    assert found == pytest.approx(expected, abs=2e-2 if case == "bf16" else 1e-5)
    expected, found = live.evaluate(), cached.evaluate()
    for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/chosen"):
        assert found[key] == pytest.approx(expected[key], abs=2e-2 if case == "bf16" else 1e-5), key


def test_losses_of_groups_of_three_are_those_of_a_live_reference(tmp_path):
    settings = {"rows": ranked_rows(), "per_device_train_batch_size": 2}
    live = make_trainer(tmp_path, ref_model=make_llama(seed=4), **settings)
    cached = make_trainer(tmp_path, ref_model=make_llama(seed=4), reference="cached", **settings)
    expected = losses(live)
    assert losses(cached) == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(math.log(2), abs=1e-3)


def test_a_second_run_computes_nothing_and_says_where_it_found_it(tmp_path, computed):
    first = make_trainer(tmp_path, reference="cached")
    second = make_trainer(tmp_path, precompute_ref_log_probs=True)
    assert computed == [18, 0]
    assert "18 computed" in first.reference_reason
    assert "18 found" in second.reference_reason
    assert str(tmp_path / "cache") in second.reference_reason
    assert second.train_dataset["ref_logps"] == first.train_dataset["ref_logps"]


def test_a_lora_run_finds_what_a_full_run_computed_and_another_model_does_not(tmp_path, computed):
    make_trainer(tmp_path, reference="cached")
    make_trainer(tmp_path, reference="cached", peft_config=make_lora())
    make_trainer(tmp_path, make_llama(seed=1), reference="cached")
    make_trainer(tmp_path, reference="cached", bf16=True)
    assert computed == [18, 0, 18, 18]


def test_a_trained_model_does_not_find_the_log_probs_of_its_start(tmp_path, computed):
    first = make_trainer(tmp_path, reference="cached")
    first.train()
    again = make_trainer(tmp_path, first.model, reference="cached")
    assert computed == [18, 18]
    assert losses(again)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_named_reference_is_freed_before_training(tmp_path, monkeypatch):
    make_llama(seed=4).save_pretrained(tmp_path / "ref")
    loaded = []
    load = reference_module.load_model
    monkeypatch.setattr(
        reference_module, "load_model", lambda *a, **kw: (m := load(*a, **kw), loaded.append(weakref.ref(m)))[0]
    )
    fast = make_trainer(tmp_path, ref_model=str(tmp_path / "ref"), reference="cached")
    assert [reference() for reference in loaded] == [None]
    assert losses(fast) == pytest.approx(losses(make_trainer(tmp_path, ref_model=make_llama(seed=4))), abs=1e-5)


def test_a_given_reference_stays_the_users(tmp_path):
    reference = make_llama(seed=4).train()
    before = copy.deepcopy(reference.state_dict())
    make_trainer(tmp_path, ref_model=reference, reference="cached").train()
    assert all(torch.equal(before[name], weight) for name, weight in reference.state_dict().items())
    assert reference.training
    assert all(p.requires_grad for p in reference.parameters())


def test_every_eval_dataset_is_filled(tmp_path, computed):
    evaluated = {"a": Dataset.from_list(make_rows(3, seed=1)), "b": Dataset.from_list(make_rows(2, seed=2))}
    fast = make_trainer(tmp_path, eval_dataset=evaluated, reference="cached")
    assert computed == [18, 3, 2]
    metrics = fast.evaluate()
    assert metrics["eval_a_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["eval_b_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_rows_that_come_after_training_are_found_or_refused(tmp_path):
    rows = Dataset.from_list(make_rows(5, seed=1))
    fast = make_trainer(tmp_path, reference="cached")
    fast.train()
    with pytest.raises(ValueError, match=r"eval dataset must have reference log-probs, got 5 rows"):
        fast.evaluate(rows)
    known = fast.evaluate(Dataset.from_list(make_rows(18)[3:7]))
    assert known["eval_loss"] < math.log(2)


REFERENCES = {
    "its own start": lambda folder: None,
    "a model": lambda folder: make_llama(seed=1),
    "a folder": lambda folder: saved(make_llama(seed=1), folder),
}


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", REFERENCES)
def test_rows_that_come_before_the_first_step_are_computed_whatever_the_cache_holds(tmp_path, computed, kind):
    """A cold cache, and one that an earlier run has left: the same numbers."""
    rows = Dataset.from_list(make_rows(4, seed=9))

    def run():
        return make_trainer(tmp_path, ref_model=REFERENCES[kind](tmp_path / "reference"), reference="cached")

    live = make_trainer(tmp_path, ref_model=REFERENCES[kind](tmp_path / "reference"), reference="frozen")
    expected = live.evaluate(rows)
    cold = run().evaluate(rows)
    warm = run().evaluate(rows)
    assert computed == [18, 4, 0, 0]
    for key in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert cold[key] == pytest.approx(expected[key], abs=1e-5)
        assert warm[key] == pytest.approx(expected[key], abs=1e-5)


def test_rows_that_come_after_the_first_step_are_computed_by_a_reference_that_can_be_loaded_again(tmp_path):
    folder = saved(make_llama(seed=1), tmp_path / "reference")
    cached = make_trainer(tmp_path, ref_model=folder, reference="cached", max_steps=2)
    live = make_trainer(tmp_path, ref_model=folder, reference="frozen", max_steps=2)
    cached.train()
    live.train()
    rows = Dataset.from_list(make_rows(4, seed=9))
    expected = live.evaluate(rows)["eval_rewards/margins"]
    assert cached.evaluate(rows)["eval_rewards/margins"] == pytest.approx(expected, abs=1e-5)


def test_weights_that_were_changed_by_hand_are_not_taken_for_the_reference(tmp_path):
    cached = make_trainer(tmp_path, reference="cached")
    with torch.no_grad():
        cached.model.lm_head.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"eval dataset must have reference log-probs, got 4 rows"):
        cached.evaluate(Dataset.from_list(make_rows(4, seed=9)))


def test_another_model_of_the_trainer_is_not_taken_for_the_reference(tmp_path):
    fast = make_trainer(tmp_path, reference="cached")
    fast.model = make_llama(seed=5)
    with pytest.raises(ValueError, match="the reference model is no longer available"):
        fast.evaluate(make_rows(3, seed=9))


def test_an_adapter_that_was_merged_is_not_taken_for_the_reference(tmp_path):
    """Without the check, the merged model would be compared with itself: a loss of ln 2, whatever was trained."""
    fast = make_trainer(tmp_path, reference="adapter", peft_config=make_lora())
    fast.model = fast.model_wrapped = fast.model.merge_and_unload()
    with pytest.raises(ValueError, match="must keep its adapter while it is the reference"):
        fast.evaluate(make_rows(3, seed=9))
    fast.model = fast.model_wrapped = make_llama(seed=5)
    with pytest.raises(ValueError, match="must stay the PeftModel that is also the reference"):
        fast.evaluate(make_rows(3, seed=9))


def test_with_an_adapter_rows_that_come_after_training_are_computed(tmp_path):
    rows = Dataset.from_list(make_rows(5, seed=1))
    live, cached = (make_trainer(tmp_path, peft_config=make_lora(), reference=mode) for mode in ("auto", "cached"))
    live.train()
    cached.train()
    expected = live.evaluate(rows)["eval_loss"]
    assert cached.evaluate(rows)["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert expected != pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("setting", [{"reference": "frozen"}, {"reference": "none"}, {"reference_free": True}], ids=str)
def test_trls_name_does_not_go_with_another_reference(tmp_path, setting):
    with pytest.raises(ValueError, match="precompute_ref_log_probs must be off with"):
        make_trainer(tmp_path, precompute_ref_log_probs=True, **setting)


def compute_a_share(folder):
    """What one of the processes has computed, and what it reads."""
    compute, shares = precompute._compute, []

    def counting(dataset, infos, rows, *more):
        shares.append(len(rows))
        return compute(dataset, infos, rows, *more)

    precompute._compute = counting
    trainer = make_trainer(
        folder,
        rows=make_rows(16),
        reference="cached",
        per_device_train_batch_size=2,
        eval_dataset=Dataset.from_list(make_rows(5, seed=1)),
    )
    return {"losses": losses(trainer), "shares": shares, "ref_logps": list(trainer.train_dataset["ref_logps"])}


def test_two_processes_compute_a_share_each_and_read_the_same(tmp_path):
    (ranks,) = on_processes(compute_a_share, [{}], tmp_path)
    shares = torch.tensor([rank["shares"] for rank in ranks])  # (processes, datasets)
    assert shares.sum(0).tolist() == [16, 5]
    assert (shares[:, 0] > 0).all()
    assert ranks[0]["ref_logps"] == ranks[1]["ref_logps"]
    alone = make_trainer(tmp_path / "alone", rows=make_rows(16), reference="cached")
    for two, one in zip(ranks[0]["ref_logps"], alone.train_dataset["ref_logps"], strict=True):
        assert two == pytest.approx(one, rel=1e-6, abs=1e-5)
    assert ranks[0]["losses"] == pytest.approx(losses(alone), rel=1e-4, abs=1e-5)
