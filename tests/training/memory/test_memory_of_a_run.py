"""The estimate of a run's peak takes the moment when most is held, be that a step, an evaluation or the reference."""

import pytest
import torch
from accelerate.utils import DistributedType
from test_memory_estimate import MODELS, make_batch, make_model
from tiny import make_llama, make_rows, make_tokenizer

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling import packed_logps
from fastdpo.training.callbacks.summary import summary_lines
from fastdpo.training.memory import estimate as memory
from fastdpo.training.memory.dry_run import RowShape, dry_step, fake_mode, shape_only
from fastdpo.training.memory.estimate import MIB, enable_checkpointing, estimate_peak_memory, model_bytes
from fastdpo.training.memory.largest_batch import largest_microbatch
from fastdpo.training.setup.optimizers import optimizer_state_bytes
from fastdpo.types import PackedBatch

WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}


def make_trainer(tmp_path, *, ref_model=None, eval_dataset=None, **settings):
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, **settings}
    args = DPOConfig(str(tmp_path), save_strategy="no", max_steps=1, **settings)
    data = {"train_dataset": make_rows(60), "eval_dataset": eval_dataset, "processing_class": make_tokenizer()}
    return DPOTrainer(make_llama(**WIDE), ref_model, args, **data)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_forward_that_keeps_nothing_takes_what_was_estimated(autocast):
    model, batch = make_model("small", lora=False, checkpointing=False).eval(), make_batch(6, 60, 40, 1000)

    def forward():
        with torch.no_grad(), torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            return packed_logps(model, batch).sequences.sums

    mode = fake_mode()
    row = RowShape(batch.segments, len(batch.labels))
    settings = {"impl": "tiled", "varlen": False, "autocast": autocast, "with_grad": False}
    estimated = dry_step(shape_only(model, mode), row, mode, **settings)
    assert estimated.gradients == 0
    assert estimated.total == pytest.approx(peak_live_bytes(forward), rel=0.15)


def test_an_evaluation_of_more_rows_than_a_step_counts(tmp_path):
    settings = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 60, "gradient_checkpointing": True}
    settings |= {"reference_free": True, "optim": "sgd"}
    without = estimate_peak_memory(make_trainer(tmp_path, **settings))
    trainer = make_trainer(tmp_path, eval_dataset=make_rows(60), **settings)
    estimate = estimate_peak_memory(trainer)
    assert estimate.total > 1.05 * without.total
    assert estimate.gradients == 0  # none is left when evaluation begins
    measured = peak_live_bytes(lambda: trainer.evaluate() and None)
    assert estimate.total - estimate.weights == pytest.approx(measured, rel=0.15)


def test_a_reference_larger_than_the_policy_counts_with_its_own_activations(tmp_path):
    large = make_llama(hidden_size=512, intermediate_size=8192, num_hidden_layers=1, seed=3)
    trainer = make_trainer(tmp_path, ref_model=large, per_device_train_batch_size=32, gradient_checkpointing=True)
    estimate = estimate_peak_memory(trainer)
    assert estimate.reference == model_bytes(large)
    inputs = PackedBatch(**next(iter(trainer.get_train_dataloader())))
    measured = peak_live_bytes(lambda: trainer.reference.sums(trainer.model, inputs))
    assert estimate.activations + estimate.head == pytest.approx(measured, rel=0.3)  # the batch is not the largest one
    assert estimate.gradients == 0


def test_offloaded_checkpoints_take_no_memory_of_the_device():
    batch = make_batch(2, 300, 150, 1000)
    row, activations = RowShape(batch.segments, len(batch.labels)), []
    for kwargs in ({}, {"offload": True}):
        model, mode = make_model("small", lora=True, checkpointing=False, num_hidden_layers=6), fake_mode()
        dry = shape_only(model, mode)
        enable_checkpointing(dry, kwargs)
        activations.append(dry_step(dry, row, mode, impl="tiled", varlen=False).activations)
    num_bytes = 4 * row.num_tokens * MODELS["small"]["hidden_size"]  # of one layer's input
    saved = activations[0] - activations[1]
    assert saved == pytest.approx(5 * num_bytes, abs=2 * num_bytes)
    assert saved > 0


