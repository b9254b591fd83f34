"""Child processes find the package in the folder above a clone called fastdpo too."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastdpo.children import child_environment
from fastdpo.cli.launch import start
from fastdpo.evidence.bench.steps.methods import Job
from fastdpo.evidence.bench.steps.worker import Worker


@pytest.fixture
def above_a_clone(tmp_path, monkeypatch):
    """The current directory has a folder fastdpo, without modules, as a clone is."""
    (tmp_path / "fastdpo" / "docs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def test_a_child_imports_the_package(above_a_clone):
    for words in (["-c", "from fastdpo import DPOConfig"], ["-m", "fastdpo", "--help"]):
        done = subprocess.run([sys.executable, *words], env=child_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_elsewhere_the_environment_is_that_of_this_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert child_environment(A="1") == {**os.environ, "A": "1"}


def test_the_clone_itself_is_a_place_like_any_other(monkeypatch):
    from fastdpo.children import PACKAGE

    monkeypatch.chdir(PACKAGE.parent)
    assert child_environment() == dict(os.environ)


def test_a_step_is_measured_there(above_a_clone):
    worker = Worker()
    try:
        figures = worker.run(Job("tiny", "fastdpo", 1, 2), in_new_process=True)
    finally:
        worker.close()
    assert "error" not in figures
    assert len(figures["step_s"]) == 2


def test_processes_are_launched_there(above_a_clone, monkeypatch):
    seen = []
    monkeypatch.delenv(start.STARTED, raising=False)
    monkeypatch.setattr(start, "run_signalled", lambda words, environment: seen.append(environment) or 0)
    asked = dict.fromkeys(["accelerate_config", "num_machines", "machine_rank", "main_process_ip", "main_process_port"])
    options = SimpleNamespace(**asked, num_processes=2, fsdp=None, deepspeed=None)
    assert start.launch("train", ["--model", "m", "--num_processes", "2"], options) == 0
    plain = {**os.environ, start.STARTED: "1"}
    assert seen == [child_environment(**{start.STARTED: "1"})]
    assert seen != [plain]
