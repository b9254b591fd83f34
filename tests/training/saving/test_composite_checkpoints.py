"""Checkpoints that can also see, trained on text: what is trained, what stays, and that what is saved loads where the
original loads.
"""

import json

import pytest
import torch
from composites import TEXT, TOWERS, make_composite
from datasets import Dataset
from safetensors import safe_open
from tiny import make_rows, make_tokenizer
from tiny_runs import losses, make_lora, tiny_trainer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from fastdpo.training.setup.models import learned_positions, load_model

KINDS = ["gemma3", "gemma4", "mistral3", "llava", "qwen2_5_vl", "llama4"]


def saved_folder(tmp_path, model_type):
    path = tmp_path / "original"
    model = make_composite(model_type)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "SomeImageProcessor"}))
    return path, model


def keys(folder):
    return {key for file in folder.glob("*.safetensors") for key in safe_open(file, framework="pt").keys()}  # noqa: SIM118


def moved(before, after, names):
    after = dict(after.named_parameters())
    return [name for name in names if not torch.equal(before.get_parameter(name), after[name])]


@pytest.mark.parametrize("model_type", KINDS)
def test_a_folder_trains_its_text_and_saves_what_the_original_was(tmp_path, model_type):
    path, original = saved_folder(tmp_path, model_type)
    trainer = tiny_trainer(tmp_path / "out", model=str(path), processing_class=None, weight_decay=0.1)
    assert type(trainer.model) is type(original)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    trainer.save_model()

    towers = [name for name, _ in original.named_parameters() if name.startswith(tuple(TOWERS[model_type]))]
    text = [name for name, _ in original.named_parameters() if name not in towers]
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name in towers:
        assert id(trainer.model.get_parameter(name)) not in optimized
        assert trainer.model.get_parameter(name).grad is None
    saved = tmp_path / "out"
    assert keys(saved) == keys(path)
    loaded, info = type(original).from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert moved(original, loaded, towers) == []
    assert len(moved(original, loaded, text)) > len(text) / 2
    assert (saved / "preprocessor_config.json").read_bytes() == (path / "preprocessor_config.json").read_bytes()
    assert (saved / "tokenizer.json").is_file()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (path, saved)]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    assert configs[0]["model_type"] == configs[1]["model_type"] == model_type


def test_a_text_only_class_is_saved_as_the_whole_that_it_came_from(tmp_path):
    """Qwen3.5: transformers loads its folders as text alone; both classes take back what is saved."""
    path, original = saved_folder(tmp_path, "qwen3_5")
    trainer = tiny_trainer(tmp_path / "out", model=str(path), processing_class=None)
    assert type(trainer.model).__name__ == "Qwen3_5ForCausalLM"
    losses(trainer)
    trainer.save_model()
    saved = tmp_path / "out"
    assert keys(saved) == keys(path)
    text, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert type(text) is type(trainer.model)
    assert not info["missing_keys"]
    assert all(torch.equal(a, b) for a, b in zip(text.parameters(), trainer.model.parameters(), strict=True))
    whole, info = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert type(whole) is type(original)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    towers = [name for name, _ in original.named_parameters() if name.startswith("model.visual")]
    assert towers
    assert moved(original, whole, towers) == []
    assert torch.equal(whole.lm_head.weight, trainer.model.lm_head.weight)
    assert not torch.equal(whole.lm_head.weight, original.lm_head.weight)
    assert (saved / "preprocessor_config.json").is_file()


def test_a_merged_adapter_is_saved_as_the_whole_that_its_base_came_from(tmp_path):
    path, _ = saved_folder(tmp_path, "qwen3_5")
    trainer = tiny_trainer(tmp_path / "out", model=str(path), processing_class=None, peft_config=make_lora())
    trainer.train()
    trainer.model = trainer.model.merge_and_unload()
    trainer.save_model()
    assert keys(tmp_path / "out") == keys(path)


