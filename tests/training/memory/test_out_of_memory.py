"""Micro-batches that do not fit are halved, with the gradient of the whole batch. A hook stands in for memory."""

import pytest
import torch
from datasets import Dataset
from tiny import make_llama, make_rows
from tiny_runs import logged, tiny_trainer

from fastdpo.modeling.allocation import is_out_of_memory
from fastdpo.training.inputs.collator import PackingCollator, examples_of, microbatches_of
from fastdpo.types import PackedBatch

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB"
LONG = {"prompt": "the cat " * 12, "chosen": "sees " * 9, "rejected": "likes " * 9}


class Allocator:
    """Raises out of memory in a forward or a backward of more than `most` tokens, and counts attempts and failures."""

    def __init__(self, model, most, *, where="forward"):
        self.most, self.attempts, self.failures = most, [], 0
        self.where = where
        model.get_input_embeddings().register_forward_pre_hook(self.before)
        model.model.layers[0].register_full_backward_hook(self.backward)  # after the layers above it

    def before(self, module, args):
        self.attempts.append(args[0].numel())
        if self.where == "forward":
            self.check(args[0].numel())

    def backward(self, module, grad_input, grad_output):
        if self.where == "backward":
            self.check(grad_output[0].shape[0] * grad_output[0].shape[1])

    def check(self, num_tokens):
        if num_tokens > self.most:
            self.failures += 1
            raise torch.OutOfMemoryError(MESSAGE)


def trained(tmp_path, name, most=None, where="forward", rows=None, **settings):
    """A trainer after its run, and its stand-in, which is there for the run alone."""
    data = {} if rows is None else {"train_dataset": Dataset.from_list(rows)}
    options = {"num_rows": 24, "max_steps": 3, "per_device_train_batch_size": 8, "reference": "none", **settings}
    options = {"loss_type": "simpo", "beta": 2.0, "optim": "sgd", "learning_rate": 0.1, **options}
    trainer = tiny_trainer(tmp_path / name, make_llama().double(), **data, **options)
    allocator = None if most is None else Allocator(trainer.model, most, where=where)
    trainer.train()
    return trainer, allocator


def assert_same_run(found, expected):
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert len(logged(found)) == len(logged(expected)) > 0
    for entry, other in zip(found.state.log_history, expected.state.log_history, strict=True):
        told, wanted = ({name: x for name, x in one.items() if not name.startswith("train_")} for one in (entry, other))
        assert told == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 3}, {"max_tokens_per_microbatch": 90}])
def test_a_run_that_runs_out_of_memory_ends_in_the_same_weights(tmp_path, where, packing, more):
    expected, _ = trained(tmp_path, "whole", packing=packing, **more)
    found, allocator = trained(tmp_path, "halved", 60, where, packing=packing, **more)
    assert allocator.failures > 0
    assert_same_run(found, expected)


def test_a_size_that_did_not_fit_is_remembered_and_said_once(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        _, allocator = trained(tmp_path, "run", 60, max_steps=9, per_device_train_batch_size=6)
    told = [record.message for record in caplog.records if "does not fit into memory" in record.message]
    assert len(told) == allocator.failures <= 3  # of 11 batches that are too large: each time a smaller size
    assert "It is halved" in told[0]
    assert "max_tokens_per_microbatch=" in told[0]


def test_an_evaluation_runs_out_of_memory_too(tmp_path):
    rows = make_rows(12, seed=3)
    expected, _ = trained(tmp_path, "whole", max_steps=1)
    found, _ = trained(tmp_path, "halved", max_steps=1)
    allocator = Allocator(found.model, 60)
    data = Dataset.from_list(rows)
    whole, halved = (trainer.evaluate(data) for trainer in (expected, found))
    assert allocator.failures > 0
    names = [name for name in whole if "runtime" not in name and "per_second" not in name]
    assert "eval_loss" in names
    for name in names:
        assert halved[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name


def test_predictions_keep_the_order_of_the_rows(tmp_path):
    data = Dataset.from_list(make_rows(12, seed=3))
    trainer, _ = trained(tmp_path, "run", max_steps=1)
    whole = trainer.predict(data).predictions
    Allocator(trainer.model, 60)
    halved = trainer.predict(data).predictions
    for name, values in whole.items():
        assert halved[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


def test_a_row_that_does_not_fit_alone_is_named_with_its_length(tmp_path):
    rows = [*make_rows(7), LONG]
    with pytest.raises(
        ValueError, match=r"row 7 of the prepared train dataset \(counted from 0\) has \d\d tokens and does"
    ):
        trained(tmp_path, "run", 40, rows=rows)


def test_a_row_that_does_not_fit_is_left_out_if_that_is_asked_for(tmp_path, caplog):
    rows = [*make_rows(7), LONG]
    with caplog.at_level("WARNING"):
        trainer, _ = trained(tmp_path, "run", 40, rows=rows, on_oversized_row="skip", max_steps=3)
    assert trainer.out_of_memory.skipped == [7]
    assert trainer.state.global_step == 3
    assert sum("Left out: row 7 of the prepared train dataset" in record.message for record in caplog.records) == 1
    pairs = zip(trainer.model.parameters(), make_llama().double().parameters(), strict=True)
    changed = [(a - b).abs().max() for a, b in pairs]
    assert max(changed) > 0


def test_a_loss_of_the_whole_batch_is_not_halved(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be halved, because loss_type \['aot'\] is not a sum over pairs"):
        trained(tmp_path, "run", 60, loss_type="aot", reference="auto")


def test_a_collator_that_tells_no_rows_is_not_halved(tmp_path):
    trainer = tiny_trainer(tmp_path, num_rows=8)
    own = trainer.data_collator
    trainer.data_collator = lambda rows: dict(own(rows))
    Allocator(trainer.model, 20)
    with pytest.raises(ValueError, match="the data_collator does not say which rows a batch holds"):
        trainer.train()


def test_another_error_is_not_taken_for_memory(tmp_path):
    trainer = tiny_trainer(tmp_path, num_rows=8)
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", True),
        ("CUDA error: out of memory", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
        ("DataLoader worker is killed by signal: Bus error. Its workers may be out of shared memory", False),
        ("size mismatch", False),
    ],
)
def test_errors_of_memory_are_known_by_their_words(message, expected):
    assert is_out_of_memory(RuntimeError(message)) == expected


def test_the_parts_of_a_batch_hold_its_rows_once():
    rows = [{"prompt_ids": [1], "responses": [[2, i], [3]], "preferences": [[0, 1]]} for i in range(6)]
    collator = PackingCollator(max_tokens=8)
    collated = collator(rows)
    known = examples_of(collated)
    assert len(known) == len(microbatches_of(collated)) > 1
    assert sorted(number for examples in known for number, _ in examples) == list(range(6))
    for part, examples in zip(microbatches_of(collated), known, strict=True):
        again, batch = collator.batch_of(examples), PackedBatch(**part)
        assert torch.equal(again.input_ids, batch.input_ids)
        assert torch.equal(again.example_ids, batch.example_ids)
