"""Two runs share a folder: an output directory is refused, a cache is shared, no file and no number is wrong."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import make_rows, save_model
from tiny_runs import tiny_trainer
from transformers import TrainerCallback

from fastdpo import locks
from fastdpo.cli.main import main
from fastdpo.cli.records import write_records
from fastdpo.locks import LOCK_FILE, Locked, locked
from fastdpo.rounds.iterate import Plan, Steps, iterate

FORK = multiprocessing.get_context("fork")

HOLDS = """
import sys, time
from fastdpo.locks import locked
with locked(sys.argv[1], "output_dir"), locked(sys.argv[1] + "/pairs.jsonl", "output", is_file=True):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the locks of a folder and of a file in it."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_of_two_processes_is_refused_by_the_name_of_the_first(tmp_path, holder):
    with pytest.raises(Locked, match=rf"output_dir must not be in use by another run, .* process {holder.pid} on "):
        locked(tmp_path, "output_dir").__enter__()


def test_a_file_has_a_lock_beside_it(tmp_path, holder):
    with pytest.raises(Locked, match=rf"output must not be in use by another run, got .*pairs.jsonl, .* {holder.pid} "):
        locked(tmp_path / "pairs.jsonl", "output", is_file=True).__enter__()
    with locked(tmp_path / "others.jsonl", "output", is_file=True):
        assert (tmp_path / ".others.jsonl.lock").is_file()
    assert not (tmp_path / ".others.jsonl.lock").exists()


def test_a_lock_on_a_full_disk_holds_without_the_name_of_its_holder(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with locked(tmp_path, "output_dir"):
        assert (tmp_path / LOCK_FILE).read_bytes() == b""
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_whose_process_was_killed_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK_FILE).is_file()
    with locked(tmp_path, "output_dir"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_process_that_waits_gets_the_lock_when_the_other_ends(tmp_path, holder):
    waited = []

    def wait(who):
        waited.append(who)
        holder.kill()

    with locked(tmp_path, "ref_cache_dir", wait=wait):
        assert len(waited) == 1
        assert f"process {holder.pid} on" in waited[0]


def test_a_process_may_hold_its_own_lock_twice(tmp_path):
    with locked(tmp_path, "output_dir"):
        with locked(tmp_path, "output_dir"):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_leaves_no_folder_that_nothing_was_written_to(tmp_path):
    with locked(tmp_path / "runs" / "a", "output_dir"):
        assert (tmp_path / "runs" / "a").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs" / "a", "output_dir"):
        (tmp_path / "runs" / "b").write_text("")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]


def test_a_lock_in_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir must be a directory, got the file .*file"):
        locked(tmp_path / "file", "output_dir").__enter__()


def _count(folder, counter, times):
    for _ in range(times):
        with locked(folder, "x", wait=lambda who: None):
            number = int(counter.read_text())
            time.sleep(0.001)
            counter.write_text(str(number + 1))


