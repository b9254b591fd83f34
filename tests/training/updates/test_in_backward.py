"""A step inside backward is the step after it: same weights, same clipping, with no more than a layer of gradients."""

import pytest
import torch
from closeness import relative_error
from releases import bitsandbytes_on_a_cpu
from tiny import make_llama
from tiny_runs import logged, make_lora, tiny_config, tiny_trainer

from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.training.callbacks.summary import summary_lines
from fastdpo.training.memory.estimate import estimate_peak_memory
from fastdpo.training.updates.checks import check_engine

IN_BACKWARD = {"optimizer_in_backward": True}


def ran(folder, dtype=torch.float32, steps=4, **settings):
    model = make_llama(tie_word_embeddings=settings.pop("tied", False)).to(dtype)
    options = {"max_steps": steps, "learning_rate": 1e-2, "num_rows": 8, "optim": "adamw_torch", **settings}
    trainer = tiny_trainer(folder, model, **options)
    trainer.train()
    return trainer


def assert_same_weights(found, expected, at_most=2e-6):
    for (name, a), b in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        assert relative_error(a, b) <= at_most, name


@pytest.mark.parametrize(
    "settings",
    [
        {"max_grad_norm": 0.0, "tied": True, "gradient_checkpointing": True},
        {"max_grad_norm": 0.3, "clipping_in_backward": "two_passes", "optim": "adafactor"},
        {"max_grad_norm": 0.3, "clipping_in_backward": "two_passes", "peft_config": make_lora()},
    ],
    ids=["unclipped", "clipped", "lora"],
)
def test_steps_in_backward_are_steps_after_it(tmp_path, settings):
    expected = ran(tmp_path / "after", **{k: v for k, v in settings.items() if k != "clipping_in_backward"})
    found = ran(tmp_path / "in", **settings, **IN_BACKWARD)
    assert_same_weights(found, expected)
    for key in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
        assert logged(found, key) == pytest.approx(logged(expected, key), rel=1e-4, abs=1e-6), key
    if settings["max_grad_norm"]:
        assert max(logged(expected, "grad_norm")) > 0.3  # it was clipped


def test_the_norm_of_the_step_before_clips_this_one(tmp_path):
    """Plain gradient descent: the length of an update is the learning rate times the clipped norm."""
    lengths, norms = [], []
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.3, "lr_scheduler_type": "constant"}
    for steps in range(1, 4):
        trainer = ran(tmp_path / str(steps), torch.float64, steps, **settings, **IN_BACKWARD)
        norms = logged(trainer, "grad_norm")
        lengths.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    starts = [torch.cat([p.detach().flatten() for p in make_llama().double().parameters()]), *lengths]
    found = [float((b - a).norm()) for a, b in zip(starts, lengths, strict=False)]
    before = [norms[0], *norms]  # the first step measures its own
    assert norms[0] > 0.3
    assert found == pytest.approx([0.5 * norms[i] * min(0.3 / before[i], 1.0) for i in range(3)], rel=1e-4)


def test_gradients_exist_for_one_weight_at_a_time(tmp_path):
    trainer = tiny_trainer(tmp_path, make_llama(num_hidden_layers=3), max_steps=1, max_grad_norm=0.0, **IN_BACKWARD)
    alive = []
    trainer.create_optimizer()
    for p in trainer.model.parameters():  # after the trainer's own hooks
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in trainer.model.parameters()))
        )
    trainer.train()
    assert len(alive) == len(list(trainer.model.parameters()))
    assert max(alive) == 0


