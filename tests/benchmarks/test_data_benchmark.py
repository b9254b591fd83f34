"""The benchmark of the data makes the same tokens with both trainers, and gives no time where they differ."""

import json

import bench_data as bench
import pytest
from peers import peer


@pytest.fixture
def in_this_process(monkeypatch):
    peer("trl")
    monkeypatch.setattr(bench, "in_new_process", lambda job: bench.turn(json.dumps(job)))


@pytest.mark.parametrize("kind", bench.KINDS)
def test_both_trainers_make_the_same_tokens(in_this_process, kind):
    record = bench.measure(kind, 6, 1)
    assert "error" not in record
    for method in bench.METHODS:
        assert 0 < record[method]["data_s"] < record[method]["ready_s"]
    lines = bench.text(record).splitlines()
    assert [line.split("|")[2].strip() for line in lines] == ["TRL", "fastdpo"]
    assert "| 1.00 |" in lines[0]


def test_tokens_that_differ_get_no_time(monkeypatch):
    figures = {"data_s": 1.0, "data_cpu_s": 1.0, "ready_s": 2.0, "peak_mib": 5.0}
    monkeypatch.setattr(bench, "in_new_process", lambda job: {**figures, "tokens": job["method"]})
    record = bench.measure("short", 6, 2)
    assert record["error"] == "tokens differ"
    assert "tokens differ" in bench.text(record)
    assert "fastdpo" not in record


def test_rows_are_the_same_in_every_process():
    assert bench.make_rows("turns", 3) == bench.make_rows("turns", 3)
    assert [message["role"] for message in bench.make_rows("turns", 1)[0]["prompt"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
    ]
