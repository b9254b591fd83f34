"""The memory of a process beside others, as slow tests measure it on a CPU, and the part of docs/scaling.md with it.

The record is benchmarks/results/memory_per_process.jsonl. To renew it, run the slow tests of test_memory_per_process.py
and those of test_sequence_parallel.py named "keep" with FASTDPO_MEMORY_RECORD=1, then this file as a script, which
writes the pages' parts. Bytes differ between runs: gloo frees buffers late on a busy machine.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from shared import pages

from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.records import groups, read

RECORD = pages.RESULTS / "memory_per_process.jsonl"
PAGE = pages.DOCS / "scaling.md"
RENEWS = "FASTDPO_MEMORY_RECORD"
MIB = 2**20
SHARES = "sequence parallelism"


def keep(workload, num_processes, **found):
    """Appends to the record if it is renewed. `found` are bytes: measured and estimated, or kept and whole."""
    if os.environ.get(RENEWS):
        record = {"workload": workload, "x": num_processes, **{name: int(value) for name, value in found.items()}}
        append_lines(str(RECORD), [{**machine_facts(), **record}])


def name_of(reference, vocab_size):
    training = "LoRA" if reference == "adapter" else f"full weights, {reference} reference"
    return f"{training}, vocabulary {vocab_size:,}"


def table(records):
    """MiB, measured / by the formula."""
    numbers = sorted({record["x"] for record in records if "measured" in record})
    heads = [f"{number} process{'es' if number > 1 else ''}" for number in numbers]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for (workload,), own in groups([record for record in records if "measured" in record], ("workload",)).items():
        of = {record["x"]: f"{record['measured'] / MIB:.1f} / {record['estimated'] / MIB:.1f}" for record in own}
        lines.append(f"| {workload} | {' | '.join(of[number] for number in numbers)} |")
    return "\n".join(lines) + "\n"


def words(records):
    """What a process keeps under sequence parallelism, and how far the estimate is off on two."""
    of = {record["x"]: record for record in records if record["workload"] == SHARES}
    kept = [f"{of[number]['kept'] / of[number]['whole']:.2f}" for number in (2, 4)]
    return (
        f"on two processes {kept[0]} times, on four {kept[1]} times the bytes of one are kept for backward (measured on"
        " a 1,024-token row)"
    )


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(pages.filled(text, {RECORD.name: table(read(RECORD))}))
    if words(read(RECORD)) not in " ".join(text.split()):
        sys.exit(f"{PAGE.name} must say: {words(read(RECORD))}")
