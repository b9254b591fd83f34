"""DPO with adapters end to end: what the reference is, what is trained, saved, resumed and merged."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft_cases import GROUPS, learned, lora, plain_sums
from safetensors.torch import load_file
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import logged, tiny_trainer

from fastdpo import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, pack_pairs, packed_logps
from fastdpo.data.prepare import group_from_columns
from fastdpo.training.precompute import precompute_ref_logps


def make_trainer(tmp_path, model=None, rows=8, **settings):
    settings = {"learning_rate": 1e-2, "max_steps": 2, "ref_cache_dir": str(tmp_path / "cache"), **settings}
    return tiny_trainer(tmp_path / "out", model, rows, **settings)


def under_way(*targets, seed=1, name="default", model=None, **settings):
    """A model whose adapter was trained before."""
    torch.manual_seed(seed)
    model = make_llama() if model is None else model
    return learned(get_peft_model(model, lora(*targets, **settings), adapter_name=name), seed=seed)


def sums_of(model):
    with torch.no_grad():
        return packed_logps(model.eval(), pack_pairs(GROUPS)).sequences.sums


def reference_sums(trainer, model=None):
    return trainer.reference.sums(trainer.model if model is None else model, pack_pairs(GROUPS))


CASES = {
    "new": lambda: {"peft_config": lora()},
    "new on the head": lambda: {"peft_config": lora("lm_head", "q_proj")},
    "new, head whole": lambda: {"peft_config": lora(modules_to_save=["lm_head"])},
    "new, tokens": lambda: {"peft_config": lora(trainable_token_indices=[3, 7]), "model": tied()},
    "new, dora": lambda: {"peft_config": lora(use_dora=True)},
    "new, pissa": lambda: {"peft_config": lora(init_lora_weights="pissa")},
    "new, biases": lambda: {"peft_config": lora(bias="all"), "model": make_llama(attention_bias=True)},
    "existing": lambda: {"model": under_way()},
    "existing on the head": lambda: {"model": under_way("lm_head", "q_proj")},
    "existing, head whole": lambda: {"model": under_way(modules_to_save=["lm_head"])},
    "existing of another name": lambda: {"model": under_way(name="model")},
    "untrained PeftModel": lambda: {"model": get_peft_model(make_llama(), lora())},
}
ADAPTERS_OFF = {"new", "new on the head", "new, head whole", "new, tokens", "untrained PeftModel"}


def tied():
    return make_llama(tie_word_embeddings=True)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_where_training_starts_and_stays_there(tmp_path, case, checkpointing):
    trainer = make_trainer(tmp_path, **CASES[case](), gradient_checkpointing=checkpointing)
    assert trainer.reference.mode == ("frozen" if case == "new, biases" else "adapter")
    assert ("ref" in trainer.model.peft_config) == (case not in ADAPTERS_OFF and case != "new, biases")
    start, reference = sums_of(trainer.model), reference_sums(trainer)
    torch.testing.assert_close(reference, start)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(trainer)[1] != pytest.approx(math.log(2), abs=1e-4)
    assert torch.equal(reference_sums(trainer), reference)
    assert not torch.allclose(sums_of(trainer.model), start)


@pytest.mark.parametrize("case", ["new on the head", "existing on the head", "existing, head whole", "new, tokens"])
def test_checkpointing_and_cached_references_change_nothing(tmp_path, case):
    plain = make_trainer(tmp_path, **CASES[case]())
    checkpointed = make_trainer(tmp_path, **CASES[case](), gradient_checkpointing=True)
    reentrant = make_trainer(
        tmp_path,
        **CASES[case](),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    cached = make_trainer(tmp_path, **CASES[case](), reference="cached")
    for trainer in (plain, checkpointed, reentrant, cached):
        trainer.train()
    for trainer in (checkpointed, reentrant, cached):
        assert logged(trainer) == pytest.approx(logged(plain), abs=1e-5)
        assert logged(trainer, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("targets", [("q_proj",), ("lm_head", "q_proj")], ids=["layers", "head"])
def test_a_given_reference_counts_and_not_the_adapters_start(tmp_path, targets):
    reference = make_llama(seed=7)
    trainer = make_trainer(tmp_path, peft_config=lora(*targets), ref_model=copy.deepcopy(reference))
    assert trainer.reference.mode == "frozen"
    torch.testing.assert_close(reference_sums(trainer), sums_of(reference))
    trainer.train()
    assert logged(trainer)[0] != pytest.approx(math.log(2), abs=1e-3)


def test_a_given_reference_with_an_adapter_is_not_mistaken_for_its_base_in_the_cache(tmp_path):
    with_adapter, without = under_way(seed=3), make_llama()
    found = [
        make_trainer(tmp_path, make_llama(seed=2), ref_model=reference, reference="cached").train_dataset["ref_logps"]
        for reference in (without, with_adapter)
    ]
    assert found[0] != found[1]


def test_a_model_that_brings_an_adapter_named_ref_is_compared_with_it(tmp_path):
    under_way(seed=6).save_pretrained(tmp_path / "adapter")
    reference = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    expected = sums_of(reference)
    model = under_way()
    model.load_adapter(tmp_path / "adapter", "ref", is_trainable=True)
    trainer = make_trainer(tmp_path, model)
    assert trainer.reference_reason.startswith("the model with the adapter 'ref' that it brings")
    start = reference_sums(trainer)
    torch.testing.assert_close(start, expected)
    cached = make_trainer(tmp_path, model, reference="cached")
    trainer.train()
    assert torch.equal(reference_sums(trainer), start)
    assert logged(trainer)[0] != pytest.approx(math.log(2), abs=1e-3)
    found = torch.tensor(cached.train_dataset["ref_logps"])
    torch.testing.assert_close(found, logps_of_rows(reference, cached.train_dataset), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"bias": "all"}], ids=str)
def test_a_copy_of_a_model_that_brings_ref_is_a_copy_with_it(tmp_path, settings):
    model = under_way(model=make_llama(attention_bias=True), **settings)
    model.add_adapter("ref", lora())  # does nothing: the reference is the base
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name or (bool(settings) and name.endswith("bias")))
    with model.disable_adapter():
        expected = sums_of(model)
    trainer = make_trainer(tmp_path, model, reference="auto" if settings else "frozen")
    assert trainer.reference.mode == "frozen"
    start = reference_sums(trainer)
    torch.testing.assert_close(start, expected)
    assert trainer.model.active_adapter == "default"
    trainer.train()
    assert torch.equal(reference_sums(trainer), start)


@pytest.mark.parametrize("reference", ["auto", "cached"])
def test_a_second_run_on_one_model_is_compared_with_its_own_start(tmp_path, reference):
    model = under_way()
    make_trainer(tmp_path, model).train()
    second = make_trainer(tmp_path, model, reference=reference)
    second.train()
    assert logged(second)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_of_two_adapters_the_active_one_is_trained(tmp_path):
    model = under_way()
    model.add_adapter("other", lora("q_proj", "down_proj"))
    model.set_adapter("other")
    learned(model, seed=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert changed
    assert all(".other." in name for name in changed)
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_what_the_user_froze_of_an_adapter_stays_frozen(tmp_path):
    model = under_way("q_proj", "v_proj")
    frozen = {}
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
            frozen[name] = parameter.clone()
    make_trainer(tmp_path, model).train()
    now = dict(model.named_parameters())
    assert frozen
    for name, weight in frozen.items():
        assert torch.equal(now[name], weight)
        assert not now[name].requires_grad


def test_a_run_does_not_depend_on_where_its_adapter_was_copied(tmp_path):
    """The order of the rows is that of a run without a copy: copying draws no number that others then miss."""
    torch.manual_seed(3)
    trained = make_trainer(tmp_path, under_way())
    order = [i.tolist() for i in torch.randint(99, (4,))]
    torch.manual_seed(3)
    new = make_trainer(tmp_path, peft_config=lora())
    assert [i.tolist() for i in torch.randint(99, (4,))] == order
    assert ("ref" in trained.model.peft_config, "ref" in new.model.peft_config) == (True, False)


SAVED = {
    "layers": lambda: {"peft_config": lora()},
    "existing": lambda: {"model": under_way()},
    "head": lambda: {"peft_config": lora("lm_head", "q_proj")},
    "head whole": lambda: {"peft_config": lora(modules_to_save=["lm_head"])},
    "tokens": lambda: {"peft_config": lora(trainable_token_indices=[3, 7])},
    "dora": lambda: {"peft_config": lora(use_dora=True)},
}


@pytest.mark.parametrize("case", SAVED)
def test_what_is_saved_is_the_trained_adapter_for_plain_peft(tmp_path, case):
    trainer = make_trainer(tmp_path, **SAVED[case]())
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    assert not (folder / "ref").exists()
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved
    assert not [name for name in saved if ".ref" in name]
    assert ("ref" in trainer.model.peft_config) == (case in ("existing", "dora"))
    loaded = PeftModel.from_pretrained(make_llama(), folder).eval()
    expected = plain_sums(trainer.model.eval()).detach()
    torch.testing.assert_close(plain_sums(loaded).detach(), expected, rtol=1e-6, atol=1e-5)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(plain_sums(merged).detach(), expected, rtol=1e-5, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain_sums(again).detach(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_run_from_an_adapter_resumes_where_it_stopped(tmp_path, name):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, under_way("lm_head", "q_proj", name=name), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, under_way("lm_head", "q_proj", name=name), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert logged(resumed)[2:] == pytest.approx(logged(whole)[2:], abs=1e-6)
    assert not list((tmp_path / "out").glob("checkpoint-*/ref"))


def test_sft_saves_an_adapter_named_ref_as_any_other(tmp_path):
    """It is a reference to DPO alone."""
    model = under_way("q_proj")
    model.add_adapter("ref", lora("v_proj"))
    args = SFTConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    rows = [{"prompt": "the cat ", "completion": "sees"}]
    SFTTrainer(model, args, train_dataset=rows, processing_class=make_tokenizer()).save_model()
    assert (tmp_path / "out" / "ref" / "adapter_model.safetensors").exists()


def test_the_trained_model_merges_in_place(tmp_path):
    trainer = make_trainer(tmp_path, under_way("lm_head", "q_proj"))
    trainer.train()
    expected = sums_of(trainer.model)
    merged = trainer.model.merge_and_unload()
    torch.testing.assert_close(sums_of(merged), expected, rtol=1e-5, atol=1e-4)


def loaded_inside():
    """By transformers itself, which from 5.24 on does so beside PEFT 0.22 only."""
    model = make_llama()
    try:
        model.add_adapter(lora())
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    return model


def merged():
    model = under_way()
    model.merge_adapter()
    return model


def two_active():
    model = under_way()
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    return model


def base_of_a_run():
    base = make_llama()
    get_peft_model(base, lora())
    return base


def frozen_adapter(tmp_path, *others):
    under_way().save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    for name in others:
        model.load_adapter(tmp_path / "adapter", name, is_trainable=True)
    for name, parameter in model.named_parameters():  # of which PEFT before 0.21 makes the active adapter trainable too
        parameter.requires_grad_(any(f".{other}." in name for other in others))
    return model


def mixed():
    return get_peft_model(make_llama(), lora(), mixed=True)


def prompted():
    return get_peft_model(make_llama(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


REFUSED = {
    "both": (lambda _: {"model": under_way(), "peft_config": lora()}, "peft_config must be None.*merge_and_unload"),
    "both, inside": (lambda _: {"model": loaded_inside(), "peft_config": lora()}, "peft_config must be None"),
    "inside": (lambda _: {"model": loaded_inside()}, "model must be a PeftModel.*is_trainable=True"),
    "merged": (lambda _: {"model": merged()}, r"merged.*unmerge_adapter\(\)"),
    "two active": (lambda _: {"model": two_active()}, r"one active adapter.*\['default', 'other'\].*set_adapter"),
    "left inside": (lambda _: {"model": base_of_a_run()}, r"model must be a PeftModel.*unload\(\)"),
    "both, left inside": (lambda _: {"model": base_of_a_run(), "peft_config": lora()}, "peft_config must be None"),
    "frozen": (lambda tmp_path: {"model": frozen_adapter(tmp_path)}, "trainable weights.*is_trainable=True"),
    "frozen but ref": (lambda tmp_path: {"model": frozen_adapter(tmp_path, "ref")}, "trainable weights"),
    "mixed": (lambda _: {"model": mixed()}, "must be a PeftModel.*got PeftMixedModel"),
    "prompt": (lambda _: {"model": prompted()}, "model's adapter must not be PROMPT_TUNING"),
    "named ref": (lambda _: {"model": under_way(name="ref")}, "other than 'ref'"),
    "no config": (lambda _: {"peft_config": {"r": 4}}, "peft_config must be a peft.PeftConfig.*got dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_with_what_to_do(tmp_path, case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **build(tmp_path))


def test_a_frozen_adapter_is_evaluated(tmp_path):
    trainer = DPOTrainer(
        frozen_adapter(tmp_path),
        args=DPOConfig(str(tmp_path / "out"), use_cpu=True, report_to="none"),
        eval_dataset=Dataset.from_list(make_rows(4)),
        processing_class=make_tokenizer(),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_dropout_of_a_lora_config_is_off_unless_dropout_is_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=lora("lm_head", "q_proj", lora_dropout=0.5))
    assert all(m.p == 0.0 for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))
    noisy = make_trainer(tmp_path, peft_config=lora("lm_head", "q_proj", lora_dropout=0.5), disable_dropout=False)
    noisy.train()
    assert any(m.p == 0.5 for m in noisy.model.modules() if isinstance(m, torch.nn.Dropout))
    assert logged(noisy)[0] == pytest.approx(math.log(2), abs=1e-5)  # the product with B = 0 is zero all the same
    assert isinstance(noisy.model, PeftModel)
    assert isinstance(noisy.model.peft_config["default"], LoraConfig)


def saved_adapter(tmp_path, with_tokenizer):
    """A folder with an adapter, as an SFT stage with LoRA leaves it, and the model that it holds."""
    make_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / ("adapter" if with_tokenizer else "base"))
    base = type(make_llama()).from_pretrained(tmp_path / "base")
    model = learned(get_peft_model(base, lora("lm_head", "q_proj")))
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), model


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_folder_of_an_adapter_is_a_model_that_is_trained_on(tmp_path, with_tokenizer):
    folder, model = saved_adapter(tmp_path, with_tokenizer)
    arguments = DPOConfig(str(tmp_path / "out"), use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
    trainer = DPOTrainer(folder, args=arguments, train_dataset=make_rows(4))
    torch.testing.assert_close(sums_of(trainer.model), sums_of(model))
    assert trainer.reference.mode == "adapter"
    trainer.train()
    trainer.save_model()
    again = PeftModel.from_pretrained(make_llama(), tmp_path / "out")
    torch.testing.assert_close(sums_of(again), sums_of(trainer.model))


def test_what_is_precomputed_of_an_adapters_folder_is_found_by_a_run_from_it(tmp_path):
    folder, _ = saved_adapter(tmp_path, True)
    settings = {"reference": "cached", "ref_cache_dir": str(tmp_path / "cache"), "use_cpu": True, "report_to": "none"}
    arguments = DPOConfig(str(tmp_path / "out"), **settings)
    done = precompute_ref_logps(folder, arguments, {"train": Dataset.from_list(make_rows(4))})
    assert done.counts["train"].num_computed == 4
    trainer = DPOTrainer(folder, args=arguments, train_dataset=Dataset.from_list(make_rows(4)))
    assert "0 computed" in trainer.reference_reason or "4 found" in trainer.reference_reason


@pytest.mark.parametrize("reference", ["auto", "cached"])
def test_the_folder_of_an_adapter_is_a_reference(tmp_path, reference):
    folder, model = saved_adapter(tmp_path, True)
    limit = {"ref_max_memory": {"cpu": 10**6}} if reference == "cached" else {}
    trainer = make_trainer(tmp_path, peft_config=lora(), ref_model=folder, reference=reference, **limit)
    expected = logps_of_rows(model, trainer.train_dataset)
    if reference == "cached":
        found = torch.tensor(trainer.train_dataset["ref_logps"])
    else:
        found = logps_of_rows(trainer.reference.model, trainer.train_dataset)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def logps_of_rows(model, dataset):
    """(rows, 2) by the model's own forward."""
    with torch.no_grad():
        return torch.stack([plain_sums(model.eval(), [group_from_columns(row)]) for row in dataset])


@pytest.mark.parametrize("case", ["new on the head", "existing on the head", "existing, head whole", "new, tokens"])
def test_losses_are_those_of_a_plain_loop(tmp_path, case):
    """PEFT's own forward, full logits, the start as a copy, AdamW."""
    settings = {"max_steps": 8, "per_device_train_batch_size": 6, "lr_scheduler_type": "constant", "rows": 6}
    trainer = make_trainer(tmp_path, **CASES[case](), **settings)
    model = copy.deepcopy(trainer.model)
    groups = [group_from_columns(row) for row in trainer.train_dataset]
    trainer.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    start, losses = None, []
    for _ in range(8):
        sums = plain_sums(model, groups).unflatten(0, (-1, 2))
        start = sums.detach() if start is None else start
        chosen, rejected = (sums - start).unbind(1)
        loss = -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) - min(losses) > 0.1
    assert logged(trainer) == pytest.approx(losses, abs=2e-5)
