"""Two processes give the losses and the weights of one: gradients are reduced, the mean is over the pairs of both."""

import pytest
import sharded_runs
import torch
from datasets import Dataset, IterableDataset
from parallel_record import works
from processes import on_processes
from test_fsdp import assert_like_one
from tiny import make_llama, make_rows
from tiny_runs import make_lora, tiny_trainer

CASES = {  # of each of two processes
    "full": {"mode": "full", "batch_size": 1, "accumulation": 2},
    "lora": {"mode": "lora", "batch_size": 2},
    "none": {"mode": "none", "batch_size": 2},
    "parts": {"mode": "parts", "batch_size": 2},
    "not finite": {"mode": "not finite", "batch_size": 2},
    **{mode: {"mode": mode, "batch_size": 2} for mode in ("uneven pairs", "uneven pairs, in order")},
}


def train(folder, mode, batch_size, accumulation=1):
    """What a process has seen of a run, whose evaluation before training must not leave the model unwrapped."""
    if mode == "not finite":
        return train_into_infinity(folder, batch_size)
    if mode.startswith("uneven pairs"):
        return sharded_runs.train(folder, mode, steps=5, num_processes=2, is_sharded=False)
    settings = {
        "full": {},
        "lora": {"peft_config": make_lora(), "learning_rate": 1e-2, "sync_ref_model": True, "ref_model_sync_steps": 2},
        "none": {
            "reference_free": True,
            "loss_type": ["sigmoid", "sft"],  # sft: a mean over the tokens of both
            "train_dataset": IterableDataset.from_generator(_rows_of_files, gen_kwargs={"sizes": [3, 13]}),
        },
        "parts": {"max_tokens_per_microbatch": 12, "on_oversized_row": "split"},  # some rows have two parts, some one
    }[mode]
    evaluated = Dataset.from_list(make_rows(5, seed=1))
    predictions = []

    def compute_metrics(prediction):
        predictions.append(prediction.predictions["chosen_logps"].tolist())
        return {"first_length": int(prediction.label_ids[0, 0])}

    trainer = tiny_trainer(
        folder,
        max_steps=4,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        eval_dataset=evaluated.to_iterable_dataset() if mode == "lora" else evaluated,
        compute_metrics=compute_metrics,
        **settings,
    )
    trainer.evaluate()
    trainer.train()
    evaluated = trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: p.double().sum().item() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {"logs": logs, "weights": weights, "eval": evaluated, "predictions": predictions[-1]}


def _rows_of_files(sizes):
    """A stream of two files, so that each process could read one: the shorter would end in the first step."""
    for size in sizes:
        yield from make_rows(size, seed=size)


def train_into_infinity(folder, batch_size):
    """One row of four has a token whose embedding is infinite: one process meets it."""
    rows = [{"prompt_ids": [1, first], "chosen_ids": [6], "rejected_ids": [7]} for first in (5, 6, 7, 31)]
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[31] = float("inf")
    trainer = tiny_trainer(folder, model, train_dataset=rows, per_device_train_batch_size=batch_size)
    before = model.lm_head.weight.clone()
    try:
        trainer.train()
        message = "went on"
    except FloatingPointError as error:
        message = str(error)
    return {"message": message, "is_unchanged": torch.equal(before, model.lm_head.weight)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def of_two(folder):
    """By case, what each of two processes has seen."""
    return dict(zip(CASES, on_processes(train, list(CASES.values()), folder), strict=True))


@pytest.mark.parametrize("mode", ["full", "lora", "none", "parts"])
def test_two_processes_train_like_one(tmp_path, of_two, mode):
    one, two = train(tmp_path, mode, 4), of_two[mode][0]
    assert len(one["logs"]) == 4
    for single, double in zip(one["logs"], two["logs"], strict=True):
        for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy", "num_tokens"):
            assert double[key] == pytest.approx(single[key], rel=1e-4, abs=1e-5), key
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-4)
    # 5 rows on two processes: the last step repeats rows, which must not count twice
    assert len(one["predictions"]) == 5
    with works("DDP", "evaluation", processes=2, steps=4):
        assert two["predictions"] == pytest.approx(one["predictions"], rel=1e-4)  # in the order of the rows
        for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_first_length"):
            assert two["eval"][key] == pytest.approx(one["eval"][key], abs=1e-5), key
    assert one["logs"][0]["loss"] != one["logs"][-1]["loss"]


def test_a_loss_that_is_not_finite_stops_all_processes_before_any_steps(of_two):
    found = of_two["not finite"]
    assert "the loss is nan at step 0" in found[0]["message"]
    assert found[0]["message"] == found[1]["message"]
    assert all(process["is_unchanged"] for process in found)


@pytest.mark.parametrize("mode", ["uneven pairs", "uneven pairs, in order"])
def test_in_an_epochs_last_step_a_process_may_have_no_rows(mode, of_two, folder, tmp_path):
    """9 rows are steps of 4, 4 and 1; accelerate fills the last with rows of the first, which must not count again."""
    features = ["balance_ranks"] if mode == "uneven pairs" else []
    with works("DDP", "uneven pairs", "fewer rows than processes", *features, processes=2, steps=5):
        of_case = folder / str(list(CASES).index(mode))
        assert_like_one(mode, of_case, of_two[mode], tmp_path / "one", 5, is_sharded=False)


def test_rows_dealt_by_their_tokens_leave_less_to_wait_for(of_two):
    def imbalances(mode):
        return [log["rank_imbalance"] for log in of_two[mode][0]["logs"]]

    dealt, in_order = imbalances("uneven pairs"), imbalances("uneven pairs, in order")
    assert all(imbalance >= 1 for imbalance in dealt + in_order)
    of_four_rows = (0, 1, 3, 4)
    assert sum(dealt[step] for step in of_four_rows) < sum(in_order[step] for step in of_four_rows) - 0.1
