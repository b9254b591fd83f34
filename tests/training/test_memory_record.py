"""docs/scaling.md shows the memory of a process that slow tests have recorded."""

import memory_record
import pytest
from memory_record import PAGE, RECORD, name_of, table, words
from shared.pages import part

from fastdpo.evidence.bench.records import read


def test_the_page_shows_the_record():
    page = PAGE.read_text()
    assert part(page, RECORD.name) == table(read(RECORD)), "run `python tests/training/memory_record.py`"
    assert words(read(RECORD)) in " ".join(page.split())


def test_measured_and_computed_bytes_are_near_each_other():
    for record in read(RECORD):
        if "measured" in record:
            assert record["measured"] == pytest.approx(record["estimated"], rel=0.05)


def test_the_record_is_kept_only_when_it_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_record, "RECORD", tmp_path / "record.jsonl")
    memory_record.keep(name_of("adapter", 1000), 2, measured=2**21, estimated=2**20)
    assert not memory_record.RECORD.exists()
    monkeypatch.setenv(memory_record.RENEWS, "1")
    memory_record.keep(name_of("adapter", 1000), 2, measured=2**21, estimated=2**20)
    memory_record.keep(name_of("cached", 1000), 2, measured=2**22, estimated=2**20)
    assert table(read(memory_record.RECORD)).splitlines() == [
        "| | 2 processes |",
        "|---|---|",
        "| LoRA, vocabulary 1,000 | 2.0 / 1.0 |",
        "| full weights, cached reference, vocabulary 1,000 | 4.0 / 1.0 |",
    ]
