"""The warnings of a run: each fires where it should, once, with its number, and not where it should not."""

import json
import math
from types import SimpleNamespace

import pytest
from tiny import make_llama
from tiny_runs import make_lora, tiny_trainer

from fastdpo.training.callbacks.warning_checks import CHECKS
from fastdpo.training.callbacks.watch import WARNINGS_FILE, TrainingWatch

HEALTHY = {
    "rewards/chosen": 0.2,
    "rewards/rejected": -0.3,
    "rewards/margins": 0.5,
    "rewards/accuracies": 0.7,
    "rewards/weight": 0.4,
    "logps/chosen": -100.0,
    "logps/rejected": -110.0,
    "lengths/chosen": 50.0,
    "lengths/rejected": 45.0,
}


class Run:
    """Feeds a watch logs of 32 pairs a step, by default of as many steps as the watch takes means over."""

    def __init__(self, output_dir, mode="frozen", step=0, **settings):
        self.watch = TrainingWatch(has_reference=mode != "none", first_means=dict)
        self.args = SimpleNamespace(
            output_dir=str(output_dir),
            train_batch_size=8,
            gradient_accumulation_steps=2,
            data_parallel_size=2,
            beta=0.1,
            **{"loss_type": ["sigmoid"], "loss_weights": None, "ld_alpha": None, "sync_ref_model": False, **settings},
        )
        self.state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        self.watch.on_train_begin(self.args, self.state, None)

    def log(self, steps=8, **changes):
        self.state.global_step += steps
        logs = {**HEALTHY, **{key.replace("__", "/"): value for key, value in changes.items()}}
        self.watch.on_log(self.args, self.state, None, logs=logs)
        return self.watch.given


BAD = {  # name of the warning: (logs that earn it, what its message holds)
    "chosen_falls": ({"rewards__chosen": -1.5, "rewards__margins": 0.8}, ["15.0 nats", "0.800", '"sft"', "[1.0, 0.2]"]),
    "accuracy_saturated": ({"rewards__accuracies": 0.996, "rewards__weight": 0.021}, ["99.6%", "0.021"]),
    "margin_collapse": ({"rewards__margins": 0.2, "rewards__chosen": 0.1}, ["0.200", "2.000"]),
    "logratio_blowup": ({"rewards__rejected": -9.0}, ["rejected", "-2.00 nats per token", "-90 per response"]),
    "length_drift": ({"lengths__chosen": 90.0}, ["90 tokens", "45", "2.00 times", "good"]),
}


def test_every_check_is_tried():
    assert set(BAD) == set(CHECKS)


@pytest.mark.parametrize("name", BAD)
def test_it_fires_once_with_its_number(name, tmp_path, caplog):
    logs, words = BAD[name]
    run = Run(tmp_path)
    run.log(rewards__margins=2.0 if name == "margin_collapse" else 0.5)
    assert run.watch.given == {}
    with caplog.at_level("WARNING"):
        given = run.log(**logs)
        run.log(**logs)
    assert set(given) == {name}
    for word in words:
        assert word in given[name], word
    assert caplog.text.count(given[name]) == 1
    [line] = [json.loads(line) for line in (tmp_path / WARNINGS_FILE).read_text().splitlines()]
    assert line["name"] == name
    assert line["message"] == given[name]