def test_steps_of_rows_of_similar_length_have_one_of_the_longest_rows(tmp_path):
    settings = {"reference_free": True, "per_device_train_batch_size": 6}
    bucketed = largest_microbatch(make_trainer(tmp_path, length_bucketing=True, **settings)).num_tokens
    shuffled = largest_microbatch(make_trainer(tmp_path, **settings)).num_tokens
    trainer = make_trainer(tmp_path, length_bucketing=True, **settings)
    found = max(inputs["input_ids"].numel() for inputs in trainer.get_train_dataloader())
    assert shuffled < found <= bucketed


def test_a_budget_that_is_measured_later_is_not_estimated_now(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, reference_free=True, max_tokens_per_microbatch="auto")
    assert "grow" not in dict(summary_lines(trainer))["peak memory"]  # on a CPU there is no limit
    whole = largest_microbatch(trainer).num_tokens
    for module in ("memory.estimate", "callbacks.summary", "memory.largest_batch"):
        monkeypatch.setattr(f"fastdpo.training.{module}.is_measured_later", lambda trainer: True)
    text = dict(summary_lines(trainer))["peak memory"]
    assert text.startswith("micro-batches fill the memory that is free at the start; the longest row alone takes about")
    assert largest_microbatch(trainer).num_tokens < whole


def test_ddp_keeps_gradients_twice(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, reference_free=True)
    alone = estimate_peak_memory(trainer)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.MULTI_GPU)
    gradients = sum(4 * p.numel() for p in trainer.model.parameters())
    assert estimate_peak_memory(trainer).gradients - alone.gradients == gradients


def test_cudas_own_memory_is_told_apart_from_what_pytorch_counts(tmp_path):
    estimate = memory.replace(estimate_peak_memory(make_trainer(tmp_path)), overhead=640 * MIB)
    assert estimate.total - estimate.allocated == 640 * MIB
    assert str(estimate).startswith(f"about {estimate.allocated / MIB:,.0f} MiB (an estimate): ")
    assert str(estimate).endswith("; CUDA itself takes some 640 on top")


class Scales:
    """The quantization state of bitsandbytes, with the scales quantized too."""

    def __init__(self, num_scales, state2=None):
        self.absmax = torch.zeros(num_scales, dtype=torch.uint8 if state2 else torch.float32)
        self.state2 = state2


def test_scales_of_4_bit_weights_count():
    model = make_llama()
    before = model_bytes(model)
    model.lm_head.weight.quant_state = Scales(64, Scales(4))
    assert model_bytes(model) == before + 64 + 4 * 4


def test_optimizers_with_three_moments_or_one_are_known():
    trained = [(torch.nn.Parameter(torch.empty(256, 256)), False), (torch.nn.Parameter(torch.empty(10, 10)), True)]
    assert optimizer_state_bytes("ademamix", trained) == 12 * (65536 + 100)
    assert optimizer_state_bytes("ademamix_8bit", trained) == 3 * 65536 + 12 * 65536 // 256 + 12 * 100
    assert optimizer_state_bytes("schedule_free_sgd", trained) == 4 * (65536 + 100)


@pytest.mark.parametrize(
    ("optim", "package"),
    [("galore_adamw_8bit", "galore-torch"), ("lomo", "lomo-optim"), ("stable_adamw", "torch-optimi")],
)
def test_every_optimizer_without_its_package_is_refused_with_the_line_to_write(tmp_path, optim, package):
    with pytest.raises(ValueError, match=f'optim=.{optim}. needs .* pip install "{package}"'):
        make_trainer(tmp_path, optim=optim, optim_target_modules=["q_proj"])
