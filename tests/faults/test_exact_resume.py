"""A run that is killed and resumed ends in the weights, logs, samples and warnings of one that is not, bit by bit."""

import shutil

import pytest
import torch
from killing import RESULT, differences, end_of, output, train_until

from fastdpo.training.saving.progress import Progress, load_progress, save_progress

LONG = {"max_steps": 20}  # 22 rows are 11 steps: the second epoch
EVERY_2 = {"eval_strategy": "steps", "eval_steps": 2}
SAMPLES = {"num_eval_samples": 2, "eval_sample_tokens": 5, "eval_sample_temperature": 1.0}
CACHED = {"reference": "cached", "ref_tokens_per_batch": 64}
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2}
BUDGET = {"max_tokens_per_microbatch": 24, "per_device_train_batch_size": 4}
BEST = {
    **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
    **dict.fromkeys(("eval_steps", "save_steps"), 1),
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}
WORKERS = {"dataloader_num_workers": 2}
WARNED = {"max_steps": 40, "save_steps": 17, "num_rows": 64, "per_device_train_batch_size": 16, "learning_rate": 3e-2}

# settings, and the moments at which the run is killed, one after the other
QUICK = {
    "killed twice, with LoRA and a moving reference": (
        {"save_steps": 2, "adapter": {}, **SYNCED},
        [("step", 5), ("step", 3)],
    ),
    "between the steps of an accumulation, with a token limit": (
        {"gradient_accumulation_steps": 3, "save_steps": 2, **BUDGET},
        [("substep", 11)],
    ),
    "in an evaluation, after one at the start, with workers": (
        {**EVERY_2, **WORKERS, "max_steps": 6, "eval_on_start": True},
        [("evaluation", 10)],
    ),
    "in the precompute": ({**CACHED, "max_steps": 4}, [("precompute", 2)]),
    "in the samples": ({**EVERY_2, **SAMPLES, "max_steps": 6}, [("generate", 4)]),
    "a stream that is read again, shuffled": ({"max_steps": 15, "stream": "shuffled"}, [("step", 14)]),
    "an epoch that ends after its checkpoint": (
        {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_steps": 11, "max_steps": 15},
        [("step", 12)],
    ),
}
SLOW = {
    "in a step, in the second epoch": (LONG, [("step", 16)]),
    "the last step, when it is saved": ({"eval_strategy": "epoch"}, [("saved", 3)]),
    "streams with workers": ({**LONG, **WORKERS, "stream": "plain"}, [("step", 16)]),
    "a generator's stream": ({**LONG, "stream": "generator"}, [("step", 14)]),
    "a stream that is accumulated": ({**LONG, "stream": "plain", "gradient_accumulation_steps": 2}, [("step", 16)]),
    "a stream at its end": ({**LONG, "stream": "plain", "save_steps": 11, "eval_strategy": "epoch"}, [("step", 14)]),
    "similar lengths": ({**LONG, "length_bucketing": True, **WORKERS}, [("step", 16)]),
    "rows of a prompt together": ({**LONG, "regroup_dataset": True}, [("step", 16)]),
    "an order from torch's random state": (
        {**LONG, "accelerator_config": {"use_seedable_sampler": False}},
        [("step", 16)],
    ),
    "an incomplete accumulation at the end of an epoch": (
        {"gradient_accumulation_steps": 3, "max_steps": 10, "save_steps": 4},
        [("substep", 15)],
    ),
    "a token limit, accumulated, in a length order": (
        {**BUDGET, "gradient_accumulation_steps": 2, "length_bucketing": True},
        [("step", 5)],
    ),
    "padded batches with workers": ({**WORKERS, "packing": "padded"}, [("step", 5)]),
    "a moving reference": (SYNCED, [("step", 5)]),
    "LoRA and workers": ({"adapter": {}, **WORKERS}, [("step", 5)]),
    "LoRA on embeddings": ({"adapter": {"modules_to_save": ["lm_head"]}}, [("step", 5)]),
    "a cached reference, with LoRA": ({**CACHED, "adapter": {}}, [("step", 5)]),
    "the precompute in fp64": ({**CACHED, "dtype": "float64"}, [("precompute", 2)]),
    "the precompute, twice": (CACHED, [("precompute", 1), ("precompute", 1)]),
    "SFT": ({"sft": True}, [("step", 5)]),
    "SFT, accumulated, with workers and a token limit": (
        {"sft": True, "gradient_accumulation_steps": 2, **WORKERS, **BUDGET},
        [("substep", 5)],
    ),
    "a loss over tokens": ({"loss_type": ["sigmoid", "sft"], "gradient_accumulation_steps": 2}, [("step", 5)]),
    "fp16 with a scaler": ({"fp16": True}, [("step", 5)]),
    "bf16": ({"bf16": True}, [("step", 5)]),
    "weights in bf16": ({"dtype": "bfloat16"}, [("step", 5)]),
    "the best model": (BEST, [("saved", 5)]),
    "the best model, between evaluation and save": (BEST, [("evaluated", 5)]),
    "a run that stops early": ({**BEST, "early_stopping": 1, **LONG}, [("saved", 2)]),
    "a run that stops early, twice": ({**BEST, "early_stopping": 2, **LONG}, [("evaluated", 2), ("saved", 2)]),
    "samples of the start, before the first are shown": (
        {"eval_strategy": "steps", "eval_steps": 6, **SAMPLES, **CACHED},
        [("step", 5)],
    ),
    "samples beside a cached reference": ({**EVERY_2, **SAMPLES, **CACHED}, [("generate", 3)]),
    "an evaluation, saved every epoch": (
        {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": 30},
        [("evaluation", 10)],
    ),
    "epochs, not steps": ({"num_train_epochs": 2.5, "max_steps": -1, "save_steps": 4}, [("step", 21)]),
    "the last step, and an epoch's log": ({"logging_strategy": "epoch"}, [("saved", 3)]),
    "three times": ({"save_steps": 2, **EVERY_2}, [("step", 3), ("evaluation", 6), ("saved", 2)]),
    "warnings": (WARNED, [("step", 38)]),
    "warnings, before they are given": (WARNED, [("step", 18)]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that has come to its end, which no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    assert train_until(folder, {}) == 0, output(folder)
    return folder


def check(folder, settings, moments):
    assert train_until(folder / "whole", settings) == 0, output(folder / "whole")
    cut = folder / "cut"
    for moment in moments:
        status = train_until(cut, settings, moment, resume=any(cut.glob("out/checkpoint-*")))
        assert status == -9, (moment, output(cut))
    assert train_until(cut, settings, resume=any(cut.glob("out/checkpoint-*"))) == 0, output(cut)
    assert differences(end_of(folder / "whole"), end_of(cut)) == []
    return end_of(cut)


@pytest.mark.parametrize("case", QUICK)
def test_a_killed_run_ends_like_one_that_is_not(tmp_path, case):
    check(tmp_path, *QUICK[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_a_killed_run_of_another_kind_ends_like_one_that_is_not(tmp_path, case):
    end = check(tmp_path, *SLOW[case])
    if case.startswith("warnings"):
        assert end["warnings"].count("\n") >= 1


def test_the_comparison_sees_a_run_of_other_dropout(finished, tmp_path):
    """Else equal weights would say nothing of random states."""
    assert train_until(tmp_path, {"dropout": 0.2}) == 0
    found = differences(end_of(finished), end_of(tmp_path))
    assert len(found) > 20


def test_a_finished_run_takes_no_further_step_when_it_is_resumed(finished, tmp_path):
    again = shutil.copytree(finished, tmp_path / "again")
    (again / RESULT).unlink()
    assert train_until(again, {}, resume=True) == 0
    assert differences(end_of(finished), end_of(again)) == []


def test_a_finished_run_goes_on_if_it_is_given_more_steps(tmp_path):
    """As if it had had them from the start: the rate of learning does not change."""
    constant = {"lr_scheduler_type": "constant"}
    assert train_until(tmp_path / "whole", {**constant, **LONG}) == 0
    assert train_until(tmp_path / "cut", constant) == 0
    assert train_until(tmp_path / "cut", {**constant, **LONG}, resume=True) == 0
    weights = [end_of(tmp_path / name)["weights"] for name in ("whole", "cut")]
    assert all(weights[0][name].equal(weight) for name, weight in weights[1].items())


@pytest.mark.slow
def test_a_finished_stream_goes_on_if_it_is_given_more_steps(tmp_path):
    settings = {"lr_scheduler_type": "constant", "stream": "plain", "num_rows": 64}
    assert train_until(tmp_path / "whole", {**settings, **LONG}) == 0
    assert train_until(tmp_path / "cut", settings) == 0
    assert train_until(tmp_path / "cut", {**settings, **LONG}, resume=True) == 0
    weights = [end_of(tmp_path / name)["weights"] for name in ("whole", "cut")]
    assert all(weights[0][name].equal(weight) for name, weight in weights[1].items())


def test_the_progress_of_another_number_of_processes_is_not_read(tmp_path):
    """Else the first process would be at another place than those that find no file."""
    progress = Progress(2, 0.5, 1.5, 4, {}, 7, None, None, "00", 0, 0, False, False)
    save_progress(progress, tmp_path, 0)
    assert load_progress(tmp_path, 0, 2) == progress
    assert load_progress(tmp_path, 0, 1) is None
    assert load_progress(tmp_path, 2, 3) is None


def test_an_optimizer_is_loaded_to_a_cpu_with_a_number(tmp_path):
    """The device of one of several processes; transformers 5.17 gives it to torch.load."""
    torch.save({"exp_avg": torch.tensor([1.0, 2.0])}, tmp_path / "optimizer.pt")
    found = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 1), weights_only=True)
    assert found["exp_avg"].tolist() == [1.0, 2.0]
