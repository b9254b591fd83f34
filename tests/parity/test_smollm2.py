"""A real pretrained model, SmolLM2-135M-Instruct: trained in every way beside TRL, saved, loaded and asked."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peers import peer
from pretrained import needs_smollm2
from side_by_side import logged, trained

import fastdpo
from fastdpo.alignment.chat import Talker
from fastdpo.evidence.bench.steps.workloads import WORKLOADS, make_rows, pretrained_folder
from fastdpo.training.setup.models import load_model, load_tokenizer

SETTINGS = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-5, "beta": 0.1}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def folder():
    return pretrained_folder()


def pairs(num_rows=8):
    """Instructions with two answers each, as messages: of the instruction file where it is there, else reviews."""

    def message(role, text):
        return [{"role": role, "content": text.strip()}]

    return Dataset.from_list(
        [
            {
                "prompt": message("user", row["prompt"]),
                **{side: message("assistant", row[side]) for side in ("chosen", "rejected")},
            }
            for row in make_rows(WORKLOADS["SmolLM2 short"], num_rows)
        ]
    )


def lora():
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def in_4_bits(folder):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def with_rounded_adapters(package):
    """The package, its adapters rounded to bf16 and trained in fp32. TRL trains those on 4 bits in bf16."""

    class Trainer(package.DPOTrainer):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            for weights in self.model.parameters():
                if weights.requires_grad:
                    weights.data = weights.data.bfloat16().float()

    return SimpleNamespace(DPOConfig=package.DPOConfig, DPOTrainer=Trainer)


# way -> the model from its folder, a new adapter, and settings
WAYS = {
    "full": (str, None, {}),
    "full, cached reference": (str, None, {"precompute_ref_log_probs": True}),
    "LoRA": (str, lora, {"learning_rate": 1e-3}),
    "LoRA on 4 bits": (in_4_bits, lora, {"learning_rate": 1e-3}),
}


@needs_smollm2
@pytest.mark.parametrize("way", WAYS)
def test_four_steps_log_what_trl_logs(way, folder, tmp_path):
    """Every number that TRL logs, to 1e-4 relative to one more than its size."""
    start, adapter, settings = WAYS[way]
    both = {}
    for name, package, own in (
        ("ours", fastdpo, {"packing": "packed", "ref_cache_dir": str(tmp_path / "cache")}),
        ("trl", peer("trl"), {}),
    ):
        keywords = {}
        if adapter is not None:
            keywords, package = {"peft_config": adapter()}, with_rounded_adapters(package)
        arguments = {**SETTINGS, **settings, **own}
        tokenizer = load_tokenizer(folder, {})
        both[name] = logged(
            trained(package, tmp_path / name, start(folder), tokenizer, keywords, arguments, dataset=pairs())
        )
    assert len(both["ours"]) == len(both["trl"]) == 4
    assert both["ours"][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(both["trl"][-1]["rewards/margins"]) > 1e-3
    for step, (own, other) in enumerate(zip(both["ours"], both["trl"], strict=True)):
        assert {"loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy"} <= other.keys() & own.keys()
        wrong = {
            key: (own[key], value)
            for key, value in other.items()
            if not abs(own[key] - value) <= 1e-4 * (1 + abs(value))
        }
        assert not wrong, f"step {step}, ours and TRL's: {wrong}"


@needs_smollm2
@pytest.mark.parametrize("adapter", [None, lora], ids=["full", "LoRA"])
def test_it_answers_before_and_after_training_and_when_it_is_loaded_again(adapter, folder, tmp_path):
    def answer(model):
        return Talker(model, load_tokenizer(folder, {}), max_new_tokens=16, temperature=0).reply(QUESTION)

    assert "Paris" in answer(load_model(folder, {}))
    keywords = {} if adapter is None else {"peft_config": adapter()}
    rate = {"learning_rate": 1e-5 if adapter is None else 1e-4}
    trainer = trained(fastdpo, tmp_path / "out", folder, load_tokenizer(folder, {}), keywords, SETTINGS | rate, pairs())
    trainer.save_model()
    after = answer(trainer.model)
    assert "Paris" in after  # four small steps leave it what it knows
    loaded = load_model(str(tmp_path / "out"), {})
    assert answer(loaded) == after
    ids = load_tokenizer(folder, {}).apply_chat_template(QUESTION, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (loaded, trainer.model.eval(), load_model(folder, {}))]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 1e-3  # and the training arrived in the file
