"""Two processes train adapters like one: on the head, from an existing adapter, with a whole head beside it."""

import pytest
from test_distributed import launch

SCRIPT = """
import json, os, sys
import torch
sys.path[:0] = [{tests!r}, {tests!r} + "/adapters"]
from datasets import Dataset
from peft import get_peft_model
from peft_cases import learned, lora
from tiny import make_llama, make_rows, make_tokenizer
from fastdpo import DPOConfig, DPOTrainer

torch.set_num_threads(1)
out, batch_size, case = sys.argv[1], int(sys.argv[2]), sys.argv[3]
config = lora("q_proj", modules_to_save=["lm_head"]) if case == "head whole" else lora("lm_head", "q_proj")
model, peft_config = make_llama(), config
if case == "existing":
    torch.manual_seed(1)
    model, peft_config = learned(get_peft_model(model, config)), None
args = DPOConfig(
    out, use_cpu=True, per_device_train_batch_size=batch_size, max_steps=3, logging_steps=1, learning_rate=1e-2,
    save_strategy="no", disable_tqdm=True, report_to="none", beta=0.5, gradient_checkpointing=case == "head whole",
)
trainer = DPOTrainer(
    model, args=args, train_dataset=Dataset.from_list(make_rows(12)), processing_class=make_tokenizer(),
    peft_config=peft_config,
)
trainer.train()
trainer.save_model()
logs = [entry for entry in trainer.state.log_history if "loss" in entry]
weights = {{name: p.double().sum().item() for name, p in trainer.model.named_parameters() if p.requires_grad}}
files = sorted(os.listdir(out)) if trainer.args.process_index == 0 else []
with open(out + f".{{trainer.args.process_index}}.json", "w") as file:
    json.dump({{"logs": logs, "weights": weights, "mode": trainer.reference.mode, "files": files}}, file)
trainer.accelerator.end_training()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["head", "head whole", "existing"])
def test_two_processes_train_like_one(tmp_path, case):
    (one,) = launch(tmp_path, SCRIPT, "one", 1, [4, case])
    first, second = launch(tmp_path, SCRIPT, "two", 2, [2, case])
    assert one["mode"] == first["mode"] == "adapter"
    for single, double in zip(one["logs"], first["logs"], strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert double[key] == pytest.approx(single[key], rel=1e-4, abs=1e-5), key
    assert one["logs"][0]["loss"] != one["logs"][-1]["loss"]
    assert first["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-4)
    assert second["weights"] == pytest.approx(first["weights"], rel=1e-6, abs=1e-6)
    assert first["files"] == one["files"]
    assert "ref" not in first["files"]
