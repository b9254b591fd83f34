"""Several evaluation datasets, the best checkpoint by a preference metric, and early stopping."""

import json

import pytest
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from tiny import make_llama, make_rows, make_tokenizer
from transformers import EarlyStoppingCallback

from fastdpo import DPOConfig, DPOTrainer

PARTS = {"seen": make_rows(5, seed=1), "unseen": make_rows(7, seed=2)}


def trainer(tmp_path, eval_dataset, callbacks=None, **settings):
    defaults = {
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "beta": 0.5,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_only_model": True,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    return DPOTrainer(
        make_llama(),
        args=DPOConfig(str(tmp_path), **{**defaults, **settings}),
        train_dataset=Dataset.from_list(make_rows(12)),
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        callbacks=callbacks,
    )


def evaluations(fast, key):
    return [entry[key] for entry in fast.state.log_history if key in entry]


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_each_of_several_datasets_has_metrics_of_its_own(tmp_path, kind):
    fast = trainer(tmp_path, kind({name: Dataset.from_list(rows) for name, rows in PARTS.items()}), max_steps=1)
    metrics = fast.evaluate()
    for name, rows in PARTS.items():
        alone = fast.evaluate(Dataset.from_list(rows), metric_key_prefix="eval")
        for key in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy"):
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(alone[f"eval_{key}"], rel=1e-5, abs=1e-7), key
    assert set(fast.data_reports) >= {"train", "eval_seen", "eval_unseen"}


@pytest.mark.parametrize(
    ("metric", "several"),
    [
        ("eval_rewards/margins", False),
        ("rewards/accuracies", False),
        ("eval_unseen_rewards/margins", True),
        ("eval_loss", False),
    ],
)
def test_the_best_checkpoint_by_a_preference_metric_is_loaded_at_the_end(tmp_path, metric, several):
    parts = {name: Dataset.from_list(rows) for name, rows in PARTS.items()}
    fast = trainer(
        tmp_path, parts if several else parts["unseen"], load_best_model_at_end=True, metric_for_best_model=metric
    )
    fast.train()
    values = evaluations(fast, metric if metric.startswith("eval_") else f"eval_{metric}")
    assert len(values) == 4
    best = min(values) if metric.endswith("loss") else max(values)
    assert fast.state.best_metric == best
    step = values.index(best) + 1
    assert fast.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    for name, weight in fast.model.state_dict().items():
        if name in saved:
            assert (weight == saved[name]).all(), name


def test_training_stops_early_where_margins_stop_growing(tmp_path):
    fast = trainer(
        tmp_path,
        Dataset.from_list(PARTS["unseen"]),
        [EarlyStoppingCallback(early_stopping_patience=1)],
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins",
        learning_rate=0.0,
        max_steps=6,
    )
    fast.train()
    assert fast.state.global_step == 2  # nothing is learned: the second evaluation is no better than the first
    assert fast.state.best_model_checkpoint.endswith("checkpoint-1")


def test_two_callbacks_of_one_class_go_on_from_their_last_states_and_a_save_keeps_no_older_ones(tmp_path):
    settings = {"save_only_model": False, "metric_for_best_model": "eval_rewards/margins", "learning_rate": 0.0}
    patient = [EarlyStoppingCallback(8), EarlyStoppingCallback(9)]
    first = trainer(tmp_path, Dataset.from_list(PARTS["unseen"]), patient, max_steps=3, **settings)
    first.train()
    states = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["stateful_callbacks"]
    counters = [state["attributes"]["early_stopping_patience_counter"] for state in states["EarlyStoppingCallback"]]
    assert counters == [2, 2]  # the first evaluation is the best one
    again = [EarlyStoppingCallback(8), EarlyStoppingCallback(9)]
    trainer(tmp_path, Dataset.from_list(PARTS["unseen"]), again, max_steps=4, **settings).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert [callback.early_stopping_patience_counter for callback in again] == [3, 3]
    older = {"args": {}, "attributes": {"early_stopping_patience_counter": 0}}
    now = {"args": {}, "attributes": {"early_stopping_patience_counter": 7}}
    first.state.stateful_callbacks["EarlyStoppingCallback"] = [older, older, now, now]  # as Trainer alone saves them
    first._restore_callbacks()
    assert [callback.early_stopping_patience_counter for callback in patient] == [7, 7]