@pytest.mark.slow
def test_the_estimate_has_the_gradient_of_one_weight_at_a_time(tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "tie_word_embeddings": True}
    settings = {"weight_rounding": "stochastic", "reference_free": True, "max_grad_norm": 0.0, "num_rows": 8}
    settings |= {"optim": "adamw_torch_fused", "gradient_checkpointing": True, "per_device_train_batch_size": 8}
    peaks = {}
    for name, more in (("in", IN_BACKWARD), ("after", {})):
        model = make_llama(vocab_size=1000, **shape).bfloat16()
        trainer = tiny_trainer(tmp_path / name, model, **settings, **more)
        peaks[name] = estimate_peak_memory(trainer)
    trained = sum(p.numel() for p in model.parameters())
    assert peaks["in"].weights == pytest.approx(2 * trained, rel=0.01)
    assert peaks["in"].optimizer == 8 * trained  # moments in fp32
    assert peaks["in"].gradients < 0.8 * peaks["after"].gradients

    trainer = tiny_trainer(tmp_path / "in", make_llama(vocab_size=1000, **shape).bfloat16(), **settings, **IN_BACKWARD)
    trainer.train()  # the optimizer has its state
    inputs = trainer.collator(list(trainer.train_dataset))
    measured = peak_live_bytes(lambda: trainer.training_step(trainer.model, inputs) and None)
    estimate = peaks["in"]
    assert estimate.gradients + estimate.activations + estimate.head == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("settings", [{}, {"optim": "adamw_bnb_8bit"}], ids=["fp32 moments", "8 bit"])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_bf16_weights_are_trained_in_backward(tmp_path, rounding, settings):
    if settings:
        bitsandbytes_on_a_cpu()
    more = {"weight_rounding": rounding, "learning_rate": 1e-4, "max_grad_norm": 0.0, **settings}
    found = ran(tmp_path / "in", torch.bfloat16, **more, **IN_BACKWARD)
    after = ran(tmp_path / "after", torch.bfloat16, **more)
    assert_same_weights(found, after, at_most=5e-3)
    assert all(p.dtype == torch.bfloat16 for p in found.model.parameters())


def test_a_resumed_run_ends_in_the_weights_of_one_that_was_not_stopped(tmp_path):
    settings = {"weight_rounding": "kahan", "max_grad_norm": 0.3, "save_strategy": "steps", "save_steps": 2}
    expected = ran(tmp_path / "whole", torch.bfloat16, **settings, **IN_BACKWARD)
    model = make_llama().bfloat16()
    options = {"max_steps": 4, "learning_rate": 1e-2, "num_rows": 8, "optim": "adamw_torch", **settings, **IN_BACKWARD}
    again = tiny_trainer(tmp_path / "whole", model, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for a, b in zip(again.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert logged(again, "grad_norm") == logged(expected, "grad_norm")


def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path):
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[31] = float("inf")
    rows = [{"prompt_ids": [1, 31], "chosen_ids": [6], "rejected_ids": [7]}]
    trainer = tiny_trainer(tmp_path, model, train_dataset=rows, **IN_BACKWARD)
    before = model.lm_head.weight.clone()
    with pytest.raises(FloatingPointError, match="no weight was changed"):
        trainer.train()
    assert torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps must be 1 .* got 4: .*_batch_size to 16,"),
        (
            {"max_tokens_per_microbatch": 64},
            "must be None with optimizer_in_backward, got 64",
        ),
        ({"optim": "lomo"}, "lomo"),
        ({"optim": "schedule_free_adamw"}, "schedule"),
        ({"on_oversized_row": "split"}, "the optimizer steps in backward, before the other parts of a row have run"),
        ({"fsdp": True}, "optimizer_in_backward must be False with FSDP, which updates its own shards"),
    ],
)
def test_what_cannot_step_in_backward_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **IN_BACKWARD, **settings)


def test_rounding_needs_weights_in_bf16(tmp_path):
    with pytest.raises(ValueError, match=r"must be 'nearest' for weights in float32, got 'kahan': .*'bfloat16'"):
        tiny_trainer(tmp_path, weight_rounding="kahan")


def test_an_engine_that_updates_weights_itself_is_refused(tmp_path):
    args = tiny_config(tmp_path, weight_rounding="kahan")
    with pytest.raises(ValueError, match="weight_rounding must be 'nearest' with DeepSpeed, which updates its own"):
        check_engine(args, "DeepSpeed")
    check_engine(tiny_config(tmp_path), "DeepSpeed")


def test_the_summary_says_how_weights_are_updated(tmp_path):
    trainer = tiny_trainer(tmp_path, make_llama().bfloat16(), weight_rounding="kahan", **IN_BACKWARD)
    told = dict(summary_lines(trainer))["updates"]
    assert told == (
        "computed in fp32; what rounding to bf16 cuts off is kept, in backward; clipped by the norm of the step before"
    )
    assert "updates" not in dict(summary_lines(tiny_trainer(tmp_path)))


def test_settings_are_checked(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'stochastic'"):
        tiny_config(tmp_path, weight_rounding="stochastically")
    with pytest.raises(ValueError, match=r"clipping_in_backward must be one of \['previous_norm', 'two_passes'\]"):
        tiny_config(tmp_path, clipping_in_backward="exact")
