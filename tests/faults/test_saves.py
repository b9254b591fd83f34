"""Saves are whole or not there; damage is found and named, and the newest sound checkpoint is never lost."""

import errno
import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from killing import differences, end_of, output, train_until
from tiny import make_rows, make_tokenizer
from tiny_runs import make_lora, tiny_trainer

from fastdpo import StopOnSignal
from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.files import write_whole
from fastdpo.training import resuming
from fastdpo.training.callbacks.json_lines import append_lines
from fastdpo.training.saving.checkpoints import checkpoint_folder
from fastdpo.training.saving.disk import DiskFull, is_full
from fastdpo.training.saving.manifest import (
    MANIFEST,
    EarlyChecksums,
    damage,
    has_manifest,
    size_of,
    write_manifest,
)
from fastdpo.training.saving.signals import Stopped
from fastdpo.training.saving.staging import UNFINISHED, checkpoints, put_in_place, remove, restore_unfinished, rotate

SAVES = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with three checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_trainer(folder, **SAVES).train()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# Killed inside a save

LIMITED = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1}
MOVED = {"max_steps": 4, "save_steps": 2, "adapter": {}, "sync_ref_model": True, "ref_model_sync_steps": 1}


def killed(folder, settings, moment, expected):
    """Whether the run came to that moment. It is killed, resumed, and compared with the end of one that was not."""
    status = train_until(folder, settings, moment)
    if status == 0:
        return False
    assert status == -9, output(folder)
    for checkpoint in checkpoints(folder / "out"):
        assert has_manifest(checkpoint)
        assert damage(checkpoint) is None
    assert train_until(folder, settings, resume=bool(checkpoints(folder / "out"))) == 0, output(folder)
    assert differences(expected, end_of(folder)) == [], moment
    assert not (folder / "out" / UNFINISHED).exists()
    return True


def test_a_run_that_is_killed_in_a_save_loses_nothing(tmp_path):
    assert train_until(tmp_path / "whole", LIMITED) == 0, output(tmp_path / "whole")
    for where, count in (("commit", 2), ("torn", 2 + 5)):
        assert killed(tmp_path / where, LIMITED, (where, count), end_of(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(("where", "settings"), [("save", LIMITED), ("torn", MOVED)], ids=["killed", "cut off"])
def test_a_run_that_is_killed_anywhere_in_a_save_loses_nothing(tmp_path, where, settings):
    assert train_until(tmp_path / "whole", settings, (where, 0)) == 0, output(tmp_path / "whole")
    expected = end_of(tmp_path / "whole")
    moments = range(1, expected["num_events"] + 1)
    assert len(moments) >= (8 if where == "torn" else 24)  # files of two saves, renames, the removal of the first
    for count in moments:
        assert killed(tmp_path / str(count), settings, (where, count), expected), count
        shutil.rmtree(tmp_path / str(count))


def test_a_complete_checkpoint_that_was_not_renamed_yet_is_kept(run):
    """Killed between the last file and the rename; an incomplete one goes."""
    staged = run / UNFINISHED
    staged.mkdir()
    (run / "checkpoint-3").rename(staged / "checkpoint-3")
    shutil.copytree(run / "checkpoint-2", staged / "checkpoint-4")
    (staged / "checkpoint-4" / MANIFEST).unlink()
    restore_unfinished(run)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert not staged.exists()


# Damage


def damages(path):
    """The ways in which a file can be damaged, and what the error says."""
    content = path.read_bytes()
    middle = len(content) // 2
    return {
        "cut": (content[:-1], f"{path.name} has .* bytes instead of"),
        "flipped": (
            content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            f"{path.name} (has another checksum|cannot be read)",
        ),
        "gone": (None, f"{path.name} is missing"),
    }


@pytest.mark.parametrize("kind", ["cut", "flipped", "gone"])
def test_every_damaged_file_is_named_and_the_newest_sound_checkpoint_offered(run, kind):
    last = run / "checkpoint-3"
    names = sorted(json.loads((last / MANIFEST).read_text())["files"])
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "fastdpo_progress.json"} <= set(names)
    for name in names:
        path = last / name
        before = path.read_bytes()
        content, message = damages(path)[kind]
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        if name == "trainer_state.json":
            message = "trainer_state.json"
        with pytest.raises(ValueError, match=message) as refused:
            checkpoint_folder(str(last), run)
        assert f"the newest sound checkpoint is {run / 'checkpoint-2'} (--resume_from_checkpoint last takes it)" in str(
            refused.value
        )
        assert checkpoint_folder("last", run) == str(run / "checkpoint-2")
        path.write_bytes(before)
    assert checkpoint_folder(str(last), run) == str(last)


def test_the_last_sound_checkpoint_is_taken_and_that_is_said(run, caplog):
    os.truncate(run / "checkpoint-3" / "optimizer.pt", 100)
    (run / "checkpoint-2" / MANIFEST).write_text("{")
    again = tiny_trainer(run, max_steps=3)
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint="last")
    assert "checkpoint-3: optimizer.pt has 100 bytes instead of" in caplog.text
    assert f"checkpoint-2: {MANIFEST} cannot be read" in caplog.text
    assert f"Training resumes from {run / 'checkpoint-1'}, the newest sound checkpoint" in caplog.text
    expected = torch.load(run / "checkpoint-1" / "scheduler.pt", weights_only=True)
    assert expected["last_epoch"] == 1
    assert again.state.global_step == 3


