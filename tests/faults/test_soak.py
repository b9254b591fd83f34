"""The soak, in short: nothing grows in 48 steps, and each kind of growth that it is there for is found."""

import pytest
import torch
from soak import judged, soak
from transformers import TrainerCallback
from trends import GROWS, STEADY, UNDECIDED, as_if_alone, trend

COUNTED = ("live tensors", "bytes of live tensors", "open files")
MEASURED = ("memory of the process", "time of a log entry")


class Leak(TrainerCallback):
    """Keeps a tensor and a file open at every step, and makes each log entry slower than the last."""

    def __init__(self, mib):
        self.kept, self.mib = [], mib

    def on_step_end(self, args, state, control, **kwargs):
        self.kept += [torch.ones(self.mib * 2**18), open(__file__)]  # noqa: SIM115

    def on_log(self, args, state, control, **kwargs):
        sum(range(20_000 * state.global_step))


def verdicts(values):
    return {measure: verdict for measure, *_, verdict in judged(values)}


def leaking(folder, mib=2):
    """The verdicts on a run with a Leak."""
    leak = Leak(mib)
    found = verdicts(soak(folder, steps=32, callbacks=[leak]))
    for file in leak.kept[1::2]:
        file.close()
    return found


def test_nothing_grows_in_a_short_run_and_leaks_are_found(tmp_path):
    found = verdicts(soak(tmp_path / "sound", steps=48))
    assert {measure: found[measure] for measure in COUNTED} == dict.fromkeys(COUNTED, STEADY)
    assert set(found) >= {*MEASURED, "time of a step", "time of an evaluation", "time of a save"}
    assert {measure for measure, verdict in leaking(tmp_path / "leaking").items() if verdict == GROWS} >= {*COUNTED}


@pytest.mark.slow  # what else the machine does is in these two
def test_memory_and_time_that_grow_are_found(tmp_path):
    found = leaking(tmp_path, mib=36)  # glibc maps what is above 32 MiB by itself, and not from memory freed before
    assert {measure: found[measure] for measure in MEASURED} == dict.fromkeys(MEASURED, GROWS)


def test_a_line_is_fitted_after_the_warm_up():
    warming = [(step, 100.0 - step) for step in range(25)]
    found = trend([*warming, *((step, 5.0 + 0.5 * step) for step in range(25, 100))])
    assert abs(found.growth - 0.5 * 74) < 1e-9
    assert found.high - found.low < 1e-9
    assert found.verdict(36) == GROWS
    assert found.verdict(38) == STEADY


@pytest.mark.parametrize(("growth", "verdict"), [(0.0, STEADY), (0.4, GROWS)])
def test_a_machine_that_becomes_busy_is_told_from_a_run_that_becomes_slow(growth, verdict):
    times = []
    for step in range(200):
        busy = 1.0 + 0.8 * (step > 120) + step * 7 % 11 / 100
        times.append((step, 20.0 * busy * (1 + growth * step / 200), 0.002 * busy))
    assert trend(as_if_alone(times)).verdict(4.0) == verdict
    assert trend([(step, value) for step, value, _ in times]).verdict(4.0) == GROWS


def test_uneven_values_are_not_called_steady():
    values = [(step, 10.0 + (step * 7 % 11)) for step in range(100)]
    assert trend(values).verdict(0.5) == UNDECIDED
    assert trend(values).verdict(20) == STEADY
