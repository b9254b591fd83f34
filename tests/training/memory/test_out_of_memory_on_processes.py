"""One of two processes runs out of memory: it halves its micro-batches, both end in the same weights as without."""

import os

import pytest
import torch
from datasets import Dataset
from processes import on_processes
from test_out_of_memory import Allocator
from tiny import make_llama, make_rows
from tiny_runs import logged, tiny_trainer

CASES = {
    "forward": {"where": "forward"},
    "backward": {"where": "backward"},
    "accumulation": {"where": "backward", "gradient_accumulation_steps": 3},
    "budget": {"where": "forward", "max_tokens_per_microbatch": 90},
    "repeated rows": {"where": "backward", "num_rows": 13, "max_steps": 2},
    "buffers": {"where": "forward", "ddp_broadcast_buffers": True},
    "dropout": {"where": "nowhere", "disable_dropout": False},
}


def two_runs(folder, where, **settings):
    """The same run without and with a limit of memory on process 1: what differs in its end."""
    rank = int(os.environ["RANK"])
    options = {"num_rows": 24, "max_steps": 3, "per_device_train_batch_size": 6, "reference": "none", **settings}
    options = {"loss_type": "simpo", "beta": 2.0, "optim": "sgd", "learning_rate": 0.1, **options}
    trainers, failures = [], 0
    for name, is_limited in (("whole", False), ("halved", rank == 1)):
        dropout = 0.0 if where != "nowhere" else 0.1
        model = make_llama(attention_dropout=dropout).double()
        trainer = tiny_trainer(folder / name, model, **options)
        allocator = Allocator(trainer.model, 60, where=where) if is_limited and where != "nowhere" else None
        if where == "nowhere" and name == "halved":  # as in a resumed run
            trainer._halving._most = 10**6
        trainer.train()
        evaluated = trainer.evaluate(Dataset.from_list(make_rows(7, seed=3)))
        failures += allocator.failures if allocator else 0
        trainers.append((trainer, evaluated))
    (whole, before), (halved, after) = trainers
    pairs = list(zip(halved.model.parameters(), whole.model.parameters(), strict=True))
    return {
        "weights": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        "bits": all(torch.equal(a, b) for a, b in pairs),
        "losses": [logged(halved), logged(whole)],
        "eval": [after["eval_loss"], before["eval_loss"]],
        "failures": failures,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = on_processes(two_runs, list(CASES.values()), tmp_path_factory.mktemp("oom"))
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case != "dropout"])
def test_one_process_halves_and_both_end_in_the_same_weights(results, case):
    first, second = results[case]
    assert first["failures"] == 0 < second["failures"]
    for found in (first, second):
        assert found["weights"] < 1e-9
        assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-4)
        assert found["eval"][0] == pytest.approx(found["eval"][1], rel=1e-5)


def test_a_run_that_has_met_its_sizes_before_draws_the_same_random_numbers(results):
    assert [found["bits"] for found in results["dropout"]] == [True, True]
