"""Threads where other programs have the cores: what is seen of them, what the demo does and what train says."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from fastdpo.cli import threads
from fastdpo.cli.demo import _Threads
from fastdpo.cli.run import warn_of_busy_cores
from fastdpo.cli.threads import FreeCores, busy_cores_warning, cores_of_this_process


class Machine:
    """Four cores, three of which this process may use; seconds pass only where a test lets them."""

    def __init__(self, monkeypatch):
        self.now, self.own, self.idle = 100.0, 7.0, [50.0] * 4
        monkeypatch.setattr(threads, "cores_of_this_process", lambda: [0, 1, 3])
        monkeypatch.setattr(threads.psutil, "cpu_times", self.cpu_times)
        monkeypatch.setattr(threads.os, "times", lambda: (self.own, 0.0, 0.0, 0.0, self.now))

    def cpu_times(self, percpu):
        assert percpu
        return [SimpleNamespace(idle=idle) for idle in self.idle]

    def run(self, seconds, own, idle):
        """Of `seconds`: what this process had, on all threads, and the share that each core has slept."""
        self.now += seconds
        self.own += own * seconds
        self.idle = [before + share * seconds for before, share in zip(self.idle, idle, strict=True)]

    def cores(self):
        return FreeCores(lambda: self.now)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_all_cores_are_free_until_a_second_has_been_seen(machine):
    cores = machine.cores()
    assert (cores.num_cores, cores.threads(8)) == (3, 3)
    machine.run(0.5, own=0.0, idle=[0, 0, 0, 0])
    assert cores.threads(8) == 3


@pytest.mark.parametrize(
    ("own", "idle", "free", "expected"),
    [
        (1.0, [0, 1, 0, 1], 3.0, 3),  # this process alone; what others do on core 2 is not its concern
        (1.0, [0, 0, 1, 1], 2.0, 2),  # it has one core, another program a second one
        (2.0, [0, 0, 1, 0], 2.0, 2),
        (1.4, [0, 0, 0, 0], 1.4, 1),  # others would take more if they could
        (0.3, [0, 0, 0, 0], 0.3, 1),  # never none
    ],
)
def test_a_core_is_free_where_no_other_program_has_it(machine, own, idle, free, expected):
    cores = machine.cores()
    machine.run(2.0, own, idle)
    assert cores.threads(8) == expected
    assert cores.free == pytest.approx(free)


def test_what_counts_is_the_time_since_the_last_look_and_there_are_never_more_than_asked_for(machine):
    cores = machine.cores()
    machine.run(10.0, own=0.0, idle=[0, 0, 0, 0])
    assert cores.threads(2) == 1
    machine.run(2.0, own=1.0, idle=[0, 1, 1, 1])
    assert cores.threads(2) == 2
    assert cores.threads(1) == 1


def test_this_machine_has_cores_and_can_be_looked_at():
    cores = FreeCores()
    assert 1 <= cores.num_cores == len(cores_of_this_process())
    assert cores.threads(1) == 1


def test_the_demo_has_a_thread_for_every_free_core_and_leaves_their_number_as_it_was(machine):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        demo_threads = _Threads(machine.cores())
        demo_threads.update()
        assert torch.get_num_threads() == 3  # not yet begun
        with demo_threads:
            assert torch.get_num_threads() == 2  # all are free: the most that help
            machine.run(2.0, own=1.0, idle=[0, 0, 1, 0])
            demo_threads.update()
            assert torch.get_num_threads() == 1
            machine.run(2.0, own=1.0, idle=[0, 1, 1, 1])
            demo_threads.update()
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_training_warns_where_threads_would_wait_and_keeps_their_number(machine, capsys, monkeypatch):
    import torch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")), is_world_process_zero=lambda: True)
    cores = machine.cores()
    machine.run(2.0, own=1.0, idle=[0, 0, 1, 0])
    warn_of_busy_cores(Console(width=300), trainer, cores)
    out = capsys.readouterr().out
    assert out.startswith("warning: other programs keep 2.0 of 3 CPU cores busy: this run's 3 threads")
    assert "OMP_NUM_THREADS=1 before the command" in out
    trainer.args.device = torch.device("cuda")
    warn_of_busy_cores(Console(width=300), trainer, cores)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("free", "num_threads", "environment"), [(3.8, 4, {}), (0.2, 1, {}), (1.0, 4, {"OMP_NUM_THREADS": "4"})]
)
def test_nothing_is_said_where_cores_are_free_or_the_number_was_chosen(monkeypatch, free, num_threads, environment):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert busy_cores_warning(free, 4, num_threads) is None
