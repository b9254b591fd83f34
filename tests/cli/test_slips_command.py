"""Slips of a practitioner on the command line: one line of error, exit code 2, and no weight was loaded."""

import json

import pytest
from cli_runs import save_model
from tiny import make_rows

from fastdpo.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a run of it with a checkpoint, and data."""
    folder = tmp_path_factory.mktemp("slips")
    save_model(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(12)))
    saving = ("--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2", "--eval_fraction", "0")
    assert main(line(folder, "done", *saving)) == 0
    return folder


def line(folder, output_dir, *more, command="train"):
    paths = ("--model", folder / "model", "--dataset", folder / "pairs.jsonl", "--output_dir", folder / output_dir)
    return [command, *map(str, paths), "--disable_tqdm", "true", "--use_cpu", "true", *more]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--use_peft", "--lora_target_modules", "q_porj,v_proj"), "got 'q_porj'; did you mean 'q_proj'"),
        (("--num_train_epochs", "0"), "num_train_epochs must be > 0, got 0"),
        (("--num_train_epochs", "-1"), "num_train_epochs must be a finite number >= 0.0, got -1"),
        (("--max_steps", "0"), "max_steps must be an integer >= 1, or -1"),
        (("--resume_from_checkpoint", "{folder}/model"), "without trainer_state.json"),
        (("--resume_from_checkpoint", "{folder}/done"), "It contains checkpoint-2"),
        (("--use_peft", "--resume_from_checkpoint", "{folder}/done/checkpoint-2"), "trains an adapter like this one"),
    ],
)
@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_slip_is_one_line_of_error_before_anything_is_trained(capsys, place, command, options, message):
    options = [option.format(folder=place) for option in options]
    code = main(line(place, "out", *options, command=command))
    error = capsys.readouterr().err
    lines = [text for text in error.splitlines() if text.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (place / "out").exists()


def test_a_checkpoint_is_checked_before_data_and_model_are_read(capsys, place, monkeypatch):
    from fastdpo.cli import run

    monkeypatch.setattr(run, "load_datasets", lambda *args: pytest.fail("the data was read"))
    assert main(line(place, "out", "--resume_from_checkpoint", str(place / "model"))) == 2
    assert "without trainer_state.json" in capsys.readouterr().err