def test_weights_in_several_files_are_completed_too(tmp_path):
    from fastdpo.training.setup.source_files import add_other_parts, other_parts

    path, original = saved_folder(tmp_path, "qwen3_5")
    model = load_model(str(path))
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    add_other_parts(model, other_parts(model, str(path), {}), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), original.parameters(), strict=True))


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_5"])
def test_a_run_that_was_interrupted_ends_in_the_weights_of_one_that_was_not(tmp_path, model_type):
    """The names that such a checkpoint has are not those of the model's modules."""
    path, _ = saved_folder(tmp_path, model_type)
    settings = {"model": str(path), "processing_class": None, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = tiny_trainer(tmp_path / "out", **settings)
    whole.train()
    resumed = tiny_trainer(tmp_path / "out", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(q_proj|qkv)"])
@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "qwen2_5_vl", "llama4", "qwen3_5"])
def test_lora_is_on_the_decoder_alone(tmp_path, model_type, targets):
    from peft import PeftModel

    path, original = saved_folder(tmp_path, model_type)
    lora = make_lora(target_modules=targets)
    trainer = tiny_trainer(tmp_path / "out", original, peft_config=lora)
    assert lora.exclude_modules is None
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert not [name for name in trained if any(f".{tower}." in name for tower in TOWERS[model_type])]
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    trainer.save_model()
    again = PeftModel.from_pretrained(type(original).from_pretrained(path), tmp_path / "out")
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in again.state_dict().items())


def test_modules_that_the_user_leaves_out_stay_out(tmp_path):
    for given in (["q_proj"], r".*\.q_proj"):
        lora = make_lora(target_modules="all-linear", exclude_modules=given)
        trainer = tiny_trainer(tmp_path / "out", make_composite("mistral3"), peft_config=lora)
        trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        assert any("v_proj" in name for name in trained)
        assert not [name for name in trained if "q_proj" in name or "vision" in name or "projector" in name]


def test_an_adapter_that_cannot_leave_towers_out_is_refused(tmp_path):
    from peft import VeraConfig

    adapter = VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"exclude_modules .*got VERA: use LoRA"):
        tiny_trainer(tmp_path, make_composite("gemma3"), peft_config=adapter)


@pytest.mark.parametrize(("model_type", "left_out"), [("llama4_text", ["router"]), ("falcon", []), ("llama", [])])
def test_all_linear_is_every_layer_that_is_a_product(model_type, left_out):
    """Llama 4's router is linear by its class and gives two results; Falcon's layers have a forward of their own."""
    from peft import get_peft_model
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from fastdpo.training.setup.adapter_targets import on_text_layers

    sizes = {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2}
    if model_type == "falcon":
        sizes = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes))
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    adapted = get_peft_model(model, on_text_layers(model, make_lora(target_modules="all-linear")))
    reached = {name for name in linear if hasattr(adapted.get_base_model().get_submodule(name), "lora_A")}
    assert {name.split(".")[-1] for name in linear - reached} == set(left_out)
    assert len(reached) >= 8


def test_a_whole_gemma_3_folder_is_never_loaded_with_random_weights(tmp_path):
    """Its text-only class does not know its names, and only a load report would say so."""
    path, original = saved_folder(tmp_path, "gemma3")
    loaded = load_model(str(path))
    assert type(loaded) is type(original)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))


def test_a_text_only_class_that_would_lose_weights_gives_way_to_the_whole(tmp_path):
    """Llama 4: AutoModelForCausalLM takes the text out and leaves the rest, under other names."""
    path, original = saved_folder(tmp_path, "llama4")
    assert type(AutoModelForCausalLM.from_pretrained(path)).__name__ == "Llama4ForCausalLM"
    assert type(load_model(str(path))) is type(original)


