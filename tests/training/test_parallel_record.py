"""The page on several processes shows what the tests have recorded, and nothing else."""

import json

import parallel_record
import pytest
from parallel_record import PAGE, RECORD, entries, refuses, table, works
from shared.pages import part


def test_the_page_shows_the_record():
    assert part(PAGE.read_text(), RECORD.name) == table(), "run `python tests/training/parallel_record.py`"


def test_the_record_is_sorted_and_holds_no_line_twice():
    assert RECORD.read_text().splitlines() == [json.dumps(entry) for entry in entries()]


def test_a_mode_is_recorded_for_each_of_its_features_and_a_failure_for_none(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_record, "RECORD", tmp_path / "record.jsonl")
    monkeypatch.setenv(parallel_record.RENEWS, "1")
    with works("FSDP2", "LoRA, micro-batches", processes=2):
        pass
    with pytest.raises(ValueError, match="other numbers"), works("DDP", "LoRA", processes=2):
        raise ValueError("other numbers")
    refuses("TP", "LoRA", "tensor_parallel_size must be 1")
    assert table() == (
        "| | FSDP2 | TP |\n"
        "|---|---|---|\n"
        "| LoRA | 2 x 1 | refused (1) |\n"
        "| adapter reference | 2 x 1 |  |\n"
        "| shared prompts | 2 x 1 |  |\n"
        "| uneven micro-batches | 2 x 1 |  |\n"
        "\nRefused with:\n\n1. `tensor_parallel_size must be 1`\n"
    )


def test_an_outcome_that_is_not_in_the_record_fails_its_test(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_record, "RECORD", tmp_path / "record.jsonl")
    monkeypatch.delenv(parallel_record.RENEWS, raising=False)
    parallel_record.RECORD.write_text('{"kind": "DDP", "feature": "listwise loss", "processes": 2, "steps": 1}\n')
    with works("DDP", "listwise loss", processes=2):
        pass
    with pytest.raises(AssertionError, match="renew it"), works("DDP", "sft", processes=2):
        pass
