"""If one process of a run fails, all of them stop within a minute, with the same message."""

import json
import socket

import pytest
from failing import FAILS, run_all
from processes import status_of

FAULTS = {  # and what every process that can still speak says
    "killed": "another process of this run has ended without a message: it was killed",
    "out of memory": "does not fit into memory",
    "not finite": "FloatingPointError: the loss is nan at step 0; no weight was changed. The batch is saved in",
    "bad row": "row 6",
    "bad row of a stream": "row 6",
}
QUICK = [("DDP", "out of memory"), ("FSDP2", "killed")]
REST = [(engine, fault) for engine in ("DDP", "FSDP2") for fault in FAULTS if (engine, fault) not in QUICK]
FOREVER = ("DDP", "waits forever")


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run(folder, pairs):
    """By engine and fault, what each process has printed, with its exit status and its seconds."""
    cases = []
    for number, ((engine, fault), port) in enumerate(zip(pairs, free_ports(len(pairs)), strict=True)):
        (folder / str(number)).mkdir()
        cases.append({"engine": engine, "fault": fault, "folder": str(folder / str(number)), "port": port})
    assert status_of(run_all, folder, {"cases": cases}) == 0, (folder / "printed0.txt").read_text()
    found = {}
    for number, case in enumerate(pairs):
        own = folder / str(number)
        found[case] = [
            {"text": (own / f"out{rank}.txt").read_text(), **json.loads((own / f"result{rank}.json").read_text())}
            for rank in range(2)
        ]
    return found


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    return run(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def rest_of_ends(tmp_path_factory):
    return run(tmp_path_factory.mktemp("rest"), [*REST, FOREVER])


def assert_stopped_with_one_message(found, fault):
    for rank, end in enumerate(found):
        assert end["status"] != 0
        assert end["in_time"], end["seconds"]
        if (fault, rank) == ("killed", FAILS):
            assert end["status"] == -9
        else:
            assert FAULTS[fault] in end["text"]
            assert ("process 1 failed: ValueError: " in end["text"]) == (fault == "out of memory" and rank != FAILS)


@pytest.mark.parametrize(("engine", "fault"), QUICK)
def test_all_processes_stop_with_one_message(engine, fault, ends):
    assert_stopped_with_one_message(ends[engine, fault], fault)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "fault"), REST)
def test_whatever_the_fault(engine, fault, rest_of_ends):
    assert_stopped_with_one_message(rest_of_ends[engine, fault], fault)


@pytest.mark.slow
def test_a_process_that_waits_for_one_that_does_not_end_is_ended(rest_of_ends):
    other, failed = rest_of_ends[FOREVER]
    assert failed["status"] == -9  # by the test: it would have slept on
    assert (other["status"], other["seconds"] < failed["seconds"]) == (1, True)
    assert "process 1 failed: ValueError: " in other["text"]
    assert FAULTS["out of memory"] in other["text"]
    assert "process 0 stops with it" in other["text"]
