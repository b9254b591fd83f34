"""The table before and after a run says what its figures are worth."""

import io
import json
from types import SimpleNamespace

import pytest
from cli_runs import save_model
from rich.console import Console
from tiny import make_rows

from fastdpo.cli.comparison import all_ties, comparison_table
from fastdpo.cli.main import main
from fastdpo.cli.train import COLUMNS

START = {"loss": 0.6931, "rewards/chosen": 3e-8, "rewards/rejected": -1e-7, "rewards/margins": 1.3e-7}
START |= {"rewards/accuracies": 0.625, "logps/chosen": -20.0, "logps/rejected": -30.0}
END = {**START, "rewards/chosen": 0.2, "rewards/margins": 0.2, "rewards/accuracies": 0.75}


def shown(before, after, num_rows, columns=COLUMNS):
    trainer = SimpleNamespace(eval_dataset=[None] * num_rows, args=SimpleNamespace(beta=0.1))
    prefixed = [{f"eval_{key}": value for key, value in metrics.items()} for metrics in (before, after)]
    console = Console(width=140, file=io.StringIO())
    table, notes = comparison_table(trainer, *prefixed, columns)
    console.print(table, *notes, sep="\n")
    return console.file.getvalue()


def test_pairs_that_both_models_score_alike_are_ties_and_not_right_or_wrong():
    text = shown(START, END, 200)
    assert "│ accuracy           │     ties │   0.7500 │" in text
    assert "ties: policy and reference score every pair equally" in text
    assert "0.6250" not in text


def test_a_reference_that_scores_otherwise_has_an_accuracy_at_the_start():
    text = shown(END, END, 200)
    assert "│ accuracy           │   0.7500 │   0.7500 │" in text
    assert "ties" not in text


@pytest.mark.parametrize(
    ("margin", "logp", "beta", "expected"),
    [(0.0, -10.0, 0.1, True), (1e-5, -10.0, 0.1, False), (1e-5, -1000.0, 0.1, True), (1e-5, -10.0, 5.0, True)],
)
def test_what_counts_as_rounding_grows_with_the_log_probs(margin, logp, beta, expected):
    rewards = {"rewards/chosen": 0.0, "rewards/rejected": -margin, "rewards/margins": margin}
    assert all_ties({**rewards, "logps/chosen": logp, "logps/rejected": logp}, beta) is expected


def test_few_rows_are_said_to_say_little():
    assert "1 row is too few: chance alone moves an accuracy by 100%" in shown(START, END, 1)
    assert "25 rows are too few: chance alone moves an accuracy by 20%" in shown(START, END, 25)
    assert "little" not in shown(START, END, 30)
    assert "3 rows are too few; hold out 30 or more" in shown({"loss": 2.0}, {"loss": 1.0}, 3, [("loss", "loss")])


def test_a_run_prints_the_ties_and_keeps_trls_number_in_its_logs(capsys, tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(12)))
    options = ("--max_steps", 2, "--logging_steps", 1, "--disable_tqdm", "true", "--use_cpu", "true")
    paths = ("--model", tmp_path / "model", "--dataset", tmp_path / "pairs.jsonl", "--output_dir", tmp_path / "out")
    assert main(["train", *map(str, paths), *map(str, options), "--eval_fraction", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "ties" in out.split("│ accuracy ")[1].split("\n")[0]
    assert "1 row is too few" in out
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in logs if "eval_loss" in entry)
    assert 0.0 <= first["eval_rewards/accuracies"] <= 1.0
