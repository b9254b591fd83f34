"""What only a card can show of training: waits of the host, the same bits twice, two processes of one card."""

import pytest
import torch
from processes import on_processes
from tiny import make_llama
from tiny_runs import logged, tiny_trainer
from transformers import TrainerCallback

from fastdpo.modeling import check_packing
from fastdpo.modeling.attention import BACKENDS

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]

ON_GPU = {"use_cpu": False, "bf16": True, "gradient_checkpointing": False}
MOST_WAITS = 2  # of a step that logs nothing


class Waits(TrainerCallback):
    """Counts, by torch's own warnings, how often a step has waited for the device."""

    def __init__(self):
        self.of_step, self.seen = [], 0

    def warned(self, message, *_):
        self.seen += "synchronizing CUDA operation" in str(message)

    def on_step_begin(self, *_, **__):
        self.seen = 0
        torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, *_, **__):
        torch.cuda.set_sync_debug_mode("default")
        self.of_step.append(self.seen)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"reference": "cached"}], ids=str)
def test_a_step_waits_for_the_device_twice_at_most(tmp_path, settings, monkeypatch):
    import warnings

    waits = Waits()
    trainer = tiny_trainer(
        tmp_path, num_rows=64, max_steps=6, callbacks=[waits], **{**ON_GPU, **settings, "logging_steps": 1000}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", waits.warned)
        trainer.train()
    assert len(waits.of_step) == 6
    assert max(waits.of_step[2:]) <= MOST_WAITS, waits.of_step  # the first ones make the optimizer's state


def test_batches_come_from_two_workers_by_default(tmp_path):
    assert tiny_trainer(tmp_path, **ON_GPU).args.dataloader_num_workers == 2


@pytest.mark.parametrize("settings", [{}, {"bf16": False}, {"max_tokens_per_microbatch": 32}], ids=str)
def test_two_runs_give_the_same_bits(tmp_path, settings):
    runs = []
    for name in ("one", "two"):
        trainer = tiny_trainer(tmp_path / name, make_llama(), max_steps=4, **{**ON_GPU, **settings})
        trainer.train()
        runs.append((logged(trainer), [p.detach().clone() for p in trainer.model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_a_loss_that_is_not_finite_changes_no_weight(tmp_path):
    model = make_llama()
    trainer = tiny_trainer(tmp_path, model, optim="adamw_torch_fused", max_steps=4, **ON_GPU)
    with torch.no_grad():
        model.lm_head.weight[5, 0] = float("nan")
    before = model.model.layers[0].mlp.up_proj.weight.detach().cpu().clone()
    with pytest.raises(FloatingPointError, match="at step 0; no weight was changed"):
        trainer.train()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.detach().cpu(), before)


def train_on_card(folder, batch_size):
    trainer = tiny_trainer(
        folder,
        max_steps=4,
        per_device_train_batch_size=batch_size,
        **{**ON_GPU, "bf16": False, "ddp_backend": "gloo"},  # NCCL wants a card for every process
    )
    trainer.train()
    weights = {name: p.double().sum().item() for name, p in trainer.model.named_parameters()}
    return {"losses": logged(trainer), "weights": weights, "device": str(trainer.args.device)}


def test_two_processes_of_one_card_train_like_one(tmp_path):
    first, second = on_processes(train_on_card, [{"batch_size": 2}], tmp_path, on_one_card=True)[0]
    one = train_on_card(tmp_path / "one", 4)
    assert first["device"] == second["device"] == "cuda:0"
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-5)
    for weights in (first["weights"], second["weights"]):
        assert weights == pytest.approx(one["weights"], rel=1e-4, abs=1e-4)


# The self-check


def test_a_kernel_that_fails_on_this_card_is_left_out(monkeypatch):
    def broken(call):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(BACKENDS["varlen"], "attend", broken)
    for name in ("flash2", "flash3", "flash4"):
        monkeypatch.setattr(BACKENDS[name], "refusal", lambda call: "is not asked here")
    check = check_packing(make_llama().cuda().bfloat16())
    assert check.ok, check.reason
    assert set(check.backends) == {"sdpa"}
    assert "no kernel image" in check.excluded["varlen"]


def test_the_check_passes_where_tf32_is_on():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for seed in range(4):
            torch.manual_seed(seed)
            check = check_packing(make_llama().cuda())
            assert check.ok, check.reason
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_varlen_attn_takes_fewer_heads_of_keys_or_gets_copies():
    """Whichever it is, the check on long branches holds its gradients to a mask's."""
    from fastdpo.modeling.attention.backends import CallShape
    from fastdpo.modeling.attention.check import attention_fault

    for num_kv_heads in (1, 2, 8):
        shape = CallShape(8, num_kv_heads, 64, 64, torch.bfloat16, torch.device("cuda"), 0.125, None, None, None)
        assert attention_fault(shape, "varlen", {}) == ("varlen", None)