@pytest.mark.parametrize(
    "logs",
    [
        {},
        {"rewards__chosen": -0.9, "rewards__margins": 0.8},  # 9 nats: not yet
        {"rewards__chosen": -1.5, "rewards__margins": -0.1, "rewards__rejected": -1.4},  # no margin is gained by it
        {"rewards__accuracies": 0.98},
        {"rewards__margins": 0.01},  # margins were never worth a warning
        {"rewards__rejected": -4.0},  # 40 nats over 45 tokens
        {"rewards__rejected": -1.9, "lengths__rejected": 5.0, "lengths__chosen": 5.0},  # 19 nats over 5 tokens
        {"lengths__chosen": 60.0},
    ],
    ids=lambda logs: " ".join(logs) or "healthy",
)
def test_it_does_not_fire_below_its_threshold(tmp_path, logs):
    run = Run(tmp_path)
    run.log(rewards__margins=0.4)
    assert run.log(**logs) == {}
    assert not (tmp_path / WARNINGS_FILE).exists()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("margin_collapse", {"sync_ref_model": True}),  # each move of the reference takes margins away
        ("length_drift", {"loss_type": ["sigmoid_norm", "sft"]}),
        ("length_drift", {"ld_alpha": 0.5}),
    ],
    ids=str,
)
def test_it_does_not_fire_where_the_run_means_it(tmp_path, name, settings):
    run = Run(tmp_path, **settings)
    run.log(rewards__margins=2.0 if name == "margin_collapse" else 0.5)
    assert run.log(**BAD[name][0]) == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": ["ipo"]}, 'loss_type=["ipo", "sft"], loss_weights=[1.0, 0.2]'),
        (
            {"loss_type": ["hinge", "robust"], "loss_weights": [2.0, 0.5]},
            'loss_type=["hinge", "robust", "sft"], loss_weights=[2.0, 0.5, 0.2]',
        ),
        ({"loss_type": ["sigmoid", "sft"]}, "Increase the weight of the chosen responses' likelihood"),
        ({"loss_type": ["plackett_luce"]}, "a listwise loss cannot"),
    ],
    ids=str,
)
def test_what_holds_chosen_responses_is_said_in_settings_of_the_run(tmp_path, settings, words):
    run = Run(tmp_path, **settings)
    run.log()
    assert words in run.log(**BAD["chosen_falls"][0])["chosen_falls"]


def test_a_few_pairs_are_not_enough(tmp_path):
    run = Run(tmp_path)
    assert run.log(steps=7, rewards__accuracies=1.0) == {}
    assert set(run.log(steps=1, rewards__accuracies=1.0)) == {"accuracy_saturated"}


def test_means_are_over_the_last_pairs_and_weigh_them_alike(tmp_path):
    """The window is 8 steps: first at 1.0, then half of it at 0.4, then 4 steps at 0.4 and 4 at 0.1."""
    run = Run(tmp_path)
    run.log(rewards__margins=1.0)
    assert run.log(steps=4, rewards__margins=0.4) == {}
    assert "collapsed from 1.000 to 0.250" in run.log(steps=4, rewards__margins=0.1)["margin_collapse"]


def test_without_a_reference_log_probs_are_compared_with_the_beginning(tmp_path):
    run = Run(tmp_path, mode="none")
    assert run.log(rewards__chosen=-10.0, rewards__rejected=-11.0, rewards__margins=0.5) == {}
    given = run.log(logps__chosen=-112.0, rewards__margins=0.9)
    assert set(given) == {"chosen_falls"}
    assert "12.0 nats less likely on average than when training began" in given["chosen_falls"]


def test_a_resumed_run_does_not_repeat_itself_and_a_new_one_does(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        Run(tmp_path).log(rewards__accuracies=1.0)
        assert "100.0%" in caplog.text
        caplog.clear()
        with (tmp_path / WARNINGS_FILE).open("a") as file:
            file.write('{"step": 8, "name": "chosen_')  # where a kill cut it off
        Run(tmp_path, step=8).log(rewards__accuracies=1.0)
        assert caplog.text == ""
        Run(tmp_path, step=8).log(**BAD["length_drift"][0])
        assert set(Run(tmp_path, step=16).watch.given) == {"accuracy_saturated", "length_drift"}
        caplog.clear()
        Run(tmp_path).log(rewards__accuracies=1.0)
        assert "100.0%" in caplog.text


def test_a_reference_that_is_not_the_start_is_named_at_the_first_step(tmp_path, caplog):
    fast = tiny_trainer(tmp_path, ref_model=make_llama(seed=7), logging_steps=3, gradient_accumulation_steps=2)
    with caplog.at_level("WARNING"):
        fast.train()
    assert set(fast.watch.given) == {"reference_is_not_the_start"}
    message = fast.watch.given["reference_is_not_the_start"]
    assert caplog.text.count(message) == 1
    assert "the first loss is not ln 2" in message
    assert math.isfinite(float(message.split("differ by ")[1].split(" nats")[0]))


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"reference": "none"}, {"peft_config": None}, {"training_warnings": False}],
    ids=["frozen", "bf16", "none", "LoRA", "off"],
)
def test_a_run_from_its_own_start_warns_of_nothing(tmp_path, settings):
    if "peft_config" in settings:
        settings = {"peft_config": make_lora()}
    if "training_warnings" in settings:
        settings = {**settings, "ref_model": make_llama(seed=7)}
    fast = tiny_trainer(tmp_path, **settings)
    fast.train()
    assert fast.watch is None if "training_warnings" in settings else fast.watch.given == {}
    assert not (tmp_path / WARNINGS_FILE).exists()
