"""QLoRA: a 4-bit base under an adapter trains, is saved and is loaded again. Runs where bitsandbytes is installed."""

import math

import pytest
import torch
from datasets import Dataset
from peers import peer
from peft import PeftModel
from peft_cases import GROUPS, lora, plain_sums
from tiny import make_llama, make_rows, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import fastdpo
from fastdpo import DPOConfig, DPOTrainer, pack_pairs, packed_logps
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.training.callbacks.model_card import training_facts
from fastdpo.training.callbacks.summary import summary_lines
from fastdpo.training.memory.estimate import estimate_peak_memory
from fastdpo.training.memory.planned import PlannedRun, estimate_planned_run

CASES = {
    "layers": lambda: lora(),
    "head": lambda: lora("q_proj", "lm_head"),
    "head whole": lambda: lora("q_proj", modules_to_save=["lm_head"]),
    "dora": lambda: lora("q_proj", use_dora=True),
}


@pytest.fixture
def base(tmp_path):
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def four_bits(compute="float32"):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def make_trainer(tmp_path, base, peft_config, *, rows=None, quantization_config=None, **settings):
    defaults = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "beta": 0.5, "report_to": "none"}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "ref_cache_dir": str(tmp_path / "cache")}
    return DPOTrainer(
        base,
        args=DPOConfig(str(tmp_path / "out"), **{**defaults, **settings}),
        train_dataset=Dataset.from_list(make_rows(8) if rows is None else rows),
        quantization_config=four_bits() if quantization_config is None else quantization_config,
        peft_config=peft_config,
    )


@pytest.fixture
def bitsandbytes(monkeypatch):
    """On CPUs with bf16 instructions it repacks weights in the first forward without gradient, and has no backward of
    those; training on a CPU needs them as they were. Releases before 0.49 never do."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"reference": "cached"}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_4_bit_base_trains_under_an_adapter(tmp_path, base, bitsandbytes, case, settings):
    trainer = make_trainer(tmp_path, base, CASES[case](), **settings)
    assert trainer.reference.mode == settings.get("reference", "adapter")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < math.log(2) - 1e-4
    with torch.no_grad():
        expected = plain_sums(trainer.model.eval())
        torch.testing.assert_close(packed_logps(trainer.model, pack_pairs(GROUPS)).sequences.sums, expected)
        trainer.save_model()
        again = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bits(), dtype=torch.float32)
        again = PeftModel.from_pretrained(again, tmp_path / "out").eval()
        torch.testing.assert_close(plain_sums(again), expected)


def test_an_adapter_on_4_bits_trains_in_fp32_and_trls_in_bf16(tmp_path, base, bitsandbytes):
    found = {}
    for name, package in (("ours", fastdpo), ("trl", peer("trl"))):
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bits(), dtype=torch.bfloat16)
        args = package.DPOConfig(str(tmp_path / name), use_cpu=True, bf16=False, max_steps=1, report_to="none")
        data = {"train_dataset": Dataset.from_list(make_rows(8)), "processing_class": make_tokenizer()}
        trainer = package.DPOTrainer(model, args=args, peft_config=lora(), **data)
        trainer.train()
        found[name] = {weights.dtype for weights in trainer.model.parameters() if weights.requires_grad}
    assert found == {"ours": {torch.float32}, "trl": {torch.bfloat16}}


def first_gradient_norm(tmp_path, base, *, asked_before):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bits(), dtype=torch.float32)
    if asked_before:
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([[3, 4, 5, 6]]))
    args = DPOConfig(str(tmp_path / "out"), use_cpu=True, max_steps=1, logging_steps=1, seed=1, report_to="none")
    rows, tokenizer = Dataset.from_list(make_rows(8)), make_tokenizer()
    trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora())
    trainer.train()
    return next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)


@pytest.mark.parametrize("asked_before", [False, True])
def test_no_gradient_is_lost_where_bitsandbytes_repacks_weights(tmp_path, base, monkeypatch, asked_before):
    """It does so on CPUs with bf16 instructions, at a forward in eval mode: that of the self-check, or an earlier one,
    which has then rounded the scales of the weights to bf16."""
    pytest.importorskip("bitsandbytes")
    found, tolerance = first_gradient_norm(tmp_path, base, asked_before=asked_before), 0.05 if asked_before else 1e-5
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)
    assert found == pytest.approx(first_gradient_norm(tmp_path, base, asked_before=False), rel=tolerance)


def test_a_4_bit_base_without_an_adapter_is_refused(tmp_path, base, bitsandbytes):
    with pytest.raises(ValueError, match="purely quantized"):
        make_trainer(tmp_path, base, None)


DTYPES = {  # of the rest of the model, and of the products, as the commands choose it
    "none asked for": ({}, "bfloat16"),
    "float32": ({"dtype": "float32"}, "float32"),
    "bfloat16": ({"dtype": "bfloat16"}, "bfloat16"),
}


def step_bytes(trainer):
    """Bytes beyond weights, reference and optimizer state, as measured and as estimated."""
    found = estimate_peak_memory(trainer)
    trainer.train()
    inputs = next(iter(trainer.get_train_dataloader()))

    def step():
        trainer.model.zero_grad()
        trainer.training_step(trainer.model, inputs, 4)

    return peak_live_bytes(step), found.total - found.weights - found.reference - found.optimizer


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_on_a_quantized_base_takes_what_was_estimated(tmp_path, bitsandbytes, dtype, bits, bf16):
    """Results of quantized layers have the dtype of their input, that of the rest of the model, under autocast too."""
    base, (kwargs, compute) = str(tmp_path / "wide"), DTYPES[dtype]
    make_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=3).save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    row = {"prompt_ids": [5] * 150, "chosen_ids": [6] * 80, "rejected_ids": [7] * 80}
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "max_length": None, "bf16": bf16}
    config = four_bits(compute) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    more = {"rows": [row] * 4, "quantization_config": config, "model_init_kwargs": kwargs}
    measured, estimated = step_bytes(make_trainer(tmp_path, base, lora(), **more, **settings))
    assert estimated == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_of_a_4_bit_base_is_the_estimate_of_its_trainer(tmp_path, base, bitsandbytes, dtype):
    kwargs, compute = DTYPES[dtype]
    settings = {"bf16": True, "model_init_kwargs": kwargs, "quantization_config": four_bits(compute)}
    trainer = make_trainer(tmp_path, base, lora(), **settings)
    config = AutoConfig.from_pretrained(base)
    run = PlannedRun(trainer.args, config, make_tokenizer(), trainer.train_dataset, peft_config=lora(), bits=4)
    expected = estimate_peak_memory(trainer).parts()
    assert estimate_planned_run(run, on_gpu=False).parts() == pytest.approx(expected, rel=0.02, abs=8)


def test_without_bitsandbytes_the_error_says_what_is_missing(tmp_path, base, monkeypatch):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a package that is not installed.*bitsandbytes"):
        make_trainer(tmp_path, base, lora())


def test_the_run_counts_weights_and_not_the_bytes_that_hold_them(tmp_path, base, bitsandbytes):
    trainer = make_trainer(tmp_path, base, lora())
    full = make_llama(hidden_size=64, intermediate_size=128).num_parameters()
    num_trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    facts = dict(training_facts(trainer))
    assert facts["trained parameters"] == f"{num_trained:,} of {full + num_trained:,}"
    assert f"{full + num_trained:,} parameters ({num_trained:,} trained)" in dict(summary_lines(trainer))["model"]
