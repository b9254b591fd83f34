"""`accelerate(trainer)`: TRL's own trainer with our head op logs the same numbers and takes the same steps."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closeness import distance
from datasets import Dataset
from peers import peer
from side_by_side import SETTINGS, assert_same_logs, logged, mixtral, rows
from tiny import make_llama, make_rows, make_tokenizer

from fastdpo.integrations import trl as seat
from fastdpo.integrations.trl import accelerate
from fastdpo.ops import linear_logps

trl = peer("trl")


def trl_trainer(folder, model, *, keywords=None, **settings):
    args = trl.DPOConfig(str(folder), **{**SETTINGS, **settings})
    return trl.DPOTrainer(
        model, args=args, train_dataset=rows(), processing_class=make_tokenizer(), **(keywords or dict)()
    )


def both(tmp_path, model, **settings):
    """TRL's trainer as it is, and one with our head op; `model` makes what each starts from."""
    theirs = trl_trainer(tmp_path / "before", model(), **settings)
    return theirs, accelerate(trl_trainer(tmp_path / "after", model(), **settings))


def lora(**more):
    from peft import LoraConfig

    return {"peft_config": LoraConfig(**{"r": 4, "target_modules": "all-linear", **more})}


def trained_head():
    return lora(target_modules=["q_proj"], modules_to_save=["lm_head"])


MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
CASES = {
    "sigmoid": {},
    "several losses": MPO,
    "ipo": {"loss_type": "ipo"},
    "aot": {"loss_type": "aot"},
    "WPO": {"use_weighting": True},
    "ld_alpha": {"ld_alpha": 0.5},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "precompute": {"precompute_ref_log_probs": True},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "checkpointing, accumulation": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
}


def assert_same(before, after, tolerance=1e-5):
    """Everything that both have logged, and the weights that they end with.

    Adam moves a weight by the sign of a gradient even where that is all rounding; hence weights by how far all of a
    tensor have moved.
    """
    start = {name: p.detach().clone() for name, p in before.model.named_parameters()}
    before.train()
    after.train()
    assert_same_logs(logged(after), logged(before), tolerance=tolerance)
    share = min(100 * tolerance, 0.25)  # in bf16 many signs hang on rounding
    for (name, was), now in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
        assert distance(now, was) <= share * distance(was, start[name]), name


@pytest.mark.parametrize("case", CASES)
def test_losses_metrics_and_weights_stay_as_they_were(case, tmp_path, model_dir):
    assert_same(*both(tmp_path, lambda: model_dir, **CASES[case]))


@pytest.mark.parametrize("adapter", [lora, trained_head])
def test_lora_stays_as_it_was(adapter, tmp_path):
    assert_same(*both(tmp_path, lambda: make_llama(hidden_size=16, intermediate_size=32), keywords=adapter))


def test_the_auxiliary_loss_of_experts_stays_as_it_was(tmp_path):
    """Weights are not compared: the gradient of an expert that gets no token is rounding, and Adam makes it a step."""
    trainers = both(tmp_path, mixtral, keywords=lora)
    for trainer in trainers:
        trainer.train()
    before, after = map(logged, trainers)
    assert_same_logs(after, before, tolerance=1e-5)
    assert all(entry["aux_loss"] > 0 for entry in after)


HEADS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "cohere": {"logit_scale": 0.25, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "granite": {"logits_scaling": 4.0},
    "phi": {},  # a head with a bias
}


def model_of(model_type, seed):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"vocab_size": 32, "num_key_value_heads": 2, **sizes, **HEADS[model_type]}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    with torch.no_grad():
        for parameter in model.parameters():  # large weights: logits of size 1, and a bias that is not 0
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("model_type", HEADS)
def test_loss_and_gradients_of_one_batch_are_those_of_trl(model_type, tmp_path):
    losses, gradients = [], []
    for trainer in both(
        tmp_path, lambda: model_of(model_type, 0), keywords=lambda: {"ref_model": model_of(model_type, 1)}
    ):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        losses.append(trainer.compute_loss(trainer.model, batch))
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters()})
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-5)
    for name, was in gradients[0].items():
        assert (gradients[1][name] - was).norm() <= 1e-5 * was.norm() + 1e-9, name


@pytest.fixture
def head_calls(monkeypatch):
    """The hidden states that our head op was called with, and whether that was under autocast."""
    calls = []

    def recorded(hidden_states, *args, **kwargs):
        calls.append((hidden_states, torch.is_autocast_enabled("cpu")))
        return linear_logps(hidden_states, *args, **kwargs)

    monkeypatch.setattr(seat, "linear_logps", recorded)
    return calls


def test_policy_and_reference_send_response_rows_alone_through_our_op(tmp_path, model_dir, head_calls):
    trainer = accelerate(accelerate(trl_trainer(tmp_path, model_dir)))  # the second call changes nothing
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.compute_loss(trainer.model, batch)
    num_response_tokens = int(batch["completion_mask"].sum())
    assert [len(hidden) for hidden, _ in head_calls] == [num_response_tokens] * 2
    assert num_response_tokens < batch["input_ids"].numel()
    assert [hidden.requires_grad for hidden, _ in head_calls] == [True, False]