def test_a_run_without_a_sound_checkpoint_says_so(run):
    for path in checkpoints(run):
        (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3: model.safetensors is missing; no checkpoint in .* is sound"):
        checkpoint_folder("last", run)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.safetensors"], "cannot be read"),
        ({"model.safetensors": 3}, "cannot be read"),
        ({"model.safetensors": {"bytes": math.inf, "checksum": "xxh3:0"}}, "cannot be read"),
        ({"config.json": {"bytes": 1, "checksum": "none:0"}}, "config.json has .* bytes instead of 1"),
        (
            {"../checkpoint-2/config.json": {"bytes": 1, "checksum": "xxh3:0"}},
            "names .*, which is outside of the folder",
        ),
        ({"/etc/passwd": {"bytes": 1, "checksum": "xxh3:0"}}, "names /etc/passwd, which is outside of the folder"),
    ],
)
def test_a_manifest_that_is_none_is_damage(run, files, message):
    (run / "checkpoint-3" / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(ValueError, match=rf"checkpoint-3: .*{message}"):
        checkpoint_folder(str(run / "checkpoint-3"), run)
    assert checkpoint_folder("last", run) == str(run / "checkpoint-2")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1, "of_another_version": 2}'])
def test_progress_that_is_none_is_refused_by_its_file(run, content):
    (run / "checkpoint-3" / MANIFEST).unlink()
    (run / "checkpoint-3" / "fastdpo_progress.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint-3/fastdpo_progress.json must hold the progress of a run"):
        tiny_trainer(run, max_steps=4).train(resume_from_checkpoint="last")


def test_a_checkpoint_without_a_manifest_is_loaded_and_that_is_said(run, caplog):
    for name in (MANIFEST, "fastdpo_progress.json"):
        (run / "checkpoint-3" / name).unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint_folder("last", run) == str(run / "checkpoint-3")
    assert f"checkpoint-3 has no {MANIFEST}" in caplog.text
    tiny_trainer(run, max_steps=4).train(resume_from_checkpoint="last")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_without_a_manifest_that_is_cut_off_is_not_the_last_sound_one(run, name):
    (run / "checkpoint-3" / MANIFEST).unlink()
    os.truncate(run / "checkpoint-3" / name, os.path.getsize(run / "checkpoint-3" / name) // 2)
    assert checkpoint_folder("last", run) == str(run / "checkpoint-2")


def test_a_save_that_cuts_a_file_off_in_silence_fails(tmp_path, monkeypatch):
    trainer, save = tiny_trainer(tmp_path, **SAVES), torch.save

    def cuts(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        if str(path).endswith("optimizer.pt") and "checkpoint-2" in str(path):
            os.truncate(path, 1000)

    monkeypatch.setattr(torch, "save", cuts)
    with pytest.raises(OSError, match=r"must hold whole files after a save, but optimizer.pt is cut off"):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_weights_that_change_after_they_were_read_early_are_read_again(run):
    early = EarlyChecksums()
    folder = run / "checkpoint-3"
    early.start(folder)
    weights = folder / "model.safetensors"
    assert early.of(weights) == json.loads((folder / MANIFEST).read_text())["files"][weights.name]["checksum"]
    early.start(folder)
    shutil.copyfile(run / "checkpoint-1" / weights.name, weights)
    write_manifest(folder, early)
    assert damage(folder) is None


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**20 + 3])
def test_a_checksum_is_the_same_when_it_is_written_and_when_it_is_compared(tmp_path, size):
    (tmp_path / "weights.safetensors.part").write_bytes(os.urandom(size))
    write_manifest(tmp_path)
    assert damage(tmp_path) is None


