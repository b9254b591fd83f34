"""Runs beside each other: what differs, what they ended with, and a page that holds it all."""

import json

import pytest

from fastdpo.cli.main import main
from fastdpo.report.compare import compare_runs, write_comparison


def run(folder, beta, losses, answers=()):
    """A folder as a run of `fastdpo train` leaves it."""
    folder.mkdir(parents=True)
    history = [{"step": step, "loss": loss, "rewards/margins": 1 - loss} for step, loss in enumerate(losses, 1)]
    evaluated = {"step": len(losses), "eval_loss": losses[-1] + 0.1, "eval_runtime": 1.0}
    state = {"log_history": [*history, evaluated], "global_step": len(losses), "epoch": 1.0}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    options = {"command": ["train"], "model": "m", "DPOConfig": {"beta": beta, "seed": 1, "output_dir": str(folder)}}
    (folder / "fastdpo_run.json").write_text(json.dumps(options))
    lines = [
        {
            "step": 5,
            "prompt": prompt,
            "policy": text,
            "policy_tokens": 3,
            "reference": None,
            "reference_tokens": None,
            "reference_name": "reference",
        }
        for prompt, text in answers
    ]
    (folder / "fastdpo_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path):
    one = run(tmp_path / "a" / "run", 0.1, [0.7, 0.5], [("asked?", "first <b>answer"), ("alone?", "x")])
    two = run(tmp_path / "b" / "run", 0.3, [0.7, 0.4], [("asked?", "second answer")])
    return one, two


def test_settings_that_differ_and_last_metrics(runs):
    found = compare_runs(runs)
    assert found.names == ["a/run", "b/run"]  # what tells the folders apart
    assert found.settings == {"beta": [0.1, 0.3]}  # output_dir differs always
    assert found.metrics["training"]["loss"] == [0.5, 0.4]
    assert found.metrics["evaluation"]["loss"] == pytest.approx([0.6, 0.5])


def test_the_page_has_curves_differences_and_answers_side_by_side(runs, tmp_path):
    page = write_comparison(tmp_path / "page.html", runs).read_text()
    assert "0.4000 (-0.1000)" in page
    assert page.count("<figure>") == 2  # loss and margins
    assert page.count("asked?") == 1
    assert "first &lt;b&gt;answer" in page
    assert "second answer" in page
    assert "alone?" not in page  # only one run was asked


def test_the_command_prints_a_table_or_json_and_writes_the_page(runs, tmp_path, capsys):
    assert main(["compare", *map(str, runs), "--html", str(tmp_path / "c.html")]) == 0
    out = capsys.readouterr().out
    assert "beta" in out
    assert "(-0.1000)" in out
    assert main(["compare", *map(str, runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {"beta": [0.1, 0.3]}


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    for arguments, word in (
        (["compare", str(runs[0])], "at least two different folders"),
        (["compare", str(runs[0]), str(runs[0])], "at least two different folders"),
        (["compare", str(runs[0]), str(tmp_path / "none")], "trainer_state.json"),
        (["report", str(tmp_path)], "trainer_state.json"),
    ):
        assert main(arguments) == 2
        assert word in capsys.readouterr().err


def test_a_report_made_again_shows_the_settings_that_are_not_defaults(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [], "global_step": 2, "epoch": 1.0}))
    options = {"command": ["fastdpo", "train"], "model": "m", "beta": 0.5, "lora_r": 16, "loss_type": ["ipo"]}
    (tmp_path / "fastdpo_run.json").write_text(json.dumps({**options, "label_smoothing": 0.0, "weight_decay": 0.0}))
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    for name in ("model", "beta", "loss_type"):
        assert f'<th scope="row">{name}</th>' in page
    for name in ("lora_r", "label_smoothing", "weight_decay"):
        assert f'<th scope="row">{name}</th>' not in page
    assert "wrote" in capsys.readouterr().out
