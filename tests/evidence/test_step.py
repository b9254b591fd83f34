"""The step check of `verify --model` passes a right step, and finds what is made wrong in it."""

from dataclasses import replace

import pytest
import torch
from tiny import make_llama

from fastdpo.evidence import step
from fastdpo.evidence.step import verify_step
from fastdpo.modeling.packed import packed_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return make_llama(vocab_size=2000)


def failed(model, dtype="float32"):
    return {line.check for line in verify_step(model, dtype, CPU) if line.verdict == "FAILED"}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_right_step_passes_on_every_backend_of_this_machine(model, dtype):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    told = []
    lines = verify_step(model, dtype, CPU, told.append)
    assert told == lines
    verdicts = {line.check: line.verdict for line in lines}
    assert "FAILED" not in verdicts.values()
    for layout in ("padded rows", "sdpa, shared prompts", "sdpa, packed", "mask, shared prompts", "mask, packed"):
        for check in ("loss", "log-probs", "gradients, worst of 21", "same step again: bits that differ"):
            assert verdicts[f"{check} ({layout})"] == "ok"
    for name in ("flash2", "flash3", "flash4", "varlen"):
        assert verdicts[f"attention by {name}"] == "skipped"
    assert verdicts["peak memory beside all logits"] == "ok"
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_a_loss_that_is_off_by_a_ten_thousandth_fails_on_its_own_line(model, monkeypatch):
    def wrong(*args, **kwargs):
        loss, logps = packed_loss(*args, **kwargs)
        return loss + 1e-4 * loss.detach(), logps

    monkeypatch.setattr(step, "packed_loss", wrong)
    found = failed(model)
    assert "loss (sdpa, shared prompts)" in found
    assert not any("gradients" in check or "log-probs" in check for check in found)


def test_the_parameter_with_a_wrong_gradient_is_named(model, monkeypatch):
    def wrong(run, *args, **kwargs):
        loss, logps = packed_loss(run, *args, **kwargs)
        weight = run.model.layers[1].mlp.up_proj.weight
        return loss + (weight - weight.detach()).sum() * 1e-3, logps

    monkeypatch.setattr(step, "packed_loss", wrong)
    lines = [line for line in verify_step(model, "float32", CPU) if line.verdict == "FAILED"]
    assert {line.note for line in lines} == {"grad model.layers.1.mlp.up_proj.weight"}
    assert "gradients, worst of 21 (sdpa, packed)" in {line.check for line in lines}


def test_a_step_that_differs_from_call_to_call_fails(model, monkeypatch):
    calls = iter(range(10**6))

    def wrong(*args, **kwargs):
        loss, logps = packed_loss(*args, **kwargs)
        sums = logps.sequences.sums + 1e-6 * next(calls) % 2e-6
        return loss, replace(logps, sequences=replace(logps.sequences, sums=sums))

    monkeypatch.setattr(step, "packed_loss", wrong)
    assert "same step again: bits that differ (sdpa, packed)" in failed(model)


def test_a_head_that_builds_all_logits_fails_the_memory_check_alone(model, monkeypatch):
    monkeypatch.setattr(step, "packed_loss", lambda *args: packed_loss(*args, impl="reference"))
    assert failed(model) == {"peak memory beside all logits"}


def test_a_model_that_is_refused_is_a_failed_line(monkeypatch):
    model = make_llama(vocab_size=64)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.nan
    (line,) = [line for line in verify_step(model, "float32", CPU) if line.verdict == "FAILED"]
    assert "its weights hold NaN or infinity" in line.note
