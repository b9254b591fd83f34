"""What would fail at the first save is found before the first step."""

import logging
from pathlib import Path

import pytest
from tiny import make_llama, make_tokenizer
from tiny_runs import make_lora, tiny_trainer
from transformers import GenerationConfig


def refused(trainer, message, monkeypatch):
    monkeypatch.setattr(trainer, "_inner_training_loop", lambda *args, **kwargs: pytest.fail("training began"))
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("flags", [{"temperature": 0.9, "top_p": 0.6}, {"top_k": 10}, {"typical_p": 0.5}], ids=str)
@pytest.mark.parametrize("adapter", [None, make_lora])
def test_flags_of_sampling_without_sampling_are_mended_and_saved(tmp_path, caplog, flags, adapter):
    """As in Vicuna's generation_config.json."""
    model = make_llama()
    for name, value in flags.items():
        setattr(model.generation_config, name, value)
    model.generation_config.do_sample = False
    keywords = {"peft_config": adapter()} if adapter else {}
    trainer = tiny_trainer(tmp_path, model=model, save_strategy="steps", save_steps=1, max_steps=1, **keywords)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "sampling flags without do_sample" in caplog.text
    if adapter is None:
        saved = GenerationConfig.from_pretrained(tmp_path / "checkpoint-1")
        assert saved.do_sample
        assert all(getattr(saved, name) == value for name, value in flags.items())


def test_a_generation_config_that_is_wrong_otherwise_is_refused(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    trainer.model.generation_config.early_stopping = "sometimes"
    refused(trainer, "the model's generation_config must be savable", monkeypatch)


def test_a_config_that_is_no_json_is_refused(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    trainer.model.config.mine = {1, 2}
    refused(trainer, "the model's config must be savable, .*TypeError: .*set", monkeypatch)


def test_a_tokenizer_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    trainer = tiny_trainer(tmp_path, processing_class=tokenizer)

    def broken(*args, **kwargs):
        raise NotImplementedError("no vocabulary file")

    monkeypatch.setattr(tokenizer, "save_pretrained", broken)
    refused(trainer, "processing_class, the tokenizer, .*NotImplementedError: no vocabulary file", monkeypatch)


def test_settings_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    trainer.args.mine = lambda: None
    refused(trainer, "args, the settings, must be savable", monkeypatch)


def test_layers_that_share_a_weight_in_secret_are_refused(tmp_path, monkeypatch):
    model = make_llama()
    first, second = (layer.self_attn.k_proj for layer in model.model.layers)
    second.weight = first.weight
    refused(tiny_trainer(tmp_path, model=model), "the model's weights must be .* shared tensors", monkeypatch)


def test_an_adapter_config_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, peft_config=make_lora())
    trainer.model.peft_config["default"].rank_pattern = {"q_proj": object()}
    refused(trainer, "the config of the adapter 'default' must be savable", monkeypatch)


@pytest.mark.parametrize("adapter", [None, make_lora])
def test_a_run_that_can_be_saved_leaves_nothing_behind_and_begins(tmp_path, monkeypatch, adapter):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    Path(tmp_path, "tmp").mkdir()
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    keywords = {"peft_config": adapter()} if adapter else {}
    trainer = tiny_trainer(tmp_path / "out", **keywords)
    trainer.train()
    assert trainer.state.global_step == 3
    assert list(Path(tmp_path, "tmp").glob("fastdpo_dry_save_*")) == []


def test_embeddings_tied_by_hand_are_saved_as_before(tmp_path):
    model = make_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    trainer = tiny_trainer(tmp_path, model=model)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()
