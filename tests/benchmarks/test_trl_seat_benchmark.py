"""The benchmark of the seat inside TRL runs TRL's step before and after, and gives no speed where losses differ."""

import json
from dataclasses import asdict

import bench_trl_seat as bench
import pytest
from peers import peer

from fastdpo.evidence.bench.steps.methods import Job

JOB = Job("tiny", "TRL", num_warmups=1, num_steps=2)


@pytest.fixture
def in_this_process(monkeypatch):
    trl = peer("trl")
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    monkeypatch.setattr(trl, "DPOTrainer", trl.DPOTrainer)  # put back what a turn replaces

    def run(job, which, folder):
        return bench.turn(json.dumps({"job": asdict(job), "which": which}))

    monkeypatch.setattr(bench, "in_new_process", run)
    yield trl
    logging.set_verbosity(before)  # without warnings, later tests in this process would have no progress bars


def test_before_and_after_are_the_same_steps(in_this_process, monkeypatch):
    from fastdpo.integrations import trl as seat

    calls = []
    head_op = seat.linear_logps
    monkeypatch.setattr(seat, "linear_logps", lambda *args, **kwargs: calls.append(1) or head_op(*args, **kwargs))
    record = bench.measure(JOB, 1, "")
    assert "error" not in record
    assert len(calls) == 2 * (JOB.num_warmups + JOB.num_steps)  # policy and reference, of one of the two turns
    assert record["loss_off"] < 1e-5
    assert record[bench.BEFORE]["step_s"] > 0 < record[bench.AFTER]["step_s"]
    lines = bench.text(record).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("| tiny | TRL | as TRL has it |")
    assert " 1.00 | " in lines[0]


def test_losses_that_differ_get_no_speed(monkeypatch):
    figures = {"step_s": [1.0, 1.0], "peak_mib": 5.0}
    losses = {bench.BEFORE: [0.6931, 0.5, 0.4], bench.AFTER: [0.6931, 0.5, 0.41]}
    monkeypatch.setattr(bench, "in_new_process", lambda job, which, folder: {**figures, "losses": losses[which]})
    record = bench.measure(JOB, 2, "")
    assert record["error"] == "losses differ by 1.0e-02"
    assert "losses differ" in bench.text(record)
    assert bench.BEFORE not in record


def test_a_turn_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(bench, "in_new_process", lambda *args: {"error": "exit code 1: Killed"})
    assert bench.measure(JOB, 1, "")["error"] == "before: exit code 1: Killed"
