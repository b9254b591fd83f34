"""Times, memory and machine facts are what they say."""

import json
import subprocess

import pytest
import torch

from fastdpo.evidence.bench import measure

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="counts allocations of the CPU")


def mib(count):
    return torch.empty(count * 2**18)  # fp32


@needs_cpu
def test_peak_memory_is_the_most_that_lived_at_a_time_with_the_results():
    def work():
        first = mib(10)
        second = mib(20)
        del first
        return second, mib(15)

    assert measure.peak_mib(work) == pytest.approx(35, abs=0.01)


@needs_cpu
def test_peak_memory_does_not_count_what_was_there_before():
    there = mib(50)
    assert measure.peak_mib(lambda: (there + 1).sum()) == pytest.approx(50, abs=0.01)


@needs_cpu
def test_peak_memory_sees_what_backward_allocates():
    x = mib(4).zero_().requires_grad_()
    # exp keeps its result (4) and hands on an upstream gradient (4); the product with it is the third
    peak = measure.peak_mib(lambda: torch.autograd.grad(x.exp(), x, torch.ones(()).expand_as(x).contiguous()))
    assert peak == pytest.approx(12, abs=0.1)


def test_functions_take_turns_after_warm_ups(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(measure, "elapsed_ms", lambda function: (function(), float(next(clock)))[1])
    reads = iter(range(100))
    monkeypatch.setattr(measure.time, "process_time", lambda: next(reads) ** 2 / 1e3)
    times = measure.interleaved_ms({"a": lambda: None, "b": lambda: None}, 3)
    first = 2 * measure.NUM_WARMUPS  # the clock's readings of a: first, first + 2, first + 4
    # the CPU's clock is read before and after a call; of two squares in a row the difference is the sum of their roots
    cpu = {name: pytest.approx(4 * reading + 1) for name, reading in (("a", first + 2), ("b", first + 3))}
    assert times["a"] == {"ms": first + 2, "ms_min": first, "ms_max": first + 4, "cpu_ms": cpu["a"]}
    assert times["b"] == {"ms": first + 3, "ms_min": first + 1, "ms_max": first + 5, "cpu_ms": cpu["b"]}


def test_the_bare_matmul_counts_its_own_flops():
    function, flops = measure.matmul_job((8, 4, 16), torch.float32)
    function()
    repeats = 10 if torch.cuda.is_available() else 1
    assert flops == 2 * 8 * 4 * 16 * repeats


def test_a_record_names_the_machine_and_can_be_read_back(tmp_path):
    facts = measure.machine_facts()
    assert facts["device"]
    assert facts["torch"] == torch.__version__
    path = tmp_path / "new" / "lines.jsonl"
    measure.append_lines(str(path), [facts])
    measure.append_lines(str(path), [facts, facts])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [facts] * 3


def test_a_commit_has_a_plus_where_code_differs_and_none_for_new_records(tmp_path, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    for name in ("fastdpo/a.py", "kernels/b.py", "benchmarks/c.py", "benchmarks/results/d.jsonl", "docs/e.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    commit = git("rev-parse", "--short", "HEAD")
    monkeypatch.setattr(measure, "CHECKOUT", tmp_path)
    for name in ("benchmarks/results/d.jsonl", "docs/e.md"):
        (tmp_path / name).write_text("new\n")
    assert measure._commit() == commit
    for name in ("fastdpo/a.py", "kernels/b.py", "benchmarks/c.py"):
        (tmp_path / name).write_text("new\n")
        assert measure._commit() == f"{commit}+"
        (tmp_path / name).write_text("old\n")
    assert measure._commit() == commit
