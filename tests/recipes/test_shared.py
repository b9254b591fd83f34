"""Options, resuming, means over seeds and the files of all recipes."""

import math

import pytest

from fastdpo.report import Figure, Table, frontier
from fastdpo.report.plots import Point
from recipes.shared import Options, finish, markdown, over_seeds, read_options, run_all, start

LINES = [
    {"params": {"beta": "0.1", "seed": "0"}, "kl": 1.0},
    {"params": {"beta": "0.3", "seed": "0"}, "kl": 0.5},
    {"params": {"beta": "0.1", "seed": "1"}, "kl": 3.0},
    {"params": {"beta": "0.3", "seed": "1"}, "kl": 0.5},
]


def test_runs_of_several_seeds_become_a_mean_with_its_standard_error():
    first, second = over_seeds(LINES, ["kl"])
    assert first.params == {"beta": "0.1"}
    assert (first.figures["kl"].mean, first.figures["kl"].stderr) == (2.0, pytest.approx(math.sqrt(2) / math.sqrt(2)))
    assert second.figures["kl"].text() == "0.50 ± 0.00"


def test_one_seed_has_no_standard_error():
    with pytest.raises(ValueError, match="at least 2 numbers for a standard error, got 1"):
        over_seeds(LINES[:1], ["kl"])


def test_a_recipe_that_was_stopped_continues_and_another_size_is_refused(tmp_path):
    runs, calls = [line["params"] for line in LINES], []

    def run_one(params, folder):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(params)
        return {"kl": float(params["beta"])}

    with pytest.raises(KeyboardInterrupt):
        run_all(runs, Options("tiny", tmp_path), run_one)
    lines = run_all(runs, Options("tiny", tmp_path), lambda params, folder: calls.append(params) or {"kl": 9.0})
    assert calls == runs
    assert [line["kl"] for line in lines] == [0.1, 0.3, 0.1, 9.0]
    assert all(line["cpu_seconds"] >= 0 for line in lines)
    with pytest.raises(ValueError, match=r"size must be 'tiny', as in .*, got 'full'"):
        run_all(runs, Options("full", tmp_path), run_one)


def test_the_end_of_a_recipe_is_a_page_a_table_and_a_plot(tmp_path, capsys):
    table = Table("Results", ("model", "KL"), [["DPO", "1.00 ± 0.10"]])
    plot = Figure("Plot", frontier([Point("reference", 0, 1), Point("DPO", 1, 2)]), alt="two points")
    finish(Options("tiny", tmp_path), "A title", [table, plot])
    assert (tmp_path / "table.md").read_text() == "| model | KL |\n| --- | ---: |\n| DPO | 1.00 ± 0.10 |\n"
    assert (tmp_path / "table.md").read_text() == markdown(table)
    plot = (tmp_path / "plot.svg").read_text()
    assert "<svg" in plot
    assert ">reward</text>" in plot  # letters as text: half the size
    assert "A title" in (tmp_path / "page.html").read_text()
    assert "1.00 ± 0.10" in capsys.readouterr().out


def test_the_default_folder_names_recipe_and_size(tmp_path):
    options = read_options("name", "what", ["--size", "full"])
    assert (options.size, str(options.output_dir)) == ("full", "runs/name_full")
    assert read_options("name", "what", ["--output-dir", str(tmp_path)]).output_dir == tmp_path


def test_a_mistake_is_one_line_and_exit_code_2(capsys):
    def wrong(argv):
        raise ValueError("size must be 'small', got 'full'")

    with pytest.raises(SystemExit) as raised:
        start(wrong)
    assert raised.value.code == 2
    assert capsys.readouterr().err == "error: size must be 'small', got 'full'\n"
