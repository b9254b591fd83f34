"""The memory of a run that has not started agrees with the estimate that its trainer makes with the model in memory."""

import copy

import pytest
import torch
from datasets import Dataset
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import make_lora, tiny_config, tiny_trainer

from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.training.memory.estimate import CUDA_BYTES, MIB, estimate_peak_memory, planned_impl
from fastdpo.training.memory.planned import PlannedRun, estimate_planned_run


def planned(tmp_path, *, num_rows=16, peft_config=None, on_gpu=False, memory=None, bits=None, shape=None, **settings):
    args, tokenizer = tiny_config(tmp_path, **settings), make_tokenizer()
    train, _ = prepare_preference_dataset(
        Dataset.from_list(make_rows(num_rows)), tokenizer, args.tokenization_settings()
    )
    config = make_llama().config
    config.update(shape or {})
    run = PlannedRun(args, config, tokenizer, train, peft_config=copy.copy(peft_config), bits=bits)
    return estimate_planned_run(run, on_gpu=on_gpu, memory=memory)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
        {"reference": "cached"},
        {"reference_free": True},
        {"packing": "padded"},
        {"max_tokens_per_microbatch": 40},
        {"bf16": True, "gradient_checkpointing": True},
        {"peft_config": make_lora()},
        {"peft_config": make_lora(modules_to_save=["lm_head"])},
        {"model_init_kwargs": {"dtype": "bfloat16"}},
    ],
    ids=lambda settings: ", ".join(settings) or "full",
)
def test_a_plan_and_its_trainer_agree_to_a_percent(tmp_path, settings):
    of_plan = {**settings}
    model = make_llama()
    if "model_init_kwargs" in settings:
        model.to(torch.bfloat16)
        settings = {}
    expected = estimate_peak_memory(tiny_trainer(tmp_path, model, **settings))
    assert planned(tmp_path, **of_plan).parts() == pytest.approx(expected.parts(), rel=0.01)


def test_a_plan_for_a_gpu_counts_cuda_and_fewer_bits(tmp_path):
    plain = planned(tmp_path, on_gpu=True, bf16=True, peft_config=make_lora())
    small = planned(tmp_path, on_gpu=True, bf16=True, peft_config=make_lora(), bits=4)
    assert plain.overhead == small.overhead == CUDA_BYTES
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)  # q, o; k, v; the MLP: of two layers
    others = 2 * 32 * 32 + 5 * 32  # embedding, head, norms
    lora = sum(4 * (32 + out) * 4 for out in (32, 16)) * 2  # q_proj, v_proj in fp32
    inverse_frequencies = plain.weights - 4 * (linear + others) - lora
    assert 0 <= inverse_frequencies <= 64
    assert small.weights == pytest.approx(linear * (0.5 + 4 / 64) + 4 * others + lora + inverse_frequencies, rel=0.02)
    assert small.total < plain.total


@pytest.mark.skipif(planned_impl() != "triton", reason="only the kernels' workspace grows")
def test_the_workspace_of_a_trained_head_is_what_the_gpu_has_left(tmp_path):
    """300,000 x 1,024 weights: half of dW's fp32 sums are 586 MiB."""
    settings = {"on_gpu": True, "bf16": True, "reference_free": True, "per_device_train_batch_size": 128}
    settings |= {"num_rows": 128, "shape": {"vocab_size": 300_000, "hidden_size": 1024}}
    unlimited = planned(tmp_path, **settings)
    assert planned(tmp_path, **settings, memory=2 * unlimited.total) == unlimited
    least = planned(tmp_path, **settings, workspace_bytes=256 * MIB)
    assert unlimited.head - least.head > 200 * MIB
    assert planned(tmp_path, **settings, memory=unlimited.total - 300 * MIB) == least
    fixed = planned(tmp_path, **settings, memory=2 * unlimited.total, workspace_bytes=256 * MIB)
    assert fixed == least
