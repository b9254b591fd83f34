"""Two processes train adapters like one: on the head, from an existing adapter, with a whole head beside it."""

import os
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from processes import on_processes
from tiny import make_llama
from tiny_runs import tiny_trainer

sys.path.append(str(Path(__file__).parents[1] / "adapters"))
from peft_cases import learned, lora

CASES = ["head", "head whole", "existing"]


def train(folder, case, batch_size):
    """What a process has seen of a run."""
    config = lora("q_proj", modules_to_save=["lm_head"]) if case == "head whole" else lora("lm_head", "q_proj")
    model, settings = make_llama(), {"peft_config": config}
    if case == "existing":
        torch.manual_seed(1)
        model, settings = learned(get_peft_model(model, config)), {}
    trainer = tiny_trainer(
        folder,
        model,
        num_rows=12,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        gradient_checkpointing=case == "head whole",
        **settings,
    )
    trainer.train()
    trainer.save_model()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.double().sum().item() for name, p in trainer.model.named_parameters() if p.requires_grad}
    files = sorted(os.listdir(folder)) if trainer.args.process_index == 0 else []
    return {"logs": logs, "weights": weights, "mode": trainer.reference.mode, "files": files}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """By case, what each of two processes has seen."""
    cases = [{"case": case, "batch_size": 2} for case in CASES]
    return dict(zip(CASES, on_processes(train, cases, tmp_path_factory.mktemp("two")), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_adapters_like_one(tmp_path, of_two, case):
    one, (first, second) = train(tmp_path, case, 4), of_two[case]
    assert one["mode"] == first["mode"] == "adapter"
    for single, double in zip(one["logs"], first["logs"], strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert double[key] == pytest.approx(single[key], rel=1e-4, abs=1e-5), key
    assert one["logs"][0]["loss"] != one["logs"][-1]["loss"]
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-4)
    assert second["weights"] == pytest.approx(first["weights"], rel=1e-6, abs=1e-6)
    assert first["files"] == one["files"]
    assert "ref" not in first["files"]
