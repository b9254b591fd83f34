"""A loss that is not finite changes no weight, also where nobody waits for it: the optimizer is told on the device.

The waiting of a GPU is stood in for by a CPU whose fused AdamW knows `found_inf` as well.
"""

from dataclasses import replace

import pytest
import torch
from tiny import make_llama
from tiny_runs import logged, tiny_trainer

from fastdpo.training.callbacks import finite

EVERY_STEP = {"max_steps": 6, "num_rows": 24, "logging_steps": 100}


@pytest.fixture
def nobody_waits(monkeypatch):
    monkeypatch.setattr(finite, "waiting_costs", lambda device: True)


def spoiling(trainer, bad_call, value=float("nan")):
    """The trainer, whose loss of one micro-batch, counted from 0, is `value` with a gradient of it."""
    loss_sum, calls = trainer._loss_sum, []

    def spoiled(model, batch):
        result = loss_sum(model, batch)
        calls.append(batch)
        return replace(result, loss=result.loss * value) if len(calls) == bad_call + 1 else result

    trainer._loss_sum = spoiled
    return trainer


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


class Watched:
    """Weights before every step of the optimizer and after the last."""

    def __init__(self, trainer):
        self.seen, self.trainer = [], trainer
        create = trainer.create_optimizer

        def create_and_watch(*args, **kwargs):
            optimizer = create(*args, **kwargs)
            optimizer.register_step_pre_hook(lambda *_: self.seen.append(weights(trainer.model)))
            return optimizer

        trainer.create_optimizer = create_and_watch

    def train(self):
        with pytest.raises(FloatingPointError) as raised:
            self.trainer.train()
        self.seen.append(weights(self.trainer.model))
        return str(raised.value)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_optimizer_of_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does_not_run(
    tmp_path, nobody_waits, value
):
    trainer = spoiling(tiny_trainer(tmp_path, optim="adamw_torch_fused", **EVERY_STEP), 2, value)
    watched = Watched(trainer)
    said = watched.train()
    assert "at step 2; no weight was changed" in said
    assert len(watched.seen) == 4  # before steps 0, 1 and 2, and at the end: step 3 was launched and not taken
    assert not equal(watched.seen[0], watched.seen[1])
    assert not equal(watched.seen[1], watched.seen[2])
    assert equal(watched.seen[2], watched.seen[3])
    saved = torch.load(tmp_path / "nonfinite_batch_rank0.pt", weights_only=True)
    assert saved["step"] == 2


def test_moments_and_step_counts_stay_as_they_are_too(tmp_path, nobody_waits):
    trainer = spoiling(tiny_trainer(tmp_path, optim="adamw_torch_fused", **EVERY_STEP), 1)
    Watched(trainer).train()
    for state in trainer.optimizer.optimizer.state.values():
        assert state["step"].item() == 1
        assert state["exp_avg"].isfinite().all()


def test_the_last_step_is_looked_at_before_training_ends(tmp_path, nobody_waits):
    trainer = spoiling(tiny_trainer(tmp_path, optim="adamw_torch_fused", **EVERY_STEP), 5)
    assert "at step 5" in Watched(trainer).train()


@pytest.mark.parametrize(
    "when",
    [{"save_strategy": "steps", "save_steps": 3}, {"eval_strategy": "steps", "eval_steps": 3}, {"logging_steps": 3}],
)
def test_nothing_is_saved_evaluated_or_logged_after_such_a_step(tmp_path, nobody_waits, when):
    rows = tiny_trainer(tmp_path / "rows", num_rows=4).train_dataset
    settings = {**EVERY_STEP, **when, "optim": "adamw_torch_fused", "eval_dataset": rows}
    trainer = spoiling(tiny_trainer(tmp_path, **settings), 2)
    assert "at step 2" in Watched(trainer).train()
    assert trainer.state.global_step == 3  # it stopped there, and not a step later
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not trainer.state.log_history


def test_steps_that_are_not_waited_for_give_the_same_losses(tmp_path, monkeypatch):
    found = []
    for name, costs in (("waited", False), ("not", True)):
        monkeypatch.setattr(finite, "waiting_costs", lambda device, costs=costs: costs)
        trainer = tiny_trainer(tmp_path / name, make_llama(), optim="adamw_torch_fused", gradient_accumulation_steps=2)
        trainer.train()
        found.append((logged(trainer), weights(trainer.model)))
    assert found[0][0] == found[1][0]
    assert equal(found[0][1], found[1][1])


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_an_optimizer_that_cannot_be_told_on_the_device_is_waited_for(tmp_path, nobody_waits, optim):
    trainer = spoiling(tiny_trainer(tmp_path, optim=optim, **EVERY_STEP), 2)
    watched = Watched(trainer)
    assert "at step 2" in watched.train()
    assert trainer.state.global_step == 2
    assert len(watched.seen) == 3  # before steps 0 and 1, and at the end


def test_a_process_whose_own_losses_are_finite_stops_with_the_others(tmp_path, nobody_waits, monkeypatch):
    trainer = tiny_trainer(tmp_path, optim="adamw_torch_fused", **EVERY_STEP)
    calls = []

    def reduce(count, how):
        assert how == "sum"
        calls.append(count)
        return count + (1 if len(calls) == 3 else 0)

    monkeypatch.setattr(trainer.accelerator, "reduce", reduce)
    monkeypatch.setattr(finite, "gather_object", lambda texts: [*texts, "the loss is nan at step 2"])
    check = trainer._losses.check

    class InADuo:
        def __getattr__(self, name):
            return 2 if name == "world_size" else getattr(trainer.args, name)

    class Duo:
        args = InADuo()

        def __getattr__(self, name):
            return getattr(trainer, name)

    monkeypatch.setattr(trainer._losses, "check", lambda of: check(Duo()))
    watched = Watched(trainer)
    assert watched.train() == "the loss is nan at step 2"  # what the other process says
    assert equal(watched.seen[2], watched.seen[3])


def test_gradients_that_overflow_under_a_loss_scaler_stop_nothing(tmp_path, nobody_waits):
    """The scale of a new scaler is too large: it skips the step and halves the scale, as it is meant to."""
    trainer = tiny_trainer(tmp_path, max_steps=8, num_rows=24, max_grad_norm=0.0, optim="adamw_torch_fused")
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-40)
    watched = Watched(trainer)
    trainer.train()
    assert trainer.state.global_step == 8
    assert scaler.get_scale() < 2.0**127
    assert equal(watched.seen[0], watched.seen[1])  # the step whose gradients overflowed changed nothing
    assert not equal(watched.seen[1], weights(trainer.model))
    assert not list(tmp_path.glob("nonfinite_batch*"))


def test_a_loss_that_is_not_finite_stops_under_a_loss_scaler_too(tmp_path, nobody_waits):
    trainer = spoiling(tiny_trainer(tmp_path, optim="adamw_torch_fused", **EVERY_STEP), 2)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert "at step 2; no weight was changed" in Watched(trainer).train()
    assert trainer.state.global_step == 2  # at once: the scaler has the number on the device for itself


def test_a_batch_that_cannot_be_saved_does_not_hide_the_loss_that_is_not_finite(tmp_path, monkeypatch):
    batch, save = tmp_path / "nonfinite_batch_rank0.pt", torch.save

    def fails(content, path):
        if path != batch:
            return save(content, path)
        path.write_bytes(b"a part")
        raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")

    trainer = spoiling(tiny_trainer(tmp_path, **EVERY_STEP), 2)
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 2; .* cannot be saved in .*: .* failed"):
        trainer.train()
    assert not batch.exists()
