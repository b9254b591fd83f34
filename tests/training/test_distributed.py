"""Two processes give the losses and the weights of one: gradients are reduced, the mean is over the pairs of both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
import torch
sys.path.insert(0, {tests!r})
from tiny import make_llama, make_rows, make_tokenizer
from datasets import Dataset
from fastdpo import DPOConfig, DPOTrainer

torch.set_num_threads(1)
out, batch_size, accumulation, adapter = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "lora"
peft_config = None
if adapter:
    from peft import LoraConfig
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
args = DPOConfig(
    out, use_cpu=True, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=4,
    logging_steps=1, learning_rate=1e-2 if adapter else 1e-3, save_strategy="no", disable_tqdm=True, report_to="none",
    beta=0.5, reference_free=sys.argv[4] == "none", per_device_eval_batch_size=batch_size,
    loss_type=["sigmoid", "sft"] if sys.argv[4] == "none" else "sigmoid",  # sft: a mean over the tokens of both
    sync_ref_model=adapter, ref_model_sync_steps=2,
)
seen = []


def compute_metrics(prediction):
    seen.append(prediction.predictions["chosen_logps"].tolist())
    return {{"first_length": int(prediction.label_ids[0, 0])}}


trainer = DPOTrainer(
    make_llama(), args=args, train_dataset=Dataset.from_list(make_rows(16)), processing_class=make_tokenizer(),
    eval_dataset=Dataset.from_list(make_rows(5, seed=1)), peft_config=peft_config, compute_metrics=compute_metrics,
)
before = trainer.evaluate()  # must not leave the model unwrapped
trainer.train()
evaluated = trainer.evaluate()
logs = [entry for entry in trainer.state.log_history if "loss" in entry]
weights = {{name: p.double().sum().item() for name, p in trainer.model.named_parameters() if p.requires_grad}}
with open(out + f".{{trainer.args.process_index}}.json", "w") as file:
    json.dump({{"logs": logs, "weights": weights, "eval": evaluated, "predictions": seen[-1]}}, file)
trainer.accelerator.end_training()
os._exit(0)  # threads of the process group may still be ending, and would abort an ordinary exit
"""


def launch(tmp_path, script, name, num_processes, arguments):
    """What each process of a script has written to its first argument + `.RANK.json`."""
    path = tmp_path / "script.py"
    path.write_text(script.format(tests=str(Path(__file__).parents[1]), here=str(Path(__file__).parent)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [*(start if num_processes > 1 else [sys.executable]), str(path), str(tmp_path / name)]
    result = subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in range(num_processes)]


def run(tmp_path, name, num_processes, batch_size, accumulation, mode):
    return launch(tmp_path, SCRIPT, name, num_processes, [batch_size, accumulation, mode])[0]


@pytest.mark.parametrize(("mode", "accumulation"), [("full", 2), ("lora", 1), ("none", 1)])
def test_two_processes_train_like_one(tmp_path, mode, accumulation):
    one = run(tmp_path, "one", 1, 4, 1, mode)
    two = run(tmp_path, "two", 2, 2 // accumulation, accumulation, mode)
    assert len(one["logs"]) == 4
    for single, double in zip(one["logs"], two["logs"], strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy", "num_tokens"):
            assert double[key] == pytest.approx(single[key], rel=1e-4, abs=1e-5), key
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-4)
    # 5 rows on two processes: the last step repeats rows, which must not count twice
    assert len(one["predictions"]) == 5
    assert two["predictions"] == pytest.approx(one["predictions"], rel=1e-4)  # in the order of the rows
    for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_first_length"):
        assert two["eval"][key] == pytest.approx(one["eval"][key], abs=1e-5), key
    assert one["logs"][0]["loss"] != one["logs"][-1]["loss"]


STOPPING = """
import json, os, sys
import torch
sys.path.insert(0, {tests!r})
from tiny import make_llama, make_tokenizer
from fastdpo import DPOConfig, DPOTrainer

torch.set_num_threads(1)
out = sys.argv[1]
args = DPOConfig(out, use_cpu=True, per_device_train_batch_size=2, max_steps=3, save_strategy="no", report_to="none")
rows = [dict(prompt_ids=[1, 5 + i], chosen_ids=[6], rejected_ids=[7]) for i in range(3)]
rows.append(dict(prompt_ids=[1, 31], chosen_ids=[6], rejected_ids=[7]))
model = make_llama()
with torch.no_grad():
    model.model.embed_tokens.weight[31] = float("inf")
trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=make_tokenizer())
before = model.lm_head.weight.clone()
try:
    trainer.train()
    message = "went on"
except FloatingPointError as error:
    message = str(error)
with open(out + f".{{trainer.args.process_index}}.json", "w") as file:
    json.dump({{"message": message, "is_unchanged": torch.equal(before, model.lm_head.weight)}}, file)
os._exit(0)
"""


def test_a_loss_that_is_not_finite_stops_all_processes_before_any_steps(tmp_path):
    found = launch(tmp_path, STOPPING, "two", 2, [])
    messages = sorted(process["message"] for process in found)
    assert "the loss is nan at step 0" in messages[0]
    assert "another process" in messages[1]
    assert all(process["is_unchanged"] for process in found)