def test_processes_that_take_turns_never_hold_the_lock_together(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.locks._SECONDS_BETWEEN_TRIES", 0.001)
    counter = tmp_path / "counter"
    counter.write_text("0")
    others = [FORK.Process(target=_count, args=(tmp_path, counter, 20)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert counter.read_text() == "60"


def test_a_lock_whose_holder_removes_the_file_meanwhile_is_taken_with_a_new_file(tmp_path, monkeypatch):
    """Else the next process would make a new file, and hold the lock too."""
    is_free, handles = locks._is_free, []

    def after_the_removal(handle):
        if not handles:
            (tmp_path / LOCK_FILE).unlink()
        handles.append(handle)
        return is_free(handle)

    monkeypatch.setattr(locks, "_is_free", after_the_removal)
    with locked(tmp_path, "output_dir"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert len(handles) == 2


@pytest.mark.parametrize(("pid", "is_free"), [(2**22 + 1, True), (os.getpid(), False)], ids=["ended", "running"])
def test_without_locks_of_the_file_system_the_process_in_the_file_decides(tmp_path, monkeypatch, pid, is_free):
    import errno
    import socket

    def has_none(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.lockf", has_none)
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": socket.gethostname(), "pid": pid, "since": "today"}))
    if is_free:
        with locked(tmp_path, "output_dir"):
            pass
    else:
        with pytest.raises(Locked, match=f"process {pid} on"):
            locked(tmp_path, "output_dir").__enter__()


# Runs


def test_a_run_in_an_output_directory_that_is_in_use_is_refused(tmp_path, holder):
    with pytest.raises(ValueError, match=r"output_dir must not be in use by another run, got .* choose another one"):
        tiny_trainer(tmp_path, max_steps=1).train()


def test_the_command_refuses_an_output_directory_that_is_in_use_before_it_looks_at_the_model(
    tmp_path, holder, capsys, monkeypatch
):
    monkeypatch.setattr("fastdpo.cli.run.look_at_models", lambda *_, **__: pytest.fail("it has looked"))
    save_model(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(4)))
    words = ["train", "--model", tmp_path / "model", "--dataset", tmp_path / "rows.jsonl", "--output_dir", tmp_path]
    assert main(list(map(str, words))) == 2
    assert f"process {holder.pid} on" in capsys.readouterr().err


def test_rounds_in_an_output_directory_that_is_in_use_are_refused(tmp_path, holder):
    steps = Steps(*[lambda *_: pytest.fail("a step has run")] * 3)
    with pytest.raises(Locked, match=rf"output_dir must not be in use by another run, .* process {holder.pid} on"):
        iterate(Plan("m"), tmp_path, steps, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".pairs.jsonl.lock", LOCK_FILE]


def test_a_file_of_pairs_that_another_process_makes_is_refused_before_the_model_is_loaded(
    tmp_path, holder, capsys, monkeypatch
):
    monkeypatch.setattr("fastdpo.rounds.loading.Loader.sampler", lambda *_: pytest.fail("it has loaded"))
    save_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat "}\n')
    words = ["--model", tmp_path / "model", "--prompts", tmp_path / "prompts.jsonl", "--judge", "length", "--use_cpu"]
    assert main(list(map(str, ["generate", *words, "--output", tmp_path / "pairs.jsonl"]))) == 2
    assert f"process {holder.pid} on" in capsys.readouterr().err


def _write(path, letter, times):
    for _ in range(times):
        write_records(path, [{"text": letter * 20_000}])


def test_processes_that_write_one_file_of_results_leave_the_whole_file_of_one(tmp_path):
    writers = [FORK.Process(target=_write, args=(tmp_path / "results.jsonl", letter, 30)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert set(json.loads((tmp_path / "results.jsonl").read_text())["text"]) in ({"a"}, {"b"})
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def _train(folder, output, results):
    torch.set_num_threads(1)
    trainer = tiny_trainer(output, reference="cached", ref_tokens_per_batch=64, ref_cache_dir=str(folder), max_steps=2)
    trainer.train()
    weights = {name: weight.tolist() for name, weight in trainer.model.state_dict().items()}
    results.put((output.name, weights, trainer.reference_reason, trainer.train_dataset["ref_logps"][:]))


def _at_once(function, arguments):
    """What processes that start together have put into their queue."""
    results = FORK.Queue()
    runs = [FORK.Process(target=function, args=(*of, results)) for of in arguments]
    for run in runs:
        run.start()
    found = [results.get(timeout=300) for _ in runs]
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * len(runs)
    return found


def test_runs_that_start_together_share_one_reference_cache(tmp_path):
    found = _at_once(_train, [(tmp_path / "cache", tmp_path / str(i)) for i in range(2)])
    assert all(one[1] == found[0][1] and one[3] == found[0][3] for one in found)
    reasons = sorted(reason for _, _, reason, _ in found)
    assert sum("16 computed" in reason for reason in reasons) == 1  # the other waited, and found them
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert not (folder / LOCK_FILE).exists()
    assert not list(folder.glob("*.tmp"))


def _tokenize(path, results):
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(path), split="train")
    trainer = tiny_trainer(path.parent / str(os.getpid()), train_dataset=rows, max_steps=1)
    results.put([list(row) for row in trainer.train_dataset["prompt_ids"]])


def test_runs_that_start_together_share_one_cache_of_tokens(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows(50)))
    found = _at_once(_tokenize, [(path,)] * 2)
    assert found[0] == found[1]
    assert len(found[0]) == 50


class Looks(TrainerCallback):
    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append((self.folder / LOCK_FILE).exists())


def test_a_run_holds_the_lock_while_it_trains_and_leaves_no_file(tmp_path):
    looks = Looks(tmp_path)
    tiny_trainer(tmp_path, max_steps=1, callbacks=[looks]).train()
    assert looks.seen == [True]
    assert not (tmp_path / LOCK_FILE).exists()
