"""`make faults` finds no moment at which a kill changes a run's end, and would show one."""

import signal

import pytest
import random_moments
from random_moments import KINDS, moments, run


def test_the_seed_chooses_the_moments_and_every_kind_has_its_turn():
    num_events = {where: 1 + len(where) for places in KINDS.values() for where in places}
    chosen = moments(3, 20, num_events)
    assert chosen == moments(3, 20, num_events) != moments(4, 20, num_events)
    assert [kind for kind, _, _ in chosen] == [*KINDS] * 4
    assert all(1 <= nth <= num_events[where] for _, where, nth in chosen)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_runs_that_are_killed_at_random_moments_end_like_one_that_is_not(number, capsys):
    assert run(seed=1, count=10, number=number) == 0
    assert "10 moments, 10 runs killed, 0 with another end" in capsys.readouterr().out


@pytest.mark.slow
def test_an_end_that_differs_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(random_moments, "differences", lambda one, other: ["weight of all"])
    assert run(seed=1, count=1, number=signal.SIGKILL) == 1
    assert "weight of all" in capsys.readouterr().out