def test_evaluation_on_new_rows_goes_through_our_op_too(tmp_path, model_dir, head_calls):
    new = Dataset.from_list(make_rows(4, seed=9))
    metrics = [t.evaluate(new) for t in both(tmp_path, lambda: model_dir, precompute_ref_log_probs=True)]
    assert len(head_calls) == 2  # the reference's log-probs, then the loss
    for key in ("eval_loss", "eval_rewards/margins", "eval_entropy", "eval_logits/chosen"):
        assert metrics[1][key] == pytest.approx(metrics[0][key], abs=1e-5)


def test_under_bf16_autocast_both_models_run_in_it(tmp_path, model_dir, head_calls):
    """accelerate has wrapped the reference before we come, and wraps the policy after."""
    before, after = both(tmp_path, lambda: model_dir, bf16=True)
    assert_same(before, after, tolerance=2e-2)
    assert [in_autocast for _, in_autocast in head_calls] == [True] * 6  # of policy and reference, three steps


def test_calls_without_the_fused_head_are_the_models_own(tmp_path, model_dir):
    before, after = both(tmp_path, lambda: model_dir)
    ids = torch.tensor([[1, 8, 9, 10]])
    torch.testing.assert_close(after.model(input_ids=ids).logits, before.model(input_ids=ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(
        after.model(input_ids=ids, labels=ids).loss, before.model(input_ids=ids, labels=ids).loss
    )
    generated = [t.model.generate(ids, max_new_tokens=4, do_sample=False).tolist() for t in (before, after)]
    assert generated[0] == generated[1]


def test_a_batch_without_response_tokens_gives_zeros_with_a_gradient(tmp_path, model_dir):
    model = accelerate(trl_trainer(tmp_path, model_dir)).model
    ids = torch.tensor([[1, 8, 9]])
    output = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    assert output.log_probs.tolist() == [[0.0, 0.0]]
    output.log_probs.sum().backward()


TWO_PROCESSES = """
import os, sys
sys.path[:0] = {paths!r}
import torch, trl
from side_by_side import SETTINGS, assert_same_logs, logged, rows
from tiny import make_llama, make_tokenizer
from fastdpo.integrations.trl import accelerate

torch.set_num_threads(1)
trainers = []
for seat in (lambda trainer: trainer, accelerate):
    args = trl.DPOConfig({folder!r}, **{{**SETTINGS, "per_device_train_batch_size": 2}})
    trainer = trl.DPOTrainer(
        make_llama(), ref_model=make_llama(seed=1), args=args, train_dataset=rows(), processing_class=make_tokenizer()
    )
    seat(trainer).train()
    trainers.append(trainer)
assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
before, after = trainers
assert_same_logs(logged(after), logged(before), tolerance=1e-5)
for was, now in zip(before.model.parameters(), after.model.parameters()):
    torch.testing.assert_close(now, was, rtol=1e-4, atol=1e-5)
open({folder!r} + "/same" + str(args.process_index), "w").close()
os._exit(0)  # threads of the process group may still be ending, and would abort an ordinary exit
"""


@pytest.mark.slow
def test_two_processes_stay_as_they_were(tmp_path):
    """Under DDP our op runs inside the wrapped forward, so that gradients are reduced."""
    here = Path(__file__).parent
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES.format(paths=[str(here), str(here.parent)], folder=str(tmp_path)))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(start, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("same*")} == {"same0", "same1"}


# What is refused


def test_other_trainers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer must be a trl.DPOTrainer, got types.SimpleNamespace"):
        accelerate(SimpleNamespace(model=None))


def test_sharded_weights_are_refused(tmp_path, model_dir):
    trainer = trl_trainer(tmp_path, model_dir)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"trainer must hold whole weights, got .*FSDP"):
        accelerate(trainer)


def test_a_trl_whose_head_returns_something_else_is_refused(tmp_path, model_dir, monkeypatch):
    trainer = trl_trainer(tmp_path, model_dir)
    monkeypatch.setattr(seat, "_OUTPUT_FIELDS", seat._OUTPUT_FIELDS - {"is_top1"})
    with pytest.raises(ValueError, match=r"trl must be 1.16.*its fused head returns"):
        accelerate(trainer)


def test_a_trl_whose_forward_is_made_in_another_way_is_refused(tmp_path, model_dir, monkeypatch):
    trainer = trl_trainer(tmp_path, model_dir)
    monkeypatch.setattr(seat, "_SETTINGS", {*seat._SETTINGS, "new_setting"})
    with pytest.raises(ValueError, match="its fused forward holds"):
        accelerate(trainer)
    trainer.model.forward = type(trainer.model).forward.__get__(trainer.model)
    with pytest.raises(ValueError, match="the forward of LlamaForCausalLM has no fused head"):
        accelerate(trainer)


def test_a_head_with_other_outputs_is_refused(tmp_path, model_dir):
    from trl.trainer.utils import add_fused_lm_head

    trainer = trl_trainer(tmp_path, model_dir)
    add_fused_lm_head(trainer.model, temperature=0.7)
    with pytest.raises(ValueError, match="its fused forward was made with"):
        accelerate(trainer)
