"""Two processes with rows in parts whose prompts run once end in the weights of whole rows."""

import os

import pytest
import torch
from datasets import Dataset
from processes import on_processes
from test_out_of_memory import MESSAGE
from tiny import make_llama
from tiny_runs import logged, tiny_trainer

# prompts of 4 tokens, each process gets one row with two parts and one that is whole
ROWS = [
    {
        "prompt_ids": [1, 5 + i, 6, 7],
        "chosen_ids": [8 + i, 9, 10, 11, 12][: 5 if i % 2 else 1],
        "rejected_ids": [13, 14 + i, 15, 16, 17][: 5 if i % 2 else 1],
    }
    for i in range(8)
]
PARTS = {"max_tokens_per_microbatch": 10, "on_oversized_row": "split"}
CASES = {
    "fits": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "buffers": {"ddp_broadcast_buffers": True},
    "out of memory": {"fails": True},
    "out of memory, accumulation": {"fails": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


def two_runs(folder, fails=False, **settings):
    """The same run of whole rows and of rows in parts; with `fails`, process 1 has no memory for a part's backward."""
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "reference": "none", **settings}
    options = {"loss_type": "simpo", "beta": 2.0, "optim": "sgd", "learning_rate": 0.1, **options}
    trainers, prompts, failures = [], [], []
    for name, more in (("whole", {}), ("parts", PARTS)):
        model = make_llama().double()
        trainer = tiny_trainer(folder / name, model, train_dataset=Dataset.from_list(ROWS), **options, **more)

        def before(module, args):
            if torch.is_grad_enabled() and args[0].numel() == 4:
                prompts.append(4)

        def backward(module, grad_input, grad_output):
            if fails and os.environ["RANK"] == "1" and grad_output[0].shape[1] == 5:
                failures.append(5)
                raise torch.OutOfMemoryError(MESSAGE)

        model.get_input_embeddings().register_forward_pre_hook(before)
        model.model.layers[0].register_full_backward_hook(backward)
        trainer.train()
        trainers.append(trainer)
    whole, parts = trainers
    pairs = zip(parts.model.parameters(), whole.model.parameters(), strict=True)
    return {
        "weights": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        "losses": [logged(parts), logged(whole)],
        "norms": [logged(parts, "grad_norm"), logged(whole, "grad_norm")],
        "prompts": len(prompts),
        "failures": len(failures),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = on_processes(two_runs, list(CASES.values()), tmp_path_factory.mktemp("parts"))
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_in_the_weights_of_whole_rows(results, case):
    for rank, found in enumerate(results[case]):
        assert found["prompts"] > 0
        assert found["failures"] == (1 if rank == 1 and "memory" in case else 0)
        assert found["weights"] < 1e-6  # norms are in fp32
        assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-5)
        assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-4)
