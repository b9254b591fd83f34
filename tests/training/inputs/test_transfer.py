"""A batch moves to the device in one copy, whatever is in it, and trains the same from worker processes."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import find_batch_size, send_to_device
from test_microbatches import token_row
from tiny_runs import losses, tiny_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.training.inputs.collator import PackingCollator, microbatches_of
from fastdpo.training.inputs.transfer import OneBuffer
from fastdpo.training.settings.config import DPOConfig
from fastdpo.types import PackedBatch

ROWS = [token_row([1, 2, 3], [4, 5], [6]), token_row([7, 8], [9], [10, 11, 12]), token_row([1], [2, 3, 4, 5], [6, 7])]


class Copies(TorchDispatchMode):
    """The bytes of each copy to another device."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None:
            self.sizes.append(args[0].numel() * args[0].element_size())
        return func(*args, **(kwargs or {}))


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


@pytest.mark.parametrize("settings", [{}, {"is_packed": False}, {"max_tokens": 8}], ids=["packed", "padded", "split"])
def test_a_batch_is_one_copy_to_another_device(settings):
    batch = PackingCollator(**settings)(ROWS)
    with Copies() as copies:
        moved = send_to_device(batch, torch.device("meta"))
    before, after = tensors_of(batch), tensors_of(moved)
    assert len(before) > 8
    assert len(copies.sizes) == 1
    assert copies.sizes[0] <= sum(x.numel() * x.element_size() + 16 for x in before)
    assert [(x.shape, x.dtype) for x in after] == [(x.shape, x.dtype) for x in before]
    assert {x.device.type for x in after} == {"meta"}
    assert all(x.storage_offset() * x.element_size() % 16 == 0 for x in after)
    assert list(moved) == list(batch)
    for part in microbatches_of(moved):
        PackedBatch(**part)


def test_every_number_arrives_as_it_was(monkeypatch):
    """From one buffer to another on the CPU, by way of a batch that says it is elsewhere."""
    from fastdpo.training.inputs import transfer

    batch = PackingCollator(max_tokens=8)(ROWS)
    batch["more"] = (torch.tensor(2.5, dtype=torch.float64), torch.tensor([True, False, True]), "text", 7, None)
    batch["slice"] = torch.arange(20, dtype=torch.int32).view(4, 5)[:, 1:3]
    batch["none"] = torch.zeros(0, 3, dtype=torch.bfloat16)
    monkeypatch.setattr(transfer, "_is_on", lambda *_: False)
    moved = batch.to("cpu")
    assert moved["more"][2:] == ("text", 7, None)
    for before, after in zip(tensors_of(batch), tensors_of(moved), strict=True):
        assert torch.equal(before, after)
        assert before.dtype == after.dtype
    assert len({x.untyped_storage().data_ptr() for x in tensors_of(moved) if x.numel()}) == 1


def test_a_batch_that_is_there_is_left_as_it_is():
    batch = PackingCollator()(ROWS)
    assert batch.to("cpu") is batch


def test_to_others_it_is_a_dict():
    batch = PackingCollator()(ROWS)
    assert find_batch_size(batch) == 3
    for same in (pickle.loads(pickle.dumps(batch)), copy.copy(batch), OneBuffer(dict(batch))):
        assert isinstance(same, OneBuffer)
        assert torch.equal(same["input_ids"], batch["input_ids"])


def test_two_workers_collate_on_a_gpu_by_default_and_none_elsewhere(tmp_path, monkeypatch):
    assert DPOConfig(str(tmp_path)).dataloader_num_workers == 0
    assert DPOConfig(str(tmp_path), dataloader_num_workers=3).dataloader_num_workers == 3
    from fastdpo.training.settings import engine

    monkeypatch.setattr(engine.torch.cuda, "is_available", lambda: True)
    args = DPOConfig.__new__(DPOConfig)
    args.use_cpu, args.bf16, args.fp16, args.gradient_checkpointing = False, False, False, False
    args.activation_offloading, args.dataloader_num_workers = False, None
    monkeypatch.setattr(engine, "resolve_checkpointing", lambda *_: None)
    args._follow_device()
    assert args.dataloader_num_workers == 2
    args.dataloader_num_workers = 0
    args._follow_device()
    assert args.dataloader_num_workers == 0


def test_workers_change_no_loss(tmp_path):
    alone, with_workers = (
        losses(tiny_trainer(tmp_path / str(workers), num_rows=12, dataloader_num_workers=workers)) for workers in (0, 2)
    )
    assert len(alone) == 3
    assert with_workers == alone


def test_log_probs_keep_their_digits_under_deepspeed(tmp_path):
    """Trainer turns every float of a batch into DeepSpeed's dtype: in bf16, -345.67 would be -346."""
    trainer = tiny_trainer(tmp_path, num_rows=2)
    inputs = trainer.collator([trainer.train_dataset[0]])
    inputs["ref_logps"] = torch.tensor([-345.67, -12.3])
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    assert trainer._prepare_inputs(inputs)["ref_logps"].tolist() == pytest.approx([-345.67, -12.3], rel=1e-6)