def test_files_that_training_does_not_read_may_change(run):
    (run / "checkpoint-3" / "README.md").write_text("a card")
    (run / "checkpoint-3" / "notes.txt").write_text("mine")
    assert damage(run / "checkpoint-3") is None


@pytest.mark.parametrize(
    "settings", [{"peft_config": make_lora()}, {"sync_ref_model": True}, {"save_only_model": True}]
)
def test_the_manifest_names_every_file(tmp_path, settings):
    tiny_trainer(tmp_path, max_steps=1, **SAVES, **settings).train()
    folder = tmp_path / "checkpoint-1"
    named = set(json.loads((folder / MANIFEST).read_text())["files"])
    assert named == {path.name for path in folder.iterdir()} - {MANIFEST, "README.md"}


# save_total_limit


def test_the_limit_removes_damaged_checkpoints_first_and_never_the_last_sound_one(run):
    os.truncate(run / "checkpoint-3" / "model.safetensors", 10)
    rotate(run, 2, [run / "checkpoint-2"])
    assert [path.name for path in checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]
    rotate(run, 1, [run / "checkpoint-2"])
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"]
    assert not (run / UNFINISHED).exists()


def test_the_disk_has_a_new_checkpoint_before_an_older_one_goes(run, monkeypatch):
    events, fsync = [], os.fsync

    def spy(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr("fastdpo.training.saving.staging.remove", lambda folder: events.append(f"removed {folder}"))
    rotate(run, 1, [run / "checkpoint-3"])
    assert events[-2:] == [f"removed {run / 'checkpoint-1'}", f"removed {run / 'checkpoint-2'}"]
    files = {str(path) for path in (run / "checkpoint-3").rglob("*")} | {str(run / "checkpoint-3"), str(run)}
    assert set(events[:-2]) == files


def test_a_checkpoint_that_is_removed_leaves_its_name_at_once(run, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if the run were killed before
    remove(run / "checkpoint-1")
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("is_damaged", [True, False])
def test_a_run_that_resumes_before_a_later_checkpoint_keeps_what_it_saves(run, is_damaged):
    """Trainer would count checkpoint-3 as the newest and remove the one of step 2."""
    if is_damaged:
        os.truncate(run / "checkpoint-3" / "model.safetensors", 10)
        shutil.rmtree(run / "checkpoint-2")
    seen = []

    class Looks(resuming.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append([path.name for path in checkpoints(run) if damage(path) is None])

    first = str(run / "checkpoint-1")
    tiny_trainer(run, save_total_limit=1, callbacks=[Looks()], **SAVES).train(resume_from_checkpoint=first)
    assert seen == [["checkpoint-2"], ["checkpoint-3"]]


def test_the_best_checkpoint_stays_under_the_limit(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        max_steps=4,
        eval_dataset=make_rows(5, seed=1),
        load_best_model_at_end=True,
        metric_for_best_model="rewards/rejected",
        greater_is_better=True,
        save_total_limit=2,
        learning_rate=1e-2,
        **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
        **dict.fromkeys(("eval_steps", "save_steps"), 1),
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best == tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert best == tmp_path / "checkpoint-1"
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-4"]
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"] == str(
        best
    )


# A full disk


@pytest.fixture
def small_disk(tmp_path, finished):
    """A file system with space for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = size_of(finished / "checkpoint-1")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 2}", "tmpfs", folder], check=False)
    if done.returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    # its input ends with the tests, also with those that are killed; lazily, since a file may still be open
    words = ["sh", "-c", 'cat; umount -l "$0"', folder]
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as unmounts:
        yield folder
    assert unmounts.returncode == 0


def test_a_full_disk_keeps_the_last_checkpoint_and_names_the_missing_bytes(small_disk, finished):
    with pytest.raises(DiskFull) as stopped:
        tiny_trainer(small_disk, **SAVES).train()
    assert [path.name for path in checkpoints(small_disk)] == ["checkpoint-1"]
    assert damage(small_disk / "checkpoint-1") is None
    assert not (small_disk / UNFINISHED).exists()
    message = str(stopped.value)
    assert f"space for checkpoint-2, got {small_disk}: {stopped.value.missing:,} bytes are missing" in message
    assert "--resume_from_checkpoint last" in message
    missing = size_of(small_disk / "checkpoint-1") - shutil.disk_usage(small_disk).free
    assert missing == pytest.approx(stopped.value.missing, abs=2**15)  # pages of small files
    assert stopped.value.missing > 0
    for name in (finished / "checkpoint-1").iterdir():
        assert (small_disk / "checkpoint-1" / name.name).exists()


def test_a_save_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(resuming, "free_bytes", lambda folder: 1000)
    trainer, begun = tiny_trainer(tmp_path, **SAVES), []
    monkeypatch.setattr(trainer, "save_model", lambda *_, **__: begun.append(True))
    with pytest.raises(DiskFull, match=r"bytes are missing \(checkpoint-1 needs about [\d,]+, 1,000 are free\)"):
        trainer.train()
    assert begun == []


def test_a_signal_ends_the_waiting_for_space(tmp_path, monkeypatch):
    free = itertools.chain([1000] * 9, itertools.repeat(10**9))
    monkeypatch.setattr(resuming, "free_bytes", lambda folder: next(free))
    monkeypatch.setattr(resuming, "SECONDS_BETWEEN_TRIES", 0.05)
    monkeypatch.setattr(resuming.logger, "warning", lambda text: os.kill(os.getpid(), signal.SIGUSR1))
    trainer = tiny_trainer(tmp_path, on_full_disk="wait", callbacks=[StopOnSignal()], **SAVES)
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert checkpoints(tmp_path) == []


def test_a_run_on_a_full_disk_waits_for_space_and_goes_on(small_disk, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(resuming, "SECONDS_BETWEEN_TRIES", 0.05)
    trainer = tiny_trainer(small_disk, on_full_disk="wait", max_steps=2, **SAVES)

    is_over = threading.Event()

    def make_space():
        while "Waiting (on_full_disk)" not in caplog.text and not is_over.wait(0.05):
            pass
        shutil.move(small_disk / "checkpoint-1", tmp_path / "elsewhere")

    thread = threading.Thread(target=make_space)
    thread.start()
    try:
        trainer.train()
    finally:
        is_over.set()
        thread.join()
    assert [path.name for path in checkpoints(small_disk)] == ["checkpoint-2"]
    assert damage(small_disk / "checkpoint-2") is None
    assert caplog.text.count("Waiting (on_full_disk)") == 1


def test_a_model_on_a_full_disk_waits_for_space_and_is_saved(small_disk, tmp_path, monkeypatch):
    """The last save of a run, after which its weights would be lost."""
    trainer, filler = tiny_trainer(small_disk, on_full_disk="wait"), small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    monkeypatch.setattr(resuming, "SECONDS_BETWEEN_TRIES", 0.0)
    said = []

    def make_space(text):
        said.append(text)
        filler.unlink()

    monkeypatch.setattr(resuming.logger, "warning", make_space)
    trainer.save_model()
    assert len(said) == 1
    assert f"space for the model, got {small_disk}: " in said[0]
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in small_disk.iterdir()}
    assert not (small_disk / UNFINISHED).exists()


@pytest.mark.parametrize("owner", ["torch", "json"])
def test_a_write_that_fails_in_a_save_leaves_the_last_checkpoint_and_no_part_of_the_next(tmp_path, monkeypatch, owner):
    """The disk is filled by someone else meanwhile, so that the space before the save says nothing."""
    trainer = tiny_trainer(tmp_path, **SAVES)

    class Fills(resuming.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if owner == "torch":
                monkeypatch.setattr(
                    torch, "save", _raises(RuntimeError("PytorchStreamWriter failed: file write failed"))
                )
            else:
                monkeypatch.setattr("fastdpo.training.saving.run_state.StateWriter.write", _raises(error))

    trainer.add_callback(Fills())
    with pytest.raises(DiskFull, match=r"about [\d,]+ bytes for checkpoint-2 cannot be written"):
        trainer.train()
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not (tmp_path / UNFINISHED).exists()
    again = tiny_trainer(tmp_path, **SAVES)
    again.train(resume_from_checkpoint="last")
    assert again.state.global_step == 3


def _raises(error):
    def fails(*args, **kwargs):
        raise error

    return fails


def test_an_error_that_is_not_about_space_stays_what_it_is(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, on_full_disk="wait", **SAVES)
    monkeypatch.setattr("fastdpo.training.saving.run_state.StateWriter.write", _raises(KeyError("not about space")))
    with pytest.raises(KeyError, match="not about space"):
        trainer.train()
    assert checkpoints(tmp_path) == []


def test_the_ways_in_which_libraries_report_a_full_disk_are_known():
    caused = RuntimeError("wrapped")
    caused.__cause__ = OSError(errno.EDQUOT, "quota")
    assert is_full(OSError(errno.ENOSPC, "x"))
    assert is_full(caused)
    assert is_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_full(ValueError("x"))
    assert not is_full(None)


def test_on_full_disk_has_two_values(tmp_path):
    with pytest.raises(ValueError, match=r"on_full_disk must be one of .*got 'retry'"):
        tiny_trainer(tmp_path, on_full_disk="retry")


# Single files


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_whole(path, "old")
    monkeypatch.setattr(os, "replace", _raises(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_whole(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["state.json"]
    write_whole(path, b"new", is_durable=True)
    assert path.read_text() == "new"


def test_a_write_on_a_full_disk_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", _raises(OSError(errno.ENOSPC, "No space left on device")))  # without a name
    with pytest.raises(OSError, match=r"No space left on device: '.*state.json'") as error:
        write_whole(tmp_path / "state.json", "new", is_durable=True)
    assert is_full(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        append_lines(Path("/dev/full"), [{"step": 1}])


def test_tokenizing_on_a_full_disk_names_the_folder_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.finalize", _raises(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match=rf"No space left: '{tmp_path}/\w+'"):
        prepare_preference_dataset(Dataset.from_list(make_rows(4)), make_tokenizer(), TokenizationSettings())


def test_a_model_that_cannot_be_saved_whole_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(1.0)
    monkeypatch.setattr(torch, "save", _raises(OSError(errno.ENOSPC, "full")))  # the last file, after the weights
    with pytest.raises(DiskFull, match=r"about [\d,]+ bytes for the model cannot be written"):
        trainer.save_model()
    assert not (tmp_path / UNFINISHED).exists()
    monkeypatch.undo()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() != before
    assert not (tmp_path / UNFINISHED).exists()


def test_weights_in_other_pieces_replace_those_of_an_earlier_save(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "model-00001-of-00003.safetensors", "my_model.safetensors"):
        (folder / name).write_text("old")
    staged = folder / UNFINISHED
    staged.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        (staged / name).write_text("new")
    put_in_place(staged, folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "model-00001-of-00002.safetensors": "new",
        "model.safetensors.index.json": "new",
        "config.json": "new",
        "my_model.safetensors": "old",
    }
