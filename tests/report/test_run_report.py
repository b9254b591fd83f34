"""The report of a run: read off what the run left in its directory."""

import importlib.util
import json
import os
import re

import pytest

from fastdpo.report.run import write_run_report
from fastdpo.training.callbacks.samples import SAMPLES_FILE
from fastdpo.training.callbacks.watch import WARNINGS_FILE

HISTORY = [
    {"step": 0, "eval_loss": 0.6931, "eval_rewards/margins": 0.0, "eval_rewards/accuracies": 0.0, "eval_runtime": 1.0},
    {"step": 1, "loss": 0.6931, "rewards/margins": 0.0, "rewards/accuracies": 0.5, "grad_norm": 3.0},
    {"step": 2, "loss": 0.6511, "rewards/margins": 0.0875, "rewards/accuracies": 0.75, "grad_norm": 2.0},
    {
        "step": 2,
        "eval_loss": 0.6622,
        "eval_rewards/margins": 0.0644,
        "eval_rewards/accuracies": 0.6,
        "eval_runtime": 1.0,
    },
    {"step": 2, "train_loss": 0.67, "train_runtime": 1.0},
]
NAMED = [("seen", 0.5125), ("aux", 0.6125)]
STATE = {"log_history": HISTORY, "global_step": 2, "epoch": 0.5}


def sample(step, policy, reference="as it was"):
    return {
        "step": step, "prompt": "a <b>prompt</b>", "policy": policy, "policy_tokens": 40 + step,
        "reference": reference, "reference_tokens": 77, "reference_name": "reference",
    }  # fmt: skip


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_of(path):
    """The page without tags, one cell a word group."""
    return re.sub(r"<[^>]+>", "|", path.read_text())


def test_it_shows_result_warnings_samples_and_settings(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    write_lines(tmp_path / WARNINGS_FILE, [{"step": 2, "name": "length_drift", "message": "90 tokens against 45"}])
    write_lines(tmp_path / SAMPLES_FILE, [sample(0, "before"), sample(1, "midway"), sample(2, "after")])
    path = write_run_report(tmp_path, {"loss": "sigmoid", "nothing": None})
    text = text_of(path)
    assert path == tmp_path / "report.html"
    assert "2 optimizer steps, 0.50 epochs" in text
    for cell in (
        "0.6931",
        "0.6511",
        "0.6622",
        "0.0875",
        "0.0644",
        "training, last (step 2)",
        "evaluation, first (step 0)",
        "evaluation, last (step 2)",
    ):
        assert cell in text, cell
    assert "Log-prob, chosen" not in text  # nothing was logged of it
    assert "90 tokens against 45." in text
    assert "a &lt;b&gt;prompt&lt;/b&gt;" in text
    for word in ("before", "after", "as it was", "policy, step 2", "|42|", "|77|"):
        assert word in text, word
    assert "midway" not in text  # the first and the last evaluation are shown
    assert "sigmoid" in text
    assert "nothing" not in text
    if importlib.util.find_spec("matplotlib") is not None:
        assert "data:image/svg+xml;base64," in path.read_text()


def test_one_evaluation_is_one_column(tmp_path):
    """Its first is also its last, and a phone has no room for both."""
    history = [entry for entry in HISTORY if entry.get("step") != 0]
    (tmp_path / "trainer_state.json").write_text(json.dumps({**STATE, "log_history": history}))
    text = text_of(write_run_report(tmp_path))
    assert "evaluation (step 2)" in text
    assert "evaluation, last" not in text


def test_several_evaluation_datasets_have_columns_each(tmp_path):
    evaluated = [
        {"step": 2, f"eval_{n}_loss": v, f"eval_{n}_aux_loss": 2.0, f"eval_{n}_runtime": 1.0} for n, v in NAMED
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({**STATE, "log_history": [*HISTORY[1:3], *evaluated]}))
    text = text_of(write_run_report(tmp_path))
    for name, value in NAMED:
        assert f"evaluation, {name} (step 2)" in text
        assert f"{value}" in text


def test_without_matplotlib_it_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "matplotlib is missing" in text_of(write_run_report(tmp_path))


def test_a_run_that_was_stopped_is_read_from_its_last_checkpoint(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {**STATE, "global_step": step, "log_history": HISTORY[: step + 1]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert "2 optimizer steps" in text_of(write_run_report(tmp_path))


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    """In the middle of a character, and of a line whose text holds what str.splitlines takes for ends of lines."""
    (tmp_path / "trainer_state.json").write_text(json.dumps(STATE))
    write_lines(tmp_path / WARNINGS_FILE, [{"step": 2, "name": "length_drift", "message": "90 tokens against 45"}])
    with (tmp_path / WARNINGS_FILE).open("a") as file:
        file.write('{"step": 2, "na')
    whole = json.dumps(sample(0, "one\u2028two\x85three"), ensure_ascii=False).encode()
    cut = json.dumps(sample(1, "caf\u00e9"), ensure_ascii=False).encode().partition("\u00e9".encode()[1:])[0]
    (tmp_path / SAMPLES_FILE).write_bytes(whole + b"\n" + cut)
    text = text_of(write_run_report(tmp_path))
    assert "90 tokens against 45." in text
    assert "three" in text
    assert "caf" not in text


def with_checkpoint(folder, step, history, age):
    (folder / f"checkpoint-{step}").mkdir()
    path = folder / f"checkpoint-{step}" / "trainer_state.json"
    path.write_text(json.dumps({**STATE, "global_step": step, "log_history": history}))
    made = (folder / "trainer_state.json").stat().st_mtime
    os.utime(path, (made - age, made - age))


def test_a_later_run_that_was_stopped_is_reported_and_not_the_one_before_it(tmp_path):
    """Its checkpoint is newer than the end of the run before, whether it went on with that run or replaced it."""
    other = [{"step": 1, "loss": 0.5}]
    for name, step, history, age, expected in (
        ("went on", 3, [*HISTORY[:4], {"step": 3, "loss": 0.6}], -60, 3),
        ("replaced", 1, other, -60, 1),
        ("an older run's", 7, other, 60, 2),
        ("its own, copied later", 1, HISTORY[:2], -60, 2),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps(STATE))
        with_checkpoint(folder, step, history, age)
        assert f"{expected} optimizer steps" in text_of(write_run_report(folder)), name


def test_a_run_that_logged_nothing_has_a_report_too(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({**STATE, "log_history": HISTORY[-1:]}))
    assert "No metrics were logged" in text_of(write_run_report(tmp_path))


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="output_dir must hold a run"):
        write_run_report(tmp_path)
