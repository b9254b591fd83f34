"""benchmarks.compare finds what became slower or larger since a baseline."""

import json

import compare
import pytest

BASE = {"device": "cpu", "num_threads": 1, "vocab_size": 211, "pass": "forward", "method": "fastdpo"}
OLD = {**BASE, "ms": 10.0, "ms_min": 9.0, "ms_max": 11.0, "peak_mib": 100.0}


def compared(tmp_path, new, old=OLD):
    files = []
    for name, record in (("old", old), ("new", new)):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text(json.dumps(record) + "\n")
    return compare.main(list(map(str, files)))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"ms": 13.0, "ms_min": 12.0, "ms_max": 14.0}, 1),
        ({"ms": 13.0, "ms_min": 10.5, "ms_max": 14.0}, 0),  # within the spread of the old run
        ({"ms": 5.0, "ms_min": 4.0, "ms_max": 6.0}, 0),
        ({"peak_mib": 120.0}, 1),
        ({"peak_mib": 105.0}, 0),
        ({"vocab_size": 212}, 2),
    ],
)
def test_the_exit_code_says_whether_fastdpo_became_worse(tmp_path, change, code):
    assert compared(tmp_path, {**OLD, **change}) == code


def test_speeds_of_steps_are_compared_as_times(tmp_path, capsys):
    step = {**BASE, "pairs_per_s": 4.0, "pairs_per_s_min": 3.9, "pairs_per_s_max": 4.1, "peak_mib": 10.0}
    slower = {**step, "pairs_per_s": 2.0, "pairs_per_s_min": 1.9, "pairs_per_s_max": 2.1}
    assert compared(tmp_path, slower, step) == 1
    assert "WORSE time x 2.00, memory x 1.00" in capsys.readouterr().out


def test_a_peer_that_became_slower_is_shown_and_no_failure(tmp_path, capsys):
    peer = {**OLD, "method": "TRL"}
    assert compared(tmp_path, {**peer, "peak_mib": 200.0}, peer) == 0
    assert "WORSE" in capsys.readouterr().out
