"""Whole weights on every process: losses and gradients of every kind of run are those of one process.

test_distributed.py has a few kinds that run with every `make test`, evaluation and the whole log.
"""

import pytest
from parallel_record import works
from processes import on_processes
from sharded_runs import resume, share_by_formula
from test_fsdp import MODES, assert_like_one, run_on

from fastdpo.training.memory.cluster.layouts import Layout

UNEVEN = ["uneven pairs", "uneven pairs, in order"]


def on(num_processes, folder, modes, steps):
    return run_on(num_processes, folder, modes, steps, is_sharded=False)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return on(2, tmp_path_factory.mktemp("two"), MODES, 1)


@pytest.fixture(scope="module")
def of_four_after_five_steps(tmp_path_factory):
    return on(4, tmp_path_factory.mktemp("four"), (*MODES, *UNEVEN), 5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_of_one_process(mode, of_two, tmp_path):
    with works("DDP", mode, processes=2, steps=1):
        assert_like_one(mode, *of_two[mode], tmp_path / "one", 1, is_sharded=False)
    if mode == "frozen reference":
        share = share_by_formula(Layout("DDP", copies=2))
        assert [process["share_of_reference"] for process in of_two[mode][1]] == [share] * 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MODES, *UNEVEN])
def test_after_five_steps_on_four_processes_too(mode, of_four_after_five_steps, tmp_path):
    names = ("uneven pairs", "fewer rows than processes") if mode in UNEVEN else (mode,)
    with works("DDP", *names, processes=4, steps=5):
        assert_like_one(mode, *of_four_after_five_steps[mode], tmp_path / "one", 5, is_sharded=False)


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_weights(tmp_path):
    cases = [{"mode": mode} for mode in ("cached reference", "LoRA")]
    with works("DDP", "resuming", processes=2, steps=4):
        for case in on_processes(resume, cases, tmp_path):
            for weights, again in case:  # the same computation, so the same bits
                assert weights == again
