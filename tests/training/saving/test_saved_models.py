"""Models and adapters as they lie in folders: what their files say is what is trained, or the run does not start."""

import json
import logging
import re
import shutil

import pytest
import torch
from datasets import Dataset
from hybrids import build_any
from safetensors.torch import load_file, save_file
from tiny import make_llama, make_rows, make_tokenizer, save_model
from tiny_runs import logged, losses, make_lora, tiny_trainer

from fastdpo.training.setup.models import load_model

LAYER = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


CHANGES = {
    "missing": (
        lambda weights: {name: weight for name, weight in weights.items() if name != LAYER},
        r"1 missing .*\(model.layers.\*.self_attn.q_proj.weight\)",
    ),
    "no head": (
        lambda weights: {name: weight for name, weight in weights.items() if name != "lm_head.weight"},
        r"1 missing .*\(lm_head.weight\)",
    ),
    "unexpected": (
        lambda weights: {**weights, "v_head.summary.weight": torch.zeros(1, 32)},
        r"1 unexpected .*\(v_head.summary.weight\)",
    ),
    "prefixed": (
        lambda weights: {f"language_model.{name}": weight for name, weight in weights.items()},
        r"21 missing.*21 unexpected.*All names begin with 'language_model.': save the weights without it",
    ),
    "of a wrapper": (
        lambda weights: {f"module.{name}": weight for name, weight in weights.items()},
        r"All names begin with 'module.'",
    ),
    "of another size": (lambda weights: {**weights, LAYER: torch.zeros(3, 3)}, "weights of its config's sizes"),
}


def changed(folder, tmp_path, change):
    copy = shutil.copytree(folder, tmp_path / "changed")
    weights = load_file(copy / "model.safetensors")
    save_file(change(weights), copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_checkpoint_of_other_weights_than_the_models_is_refused_by_their_names(folder, tmp_path, kind):
    change, message = CHANGES[kind]
    path = changed(folder, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path / "out", model=path)
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path / "out", ref_model=path)
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path / "out", ref_model=path, reference="cached")


def test_a_checkpoint_of_the_backbones_names_and_of_old_buffers_is_the_models(folder, tmp_path):
    """What transformers itself understands: names without the base model's prefix, buffers that were saved once."""

    def change(weights):
        old = {name.removeprefix("model."): weight for name, weight in weights.items()}
        return {**old, "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}

    loaded = load_model(changed(folder, tmp_path, change))
    for name, weight in load_model(str(folder)).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_that_are_saved_under_other_names_go_on_from_their_saved_weights(tmp_path, model_type):
    """transformers keeps all experts of a layer in one weight and writes them one by one, as the original has them."""

    def trainer(policy):
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "learning_rate": 1e-2}
        reference = build_any(model_type).double()
        return tiny_trainer(tmp_path / "out", policy.double(), ref_model=reference, **settings)

    whole = trainer(build_any(model_type))
    expected = losses(whole)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    weights = whole.model.state_dict()
    renamed = load_file(checkpoint / "model.safetensors").keys() - weights.keys()
    experts = {found[0] for found in re.finditer(r"experts\.\d\.", " ".join(renamed))}
    assert experts == {f"experts.{i}." for i in range(4)}

    other = build_any(model_type)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)  # what the checkpoint does not replace will show
    resumed = trainer(other)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed) == pytest.approx(expected, rel=1e-6)  # a log entry's numbers are fp32
    assert resumed.model.state_dict().keys() == weights.keys()
    for name, weight in resumed.model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-9, msg=name)


# Adapters that were trained with tokens of their own


def adapter_with_tokens(tmp_path, **settings):
    """The folder of an adapter whose tokenizer has two tokens more than its base model embeds, and its model."""
    from peft import get_peft_model

    base = make_llama(vocab_size=27)
    base.save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer()
    assert len(tokenizer) == 27
    tokenizer.add_tokens(["<think>", "</think>"])
    torch.manual_seed(1)
    base = load_model(str(tmp_path / "base"))
    base.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(base, make_lora(init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), model


ROWS = [{**row, "chosen": f"<think> {row['chosen']} </think>"} for row in make_rows(8)]
KINDS = {
    "head and embedding whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "lora on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "layers": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_with_tokens_of_its_own_is_trained_on(tmp_path, kind):
    path, model = adapter_with_tokens(tmp_path, **KINDS[kind])
    trainer = tiny_trainer(tmp_path / "out", model=path, processing_class=None, train_dataset=Dataset.from_list(ROWS))
    assert trainer.model.get_input_embeddings().weight.shape[0] == 29
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)
    if kind == "head and embedding whole":
        theirs = dict(model.named_parameters())
        loaded = load_model(path)
        saved = [name for name in theirs if "modules_to_save" in name]
        assert saved
        for name in saved:
            assert torch.equal(loaded.get_parameter(name), theirs[name])


@pytest.mark.parametrize("reference", ["frozen", "cached"])
def test_an_adapter_with_tokens_of_its_own_is_a_reference(tmp_path, reference):
    """The model that the folder holds, given as a folder and as a model: the same rewards."""
    path, model = adapter_with_tokens(tmp_path, modules_to_save=["lm_head", "embed_tokens"])
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    rows = Dataset.from_list(ROWS)
    given = {"processing_class": tokenizer, "train_dataset": rows, "eval_dataset": rows, "reference": reference}
    named = tiny_trainer(tmp_path / "a", model=make_llama(vocab_size=29), ref_model=path, **given).evaluate()
    known = tiny_trainer(tmp_path / "b", model=make_llama(vocab_size=29), ref_model=model, **given).evaluate()
    assert abs(known["eval_rewards/chosen"]) > 1e-3
    assert named["eval_rewards/chosen"] == pytest.approx(known["eval_rewards/chosen"], rel=1e-5)


def test_an_adapter_with_tokens_of_its_own_goes_on_from_the_command_line(tmp_path, capsys):
    from fastdpo.cli.main import main

    path, _ = adapter_with_tokens(tmp_path, modules_to_save=["lm_head", "embed_tokens"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    paths = ("--model", path, "--dataset", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out")
    options = ("--max_steps", 1, "--disable_tqdm", "true", "--use_cpu", "true", "--eval_fraction", 0)
    assert main(["train", *map(str, (*paths, *options))]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


# Tokenizers that are a little longer than the embedding


def test_a_tokenizer_one_token_too_long_trains_where_no_row_holds_it(tmp_path, caplog):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    with caplog.at_level(logging.WARNING):
        trainer = tiny_trainer(tmp_path, model=make_llama(vocab_size=27), processing_class=tokenizer)
    assert "The tokenizer has 28 tokens for a model with 27 embeddings" in caplog.text
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    rows = [{**make_rows(1)[0], "chosen": "the <extra> cat"}]
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 27\), the train dataset has 27 in responses"):
        tiny_trainer(tmp_path, model=make_llama(vocab_size=27), processing_class=tokenizer, train_dataset=rows)


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_an_eos_or_pad_that_the_model_does_not_embed_is_refused(tmp_path, name):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({name: "<new>"})
    with pytest.raises(ValueError, match=r"must have its EOS and PAD among the model's embeddings, got 28 tokens"):
        tiny_trainer(tmp_path, model=make_llama(vocab_size=27), processing_class=tokenizer)
