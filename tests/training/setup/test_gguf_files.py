"""Models in GGUF files: converted once, found again, and refused with a reason."""

import importlib.util
import json
import multiprocessing
import os
import time

import pytest
from tiny import save_model

from fastdpo.cli.main import main
from fastdpo.training.setup import gguf_files
from fastdpo.training.setup.gguf_files import as_folder
from fastdpo.training.setup.models import load_model, load_tokenizer


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    """A file whose conversion writes a tiny model; the list holds what was converted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF")
    converted = []

    def convert(source, folder):
        converted.append(source)
        save_model(folder, vocab_size=64)

    monkeypatch.setattr(gguf_files, "convert", convert)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True if name == "gguf" else find_spec(name))
    return path, converted


def test_other_names_are_left_alone(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    for name in ("Qwen/Qwen3-8B", str(tmp_path), str(tmp_path / "folder.gguf")):
        assert as_folder(name) == name


def test_a_file_is_converted_once_and_again_after_it_changes(gguf_file):
    path, converted = gguf_file
    folder = as_folder(str(path))
    assert as_folder(str(path)) == folder
    assert converted == [path]
    os.utime(path, ns=(1, 1))
    assert as_folder(str(path)) != folder
    assert len(converted) == 2


def test_of_two_processes_that_start_together_one_converts_the_file(gguf_file, tmp_path, monkeypatch):
    path, _ = gguf_file
    fork = multiprocessing.get_context("fork")

    def convert(source, folder):
        time.sleep(0.5)
        with (tmp_path / "converted").open("a") as file:
            file.write("once\n")
        folder.mkdir()

    monkeypatch.setattr(gguf_files, "convert", convert)
    monkeypatch.setattr("fastdpo.locks._SECONDS_BETWEEN_TRIES", 0.01)
    processes = [fork.Process(target=as_folder, args=(str(path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "converted").read_text() == "once\n"


def test_model_and_tokenizer_load_from_the_file(gguf_file):
    path, _ = gguf_file
    assert load_model(str(path)).config.vocab_size == 64
    assert load_tokenizer(str(path)).eos_token == "</s>"


def test_a_run_trains_the_model_of_a_file_and_its_reference(gguf_file, tmp_path, capsys):
    path, converted = gguf_file
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "the dog", "chosen": " sees a cat", "rejected": " eats"} for _ in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"train --model {path} --ref_model {path} --dataset {data} --output_dir {tmp_path / 'out'} --max_steps 1"
    assert main([*words.split(), *"--use_cpu true --save_strategy no --disable_tqdm true".split()]) == 0  # noqa: SIM905
    assert len(converted) == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_missing_file_is_refused_with_the_nearest_one(gguf_file, tmp_path):
    with pytest.raises(ValueError, match=r"model must be an existing file if it ends in .gguf, got .*smal\.gguf; did"):
        as_folder(str(tmp_path / "smal.gguf"))
    with pytest.raises(ValueError, match="ref_model must be an existing file"):
        as_folder("nowhere.gguf", "ref_model")


def test_without_the_package_the_extra_is_named(gguf_file, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'gguf is not installed, got .*: pip install "fastdpo\[pretrained\]"'):
        as_folder(str(gguf_file[0]))


def test_a_file_that_is_not_gguf_is_refused_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"no model" * 100)
    with pytest.raises(ValueError, match="model must be a GGUF file of an architecture that transformers reads"):
        as_folder(str(tmp_path / "bad.gguf"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_dir() and path.name.startswith("bad")]
