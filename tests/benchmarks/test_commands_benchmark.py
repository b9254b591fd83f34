"""What the pages say of the time of commands is what the record says."""

import json
from pathlib import Path

import bench_commands as bench
import pytest

ROOT = Path(__file__).parents[2]


def newest():
    lines = (ROOT / "benchmarks" / "results" / "commands.jsonl").read_text().splitlines()
    return {(r["workload"], r["method"]): r for r in map(json.loads, lines)}


def text(page):
    return " ".join((ROOT / "docs" / page).read_text().split())


def test_the_time_of_a_plan_is_that_of_the_record():
    seconds = [newest()[name, " ".join(bench.PLAN)]["cpu_seconds"] for name in ("8B", "70B")]
    assert f"an 8B Llama takes {seconds[0]:.0f} CPU seconds and a 70B model {seconds[1]:.0f}" in text("memory.md")


def test_the_time_of_an_inspection_is_that_of_the_record():
    near, without = (newest()["60000 rows", " ".join([*bench.INSPECT, *m])] for m in ([], ["--no_near"]))
    words = (
        f"{without['rows']:,} rows ({without['bytes'] / 1e6:.0f} MB) take {without['cpu_seconds']:.0f} seconds of CPU"
        f" time without a tokenizer. Near duplicates take another"
        f" {near['cpu_seconds'] - without['cpu_seconds']:.0f}"
    )
    assert words in text("data_checks.md")


@pytest.mark.slow
def test_commands_are_timed_in_processes_of_their_own(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    bench.main(["--quick", "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["workload"] for record in records] == ["500 rows", "500 rows", "8B"]
    assert all(record["cpu_seconds"] > 1 for record in records)
