"""Several processes of a test: a failure on one is shown and ends all, and none waits forever."""

import os
import sys
import time

import pytest
from processes import on_processes, status_of


def meet(folder, number):
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    ranks = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, torch.tensor([float(os.environ["LOCAL_RANK"])]))
    return {"ranks": [int(rank) for rank in ranks], "number": number, "folder": folder.name, "pid": os.getpid()}


def fail_on_one(folder):
    if os.environ["RANK"] == "1":
        raise ValueError("row 7 is bad")
    time.sleep(600)


def wait(folder):
    time.sleep(600)


def test_cases_run_in_order_on_all_processes_which_meet(tmp_path):
    found = on_processes(meet, [{"number": 5}, {"number": 6}], tmp_path, 3)
    assert [[of["ranks"] for of in case] for case in found] == [[[0, 1, 2]] * 3] * 2
    assert [[of["number"] for of in case] for case in found] == [[5] * 3, [6] * 3]
    assert [[of["folder"] for of in case] for case in found] == [["0"] * 3, ["1"] * 3]
    assert len({of["pid"] for case in found for of in case} - {os.getpid()}) == 3


def test_a_process_that_fails_ends_the_others_and_its_error_is_shown(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)processes \[1\] of 2 failed .*ValueError: row 7 is bad"):
        on_processes(fail_on_one, [{}], tmp_path, timeout=300)


def end_with(number, code):
    print("before the end", flush=True)
    assert "RANK" not in os.environ
    if number:
        os.kill(os.getpid(), number)
    sys.exit(code)


@pytest.mark.parametrize(("number", "code", "status"), [(0, 0, 0), (0, 143, 143), (9, 0, -9)])
def test_the_status_of_a_process_that_may_be_killed(tmp_path, number, code, status):
    assert status_of(end_with, tmp_path / "run", {"number": number, "code": code}) == status
    assert (tmp_path / "run" / "printed0.txt").read_text() == "before the end\n"


def test_processes_that_do_not_end_are_ended(tmp_path):
    with pytest.raises(AssertionError, match=r"processes \[0, 1\] of 2 failed or did not end"):
        on_processes(wait, [{}], tmp_path, timeout=1)
