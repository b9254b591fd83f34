"""Rounds: which model starts and which is the reference, replayed rows, runs that were killed at any moment."""

import json

import pytest

from fastdpo.rounds.iterate import Plan, Steps, iterate, win_rate


class Recorder:
    """Steps that write down what they were asked, and stop where they are told to."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def _note(self, *call):
        self.calls.append(call)
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt

    def make_pairs(self, model, path, number):
        self._note("pairs", model, number)
        path.write_text("".join(json.dumps({"round": number, "row": row}) + "\n" for row in range(3)))

    def train(self, start, reference, data, folder):
        self._note("train", start, reference, len(data.read_text().splitlines()))
        folder.mkdir(parents=True, exist_ok=True)

    def evaluate(self, model):
        self._note("evaluate", model)
        return {"reward": float(len(model))}

    def steps(self):
        return Steps(self.make_pairs, self.train, self.evaluate)


def trained(tmp_path, **settings):
    """(start, reference, rows) of each round, models by the round that made them."""
    recorder = Recorder()
    iterate(Plan("base", **settings), tmp_path / "out", recorder.steps(), {})
    short = {"base": 0, **{str(tmp_path / "out" / f"round_{n}" / "model"): n for n in range(1, 4)}}
    return [(short[call[1]], short[call[2]], call[3]) for call in recorder.calls if call[0] == "train"]


def test_who_starts_and_who_is_the_reference(tmp_path):
    assert trained(tmp_path / "a") == [(0, 0, 3), (1, 0, 3), (2, 0, 3)]
    assert trained(tmp_path / "b", reference="move") == [(0, 0, 3), (1, 1, 3), (2, 2, 3)]
    assert trained(tmp_path / "c", start="first") == [(0, 0, 3), (0, 0, 3), (0, 0, 3)]


def test_rows_of_earlier_rounds_come_again(tmp_path):
    assert [rows for *_, rows in trained(tmp_path / "all", replay="all")] == [3, 6, 9]
    assert [rows for *_, rows in trained(tmp_path / "two", replay="2")] == [3, 5, 5]


@pytest.mark.parametrize("stop_at", range(1, 8))
def test_a_run_that_was_killed_goes_on_with_the_step_that_it_was_in(tmp_path, stop_at):
    plan, whole = Plan("base", num_rounds=2), Recorder()
    expected = iterate(plan, tmp_path / "whole", whole.steps(), {})
    stopped = Recorder(stop_at)
    with pytest.raises(KeyboardInterrupt):
        iterate(plan, tmp_path / "stopped", stopped.steps(), {})
    again = Recorder()
    found = iterate(plan, tmp_path / "stopped", again.steps(), {})
    assert [entry["round"] for entry in found] == [entry["round"] for entry in expected]
    assert len(again.calls) == len(whole.calls) - (stop_at - 1)  # the stopped step, and those after it


def test_more_rounds_may_follow_and_other_settings_may_not(tmp_path):
    iterate(Plan("base", num_rounds=1), tmp_path, Recorder().steps(), {"judge": "length"})
    more = Recorder()
    assert len(iterate(Plan("base", num_rounds=2), tmp_path, more.steps(), {"judge": "length"})) == 3
    assert [call[0] for call in more.calls] == ["pairs", "train", "evaluate"]
    with pytest.raises(ValueError, match="judge must be 'length'"):
        iterate(Plan("base", num_rounds=2), tmp_path, Recorder().steps(), {"judge": "logp"})
    with pytest.raises(ValueError, match="model must be 'base'"):
        iterate(Plan("other", num_rounds=2), tmp_path, Recorder().steps(), {"judge": "length"})


def test_the_win_rate_counts_ties_and_missing_scores_half():
    assert win_rate([1.0, 2.0, None, 0.0], [0.0, 2.0, 1.0, 1.0]) == (1 + 0.5 + 0.5 + 0) / 4


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"num_rounds": 0}, "rounds must be at least 1, got 0"),
        ({"reference": "last"}, "reference must be one of keep, move"),
        ({"start": "second"}, "start must be one of last, first"),
        ({"replay": "some"}, "replay must be none, all or a number"),
    ],
)
def test_plans_that_cannot_work_are_refused(tmp_path, settings, word):
    with pytest.raises(ValueError, match=word):
        iterate(Plan("base", **settings), tmp_path, Recorder().steps(), {})
