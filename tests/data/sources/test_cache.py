"""Rows are tokenized once: a second run with the same rows, tokenizer and settings takes them from the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from tiny_tokenizers import CHATML, byte_level_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.sources import cache
from fastdpo.data.sources.loading import load_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings

SETTINGS = TokenizationSettings(max_length=64)
ROWS = [{"prompt": f"the cat {i}", "chosen": " sat on the mat", "rejected": " ran"} for i in range(20)]
CHAT = [{"prompt": [{"role": "user", "content": "Hi?"}], "chosen": "Hello!", "rejected": "Go."}]
FRESH_PROCESS = """
import sys
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from fastdpo.data.sources.loading import load_preference_dataset
from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings
def refuse(*args, **kwargs):
    raise AssertionError("tokenized again")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
PreTrainedTokenizerBase.__call__ = refuse
prepared, report = prepare_preference_dataset(
    load_preference_dataset(sys.argv[2]), tokenizer, TokenizationSettings(max_length=64)
)
print(report.num_kept)
"""


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Counts the tokenizer's calls, over an empty cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    counted = []
    original = PreTrainedTokenizerBase.__call__

    def count(self, *args, **kwargs):
        counted.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", count)
    return counted


@pytest.fixture
def files(tmp_path):
    """(tokenizer folder, rows as JSON lines)"""
    byte_level_tokenizer(bos="<s>", prefix=["<s>"], chat_template=CHATML).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path / "tokenizer", tmp_path / "rows.jsonl"


def prepare(files, settings=SETTINGS, rows=None, **options):
    """As a run does: everything is read anew."""
    dataset = load_preference_dataset(files[1]) if rows is None else rows
    return prepare_preference_dataset(dataset, AutoTokenizer.from_pretrained(files[0]), settings, **options)


def test_a_second_run_takes_a_json_file_from_the_cache(files, calls):
    first, first_report = prepare(files)
    assert calls
    calls.clear()
    second, second_report = prepare(files)
    assert not calls
    assert list(second) == list(first)
    assert second_report == first_report
    assert second._fingerprint == first._fingerprint


def test_another_process_takes_it_too(files, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    prepare(files)
    command = [sys.executable, "-c", FRESH_PROCESS, *map(str, files)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.stdout.split() == [str(len(ROWS))], done.stderr


def test_rows_in_memory_and_messages_are_cached_like_files(files, calls):
    for rows in (ROWS, Dataset.from_list(ROWS), CHAT):
        prepare(files, rows=rows)
        calls.clear()
        prepare(files, rows=rows)
        assert not calls


def test_several_processes_read_and_write_the_same_cache(files, calls):
    first, _ = prepare(files, num_proc=2)
    second, _ = prepare(files)
    assert not calls
    assert list(first) == list(second)


@pytest.mark.parametrize("what", ["rows", "settings", "tokenizer", "template", "code"])
def test_what_changes_the_tokens_changes_the_cache(files, calls, monkeypatch, what):
    before, _ = prepare(files)
    calls.clear()
    settings = SETTINGS
    if what == "rows":
        files[1].write_text(files[1].read_text().replace("the cat 3", "the dog 3"))
    elif what == "settings":
        settings = TokenizationSettings(max_length=63)
    elif what == "tokenizer":
        byte_level_tokenizer(bos="<s>", chat_template=CHATML).save_pretrained(files[0])  # no BOS before a text
    elif what == "template":
        byte_level_tokenizer(bos="<s>", prefix=["<s>"], chat_template=CHATML + " ").save_pretrained(files[0])
    else:
        monkeypatch.setattr(cache, "_code_hash", lambda: "another version")
    after, _ = prepare(files, settings)
    assert calls
    assert after._fingerprint != before._fingerprint


def test_a_template_that_prints_the_day_is_cached_for_a_day(files, monkeypatch):
    def fingerprint(day, template):
        class Day:
            @staticmethod
            def today():
                return Day

            @staticmethod
            def isoformat():
                return day

        monkeypatch.setattr(cache, "date", Day)
        tokenizer = AutoTokenizer.from_pretrained(files[0])
        tokenizer.chat_template = template
        return cache.tokens_fingerprint(Dataset.from_list(ROWS), tokenizer)

    dated = CHATML + "{{ strftime_now('%d') }}"
    assert fingerprint("2026-01-01", dated) != fingerprint("2026-01-02", dated)
    assert fingerprint("2026-01-01", CHATML) == fingerprint("2026-01-02", CHATML)


def test_using_a_tokenizer_leaves_its_fingerprint(files):
    tokenizer = AutoTokenizer.from_pretrained(files[0], model_max_length=8)
    dataset = Dataset.from_list(ROWS)
    before = cache.tokens_fingerprint(dataset, tokenizer)
    tokenizer("the cat sat on the mat " * 5)  # warns once that it is too long, and remembers that
    assert cache.tokens_fingerprint(dataset, tokenizer) == before


def test_nothing_is_kept_where_caching_is_off(files, calls, tmp_path):
    datasets.disable_caching()
    try:
        prepare(files)
        calls.clear()
        prepare(files)
    finally:
        datasets.enable_caching()
    assert calls
    assert not list((tmp_path / "cache").rglob("tokens-*"))


def test_all_rows_of_a_batch_cost_three_calls(files, calls):
    prepare(files)
    # their texts together, whose first shows the backend how; an example of what stands before a text, with and without
    assert [args[0] for args in calls] == [["the cat 0"], ["a"], "a"]


def test_the_cache_lies_in_a_folder_of_its_own(files, calls, tmp_path):
    prepare(files)
    assert [path.parent.name for path in Path(tmp_path / "cache").rglob("*.arrow")] == [cache.FOLDER]