def test_missing_weights_of_a_tower_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    path, _ = saved_folder(tmp_path, "gemma3")
    weights = load_file(path / "model.safetensors")
    lost = next(name for name in weights if "multi_modal_projector" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing .*multi_modal_projector"):
        load_model(str(path))


@pytest.mark.parametrize("model_type", ["gemma3", "llava"])
def test_the_table_of_a_towers_positions_is_not_the_texts(model_type):
    model = make_composite(model_type)
    assert any("position" in name for name, _ in model.named_modules())
    assert learned_positions(model) is None


@pytest.mark.parametrize("reference", ["frozen", "cached"])
def test_a_reference_of_such_a_folder_is_that_model(tmp_path, reference):
    path, original = saved_folder(tmp_path, "gemma3")
    rows = Dataset.from_list(make_rows(8))
    given = {"train_dataset": rows, "eval_dataset": rows, "reference": reference}
    named = tiny_trainer(tmp_path / "a", make_composite("mistral3"), ref_model=str(path), **given).evaluate()
    known = tiny_trainer(tmp_path / "b", make_composite("mistral3"), ref_model=original, **given).evaluate()
    assert abs(known["eval_rewards/chosen"]) > 1e-3
    assert named["eval_rewards/chosen"] == pytest.approx(known["eval_rewards/chosen"], rel=1e-5)


def test_micro_batches_checkpointing_and_a_cached_reference_give_the_plain_runs_losses(tmp_path):
    plain = losses(tiny_trainer(tmp_path / "a", make_composite("gemma3", 0.0)))
    settings = {"max_tokens_per_microbatch": 60, "gradient_checkpointing": True, "reference": "cached"}
    other = losses(tiny_trainer(tmp_path / "b", make_composite("gemma3", 0.0), **settings))
    assert other == pytest.approx(plain, rel=1e-4)


def test_samples_summary_and_card_of_a_composite(tmp_path):
    path, _ = saved_folder(tmp_path, "mistral3")
    rows = Dataset.from_list(make_rows(8))
    samples = {"num_eval_samples": 2, "eval_sample_tokens": 3, "eval_strategy": "steps", "eval_steps": 2}
    trainer = tiny_trainer(tmp_path / "out", model=str(path), eval_dataset=rows, **samples)
    summary = trainer.summary()
    decoder = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"{decoder:,} trained" in summary
    assert "model.vision_tower, model.multi_modal_projector not trained" in summary
    assert "about " in summary.partition("peak memory")[2]
    losses(trainer)
    assert (tmp_path / "out" / "fastdpo_samples.jsonl").read_text().count("\n") >= 4
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "from transformers import AutoModelForImageTextToText, AutoProcessor" in card


def test_an_adapters_card_loads_the_base_that_it_is_on(tmp_path):
    trainer = tiny_trainer(tmp_path, make_composite("mistral3"), peft_config=make_lora(target_modules="all-linear"))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(" in card


# Processors


def make_processor():
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = make_tokenizer(chat_template=None)
    tokenizer.image_token = "<unk>"
    return LlavaProcessor(CLIPImageProcessorPil(), tokenizer, chat_template=make_tokenizer().chat_template)


def test_a_processor_brings_its_tokenizer_and_is_saved_beside_it(tmp_path):
    processor = make_processor()
    trainer = tiny_trainer(tmp_path / "out", make_composite("llava"), processing_class=processor)
    assert trainer.processing_class is processor.tokenizer
    assert trainer.processing_class.chat_template == make_tokenizer().chat_template
    losses(trainer)
    trainer.save_model()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "processor_config.json"} <= names


def test_a_chat_template_that_lies_with_the_processor_is_the_tokenizers(tmp_path):
    path, _ = saved_folder(tmp_path, "llava")
    make_tokenizer(chat_template=None).save_pretrained(path)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    (path / "chat_template.json").write_text(json.dumps({"chat_template": make_tokenizer().chat_template}))
    trainer = tiny_trainer(tmp_path / "out", model=str(path), processing_class=None)
    assert trainer.processing_class.chat_template == make_tokenizer().chat_template
