"""trainer_state.json: what Trainer would write, with little work for entries of the log that were written before."""

import json

import pytest
from tiny_runs import tiny_trainer
from transformers import TrainerState

from fastdpo.training.callbacks.json_lines import append_lines, read_lines
from fastdpo.training.saving import run_state
from fastdpo.training.saving.run_state import StateWriter

LOG = [{"loss": 0.1 + 0.2, "step": 1}, {"eval_loss": float("nan"), "step": 1}, {"lists": [1, 2], "step": 2}]


@pytest.mark.parametrize("log", [[], LOG[:1], LOG], ids=["no entry", "one entry", "several"])
def test_the_file_holds_what_trainer_writes(tmp_path, log):
    state = TrainerState(log_history=log, global_step=7, best_metric=0.25, stateful_callbacks={"A": {"args": {}}})
    state.save_to_json(str(tmp_path / "trainers.json"))
    StateWriter().write(state, tmp_path / "ours.json")
    theirs, ours = ((tmp_path / name).read_text() for name in ("trainers.json", "ours.json"))
    assert json.dumps(json.loads(ours), sort_keys=True) == json.dumps(json.loads(theirs), sort_keys=True)
    assert TrainerState.load_from_json(str(tmp_path / "ours.json")).global_step == 7


def test_an_entry_is_formatted_once_and_again_when_it_was_changed(tmp_path, monkeypatch):
    formatted, dumps = [], json.dumps

    def spy(value, **options):
        if "step" in value:
            formatted.append(value["step"])
        return dumps(value, **options)

    monkeypatch.setattr(run_state.json, "dumps", spy)
    state, writer, path = TrainerState(log_history=[{"loss": 1.0, "step": 1}]), StateWriter(), tmp_path / "state.json"
    for step in (2, 3):
        writer.write(state, path)
        state.log_history.append({"loss": 1.0, "step": step})
    state.log_history[0]["loss"] = 5.0
    writer.write(state, path)
    assert formatted == [1, 2, 1, 3]
    assert [entry["loss"] for entry in json.loads(path.read_text())["log_history"]] == [5.0, 1.0, 1.0]
    state.log_history[:] = [{"loss": 2.0, "step": 9}]
    writer.write(state, path)
    assert json.loads(path.read_text())["log_history"] == [{"loss": 2.0, "step": 9}]


def test_a_checkpoint_holds_the_state_of_its_step(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    states = [json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text()) for step in (1, 2)]
    assert [state["global_step"] for state in states] == [1, 2]
    assert [entry["step"] for entry in states[1]["log_history"]] == [1, 2]
    assert "save_to_json" not in vars(trainer.state)


def test_lines_are_appended_without_reading_the_file(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    append_lines(path, [{"step": 1}])
    with path.open("a") as file:
        file.write('{"step": 2, "cut')
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", None)
        append_lines(path, [{"step": 3}])
        append_lines(path, [])
        append_lines(path, [{"step": 4}])
    assert [line["step"] for line in read_lines(path)] == [1, 3, 4]
    assert path.read_text().endswith('{"step": 2, "cut\n{"step": 3}\n{"step": 4}\n')
