"""A merged adapter is a plain model with the adapter's logits, also where embedding and head share a weight."""

import json

import pytest
import torch
from peft_cases import learned, lora
from tiny import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.cli.main import main
from fastdpo.training.saving.merge import merge_adapter
from fastdpo.training.setup.models import load_model

IDS = torch.tensor([[1, 5, 9, 20, 3, 17]])


def saved_adapter(path, config, **model_settings):
    """An adapter that has learned something, beside its base model."""
    from peft import get_peft_model

    base = path / "base"
    make_llama(**model_settings).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    model = learned(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    model.save_pretrained(path / "adapter")
    make_tokenizer().save_pretrained(path / "adapter")
    return path / "adapter"


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


CASES = {
    "lora": (lora(), {}),
    "all linear, rank-stabilized": (lora(target_modules="all-linear", use_rslora=True), {}),
    "dora": (lora(use_dora=True), {}),
    "whole head": (lora(modules_to_save=["lm_head"]), {}),
    "tied, lora on the head": (lora("q_proj", "lm_head"), {"tie_word_embeddings": True}),
    "tied, lora on the embedding": (lora("q_proj", "embed_tokens"), {"tie_word_embeddings": True}),
    "tied, whole embedding": (lora(modules_to_save=["embed_tokens"]), {"tie_word_embeddings": True}),
    "tied, lora elsewhere": (lora(), {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_has_the_adapters_logits(tmp_path, case):
    config, settings = CASES[case]
    adapter = saved_adapter(tmp_path, config, **settings)
    expected = logits(load_model(str(adapter)))
    done = merge_adapter(str(adapter), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))).abs().max() > 0.1
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(make_tokenizer())
    assert done.effect > 100 * done.error


def test_only_an_adapter_on_a_shared_weight_parts_it(tmp_path):
    for case, parts in (("tied, lora on the head", True), ("tied, lora elsewhere", False)):
        config, settings = CASES[case]
        folder = tmp_path / str(parts)
        done = merge_adapter(str(saved_adapter(folder, config, **settings)), folder / "merged")
        assert done.untied == parts
        assert json.loads((folder / "merged" / "config.json").read_text())["tie_word_embeddings"] != parts


def test_a_merge_that_is_not_exact_leaves_nothing_behind(tmp_path, monkeypatch):
    from peft import LoraModel

    adapter = saved_adapter(tmp_path, lora())
    merge = LoraModel.merge_and_unload

    def wrong(self, *args, **kwargs):
        merged = merge(self, *args, **kwargs)
        with torch.no_grad():
            merged.lm_head.weight.mul_(1.5)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(ValueError, match="must have the adapter's logits, got a difference of"):
        merge_adapter(str(adapter), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_command_says_how_exact_it_is(tmp_path, capsys):
    adapter = saved_adapter(tmp_path, lora(), vocab_size=64)
    assert main(["merge", str(adapter), "-o", str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0
    assert "logits differ by at most" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(("which", "word"), [("base", "adapter_config.json"), ("missing", "which does not exist")])
def test_what_is_no_adapter_is_refused(tmp_path, capsys, which, word):
    saved_adapter(tmp_path, lora())
    assert main(["merge", str(tmp_path / which), "-o", str(tmp_path / "merged")]) == 2
    assert word in capsys.readouterr().err


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path, capsys):
    adapter = saved_adapter(tmp_path, lora())
    assert main(["merge", str(adapter), "-o", str(tmp_path / "base")]) == 2
    assert f"output must be a new or an empty folder, got {tmp_path / 'base'}" in capsys.readouterr().err
