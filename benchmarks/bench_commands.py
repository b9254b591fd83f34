"""CPU seconds of commands that people wait for: `fastdpo plan` by size of the model, `fastdpo data inspect` by check.

    python benchmarks/bench_commands.py [--quick] [--rows N] [--out FILE.jsonl]

Each command runs once, in a process of its own on one thread; Python and its imports count. Plans are of Llamas of 8B
and 70B weights from their configs, with every line that `plan` shows. Rows are conversations of random words, as those
of bench_data.py, in a file of JSON Lines; without --model, so without a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_data import make_rows
from scaling_model import MODELS

from fastdpo.children import child_environment
from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.records import Record
from fastdpo.evidence.bench.steps.worker import QUIET

PLAN = ("plan", "--gpu_memory", "80GB", "--max_length", "4096")
INSPECT = ("data", "inspect", "--json")


def cpu_seconds(words: Sequence[str]) -> float:
    """Of a command, in a process of its own. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "fastdpo", *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = child_environment(**{**QUIET, "OMP_NUM_THREADS": "1"})
    subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def plans(folder: Path, names: Sequence[str]) -> list[Record]:
    """A record for the plan of each Llama."""
    found = []
    for name in names:
        MODELS[name].save_pretrained(folder / name)
        seconds = cpu_seconds([*PLAN, "--model", str(folder / name)])
        found.append({"workload": name, "method": " ".join(PLAN), "cpu_seconds": seconds})
    return found


def inspections(folder: Path, num_rows: int) -> list[Record]:
    """A record with the search for near duplicates, and one without."""
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows("turns", num_rows))
    facts: dict[str, Any] = {"workload": f"{num_rows} rows", "rows": num_rows, "bytes": path.stat().st_size}
    found = []
    for more in (["--no_near"], []):
        seconds = cpu_seconds([*INSPECT, str(path), *more])
        found.append({**facts, "method": " ".join([*INSPECT, *more]), "cpu_seconds": seconds})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--quick", action="store_true", help="no plan of 70B, and 500 rows")
    parser.add_argument("--out", help="append one JSON line per command to this file")
    options = parser.parse_args(argv)
    facts = machine_facts()
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as folder:
        records = inspections(Path(folder), 500 if options.quick else options.rows)
        records += plans(Path(folder), ["8B"] if options.quick else ["8B", "70B"])
    for record in records:
        print(f"{record['cpu_seconds']:8.1f} CPU s  {record['workload']:12} fastdpo {record['method']}", flush=True)
    append_lines(options.out, [{**facts, **record} for record in records])


if __name__ == "__main__":
    main()
