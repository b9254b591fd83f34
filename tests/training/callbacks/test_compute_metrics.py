"""compute_metrics and predict get exact numbers of every pair, in the order of the rows, from the one forward of the
evaluation; and an evaluation before training is one of the start.
"""

import copy
import math

import numpy as np
import pytest
import torch
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import logged, tiny_config, tiny_trainer

from fastdpo import DPOTrainer
from fastdpo.training.callbacks.predictions import PAIR_VALUES

ROWS = make_rows(7, seed=1)
LN2 = math.log(2)


def evaluated(output_dir, **settings):
    """The metrics of an evaluation, and what compute_metrics saw."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"best": float(prediction.predictions["chosen_rewards"].max()), "eval_count": len(prediction.label_ids)}

    fast = tiny_trainer(
        output_dir, ref_model=make_llama(seed=7), eval_dataset=ROWS, compute_metrics=compute_metrics, **settings
    )
    return fast.evaluate(), seen


def test_a_prediction_step_of_a_subclass_needs_no_more_than_compute_loss(tmp_path):
    seen = []

    class OwnStep(DPOTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            with torch.no_grad():
                loss, _ = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
            return loss, None, None

    for kind in (OwnStep, DPOTrainer):
        kind(
            make_llama(),
            make_llama(seed=7),
            tiny_config(tmp_path, per_device_eval_batch_size=3),
            eval_dataset=ROWS,
            processing_class=make_tokenizer(),
            compute_metrics=lambda prediction: seen.append(prediction.predictions["rejected_logps"].tolist()) or {},
        ).evaluate()
    assert len(seen[0]) == 7
    assert seen[0] == seen[1]


def one_by_one(output_dir):
    """The metrics of each row in an evaluation of its own."""
    fast = tiny_trainer(output_dir, ref_model=make_llama(seed=7), eval_dataset=ROWS)
    return [fast.evaluate([row]) for row in ROWS]


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_eval_batch_size": 3},
        {"per_device_eval_batch_size": 7, "max_tokens_per_microbatch": 30},
        {"per_device_eval_batch_size": 7, "packing": "padded"},
    ],
    ids=["batches of 3", "micro-batches", "padded"],
)
def test_every_pair_has_its_numbers_in_the_order_of_the_rows(tmp_path, settings):
    metrics, [prediction] = evaluated(tmp_path, **settings)
    assert set(prediction.predictions) == set(PAIR_VALUES)
    rows = one_by_one(tmp_path)
    for name, key in [
        ("chosen_logps", "logps/chosen"),
        ("rejected_logps", "logps/rejected"),
        ("chosen_rewards", "rewards/chosen"),
        ("rejected_rewards", "rewards/rejected"),
    ]:
        np.testing.assert_allclose(prediction.predictions[name], [row[f"eval_{key}"] for row in rows], rtol=1e-4)
    references = prediction.predictions["chosen_logps"] - prediction.predictions["chosen_rewards"] / 0.5
    np.testing.assert_allclose(prediction.predictions["ref_chosen_logps"], references, rtol=1e-4)
    lengths = [[row["eval_lengths/chosen"], row["eval_lengths/rejected"]] for row in rows]
    np.testing.assert_array_equal(prediction.label_ids, lengths)
    assert metrics["eval_best"] == prediction.predictions["chosen_rewards"].max()
    assert metrics["eval_count"] == 7


def test_the_model_runs_once_for_each_batch(tmp_path):
    model = make_llama()
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    fast = tiny_trainer(
        tmp_path,
        model,
        reference="none",
        eval_dataset=ROWS,
        per_device_eval_batch_size=7,
        compute_metrics=lambda prediction: {"mean": prediction.predictions["chosen_logps"].mean()},
    )
    calls.clear()
    assert fast.evaluate()["eval_mean"] < 0
    assert len(calls) == 1


def test_predict_returns_the_numbers_and_evaluate_without_a_function_none(tmp_path):
    fast = tiny_trainer(tmp_path, eval_dataset=ROWS)
    output = fast.predict(ROWS)
    assert output.predictions["chosen_logps"].shape == (7,)
    assert output.label_ids.shape == (7, 2)
    assert output.metrics["test_logps/chosen"] == pytest.approx(output.predictions["chosen_logps"].mean(), rel=1e-5)
    assert fast._evaluation is None


def test_batch_eval_metrics_shows_every_pair_once_before_it_asks_for_the_result(tmp_path):
    rewards = []

    def compute_metrics(prediction, compute_result):
        """As they are written for batches: sums until the result is asked for."""
        rewards.extend(prediction.predictions["chosen_rewards"])
        return {"n": len(rewards), "mean": sum(rewards) / len(rewards)} if compute_result else {}

    fast = tiny_trainer(
        tmp_path,
        eval_dataset=ROWS,
        compute_metrics=compute_metrics,
        batch_eval_metrics=True,
        per_device_eval_batch_size=2,
    )
    metrics = fast.evaluate()
    assert metrics["eval_n"] == 7
    assert metrics["eval_mean"] == pytest.approx(metrics["eval_rewards/chosen"], rel=1e-5)


def test_its_metrics_choose_the_best_checkpoint(tmp_path):
    values = iter([1.0, 3.0, 2.0])
    fast = tiny_trainer(
        tmp_path,
        eval_dataset=ROWS,
        compute_metrics=lambda prediction: {"score": next(values)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    fast.train()
    assert fast.state.best_model_checkpoint.endswith("checkpoint-2")
    assert fast.state.best_metric == 3.0


def test_what_needs_inputs_or_returns_no_dict_is_refused(tmp_path):
    with pytest.raises(ValueError, match="include_for_metrics must be empty"):
        tiny_trainer(tmp_path, eval_dataset=ROWS, compute_metrics=lambda p: {}, include_for_metrics=["inputs"])
    fast = tiny_trainer(tmp_path, eval_dataset=ROWS, compute_metrics=lambda p: 1.0)
    with pytest.raises(ValueError, match="compute_metrics must return a dict"):
        fast.evaluate()


def test_a_function_that_reads_logits_is_told_what_there_is(tmp_path):
    def accuracy_of_tokens(prediction):
        logits, labels = prediction
        return {"accuracy": (logits.argmax(-1) == labels).mean()}

    fast = tiny_trainer(tmp_path, eval_dataset=ROWS, compute_metrics=accuracy_of_tokens)
    with pytest.raises(ValueError, match=r"chosen_logps.*no logits exist.*AttributeError: 'dict' object"):
        fast.evaluate()


def test_an_evaluation_before_training_is_one_of_the_start(tmp_path):
    model = make_llama()
    expected = tiny_trainer(tmp_path, copy.deepcopy(model), eval_dataset=ROWS).evaluate()
    fast = tiny_trainer(
        tmp_path, model, eval_dataset=ROWS, eval_on_start=True, eval_strategy="steps", eval_steps=3, max_steps=3
    )
    fast.train()
    first = fast.state.log_history[0]
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(LN2, abs=1e-6)
    for key in ("eval_logps/chosen", "eval_logps/rejected", "eval_entropy", "eval_mean_token_accuracy"):
        assert first[key] == pytest.approx(expected[key], rel=1e-6), key
    assert logged(fast)[0] == pytest.approx(LN2, abs=1e-6)
    assert logged(fast, "eval_loss")[-1] != pytest.approx(LN2, abs=1e-4)
