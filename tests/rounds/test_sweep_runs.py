"""Which runs a sweep has, and that none is run twice."""

import pytest

from fastdpo.rounds.sweep import combinations_of, name_of, read_params, sweep

GRID = {"beta": ["0.1", "0.3"], "loss_type": ["sigmoid", "ipo"]}


def test_params_are_read_as_on_the_command_line():
    assert read_params(["beta=0.1, 0.3", "--loss-type=sigmoid,ipo"]) == GRID
    assert name_of({"beta": "0.1", "loss_type": "ipo"}) == "beta=0.1,loss_type=ipo"


def test_all_combinations_or_some_of_them():
    grid = combinations_of(GRID)
    assert [tuple(run.values()) for run in grid] == [
        ("0.1", "sigmoid"),
        ("0.1", "ipo"),
        ("0.3", "sigmoid"),
        ("0.3", "ipo"),
    ]
    drawn = combinations_of(GRID, 2, seed=1)
    assert len(drawn) == 2
    assert all(run in grid for run in drawn)
    assert combinations_of(GRID, 2, seed=1) == drawn
    assert combinations_of(GRID, 99) == grid


def test_a_sweep_that_was_stopped_goes_on_and_other_settings_are_refused(tmp_path):
    runs, calls = combinations_of(GRID), []

    def run_one(params, folder):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(params)
        return {"metrics": {"loss": float(params["beta"])}}

    with pytest.raises(KeyboardInterrupt):
        sweep(runs, tmp_path, run_one, {"model": "m"})
    results = sweep(runs, tmp_path, lambda params, folder: calls.append(params) or {"metrics": {}}, {"model": "m"})
    assert calls == runs
    assert [line["params"] for line in results] == runs
    with pytest.raises(ValueError, match=r"model must be 'm', as in .*, got 'other'"):
        sweep(runs, tmp_path, run_one, {"model": "other"})


@pytest.mark.parametrize(
    ("given", "word"),
    [([], "at least once"), (["beta"], "NAME=VALUE"), (["beta=0.1,"], "NAME=VALUE"), (["a=1", "a=2"], "once")],
)
def test_params_that_say_nothing_are_refused(given, word):
    with pytest.raises(ValueError, match=word):
        read_params(given)


def test_no_run_at_random_is_refused():
    with pytest.raises(ValueError, match="random must be at least 1, got 0"):
        combinations_of(GRID, 0)
