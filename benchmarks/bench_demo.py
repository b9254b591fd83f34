"""What `fastdpo demo` prints, for two seeds: the table of the README, and what another seed changes.

    python benchmarks/bench_demo.py            # runs the demo with seeds 0 and 1, and prints the README's part
    python benchmarks/bench_demo.py --write    # also into results/demo.jsonl and README.md
    python benchmarks/bench_demo.py --docs     # README.md from the results as they are

Every run is the command itself, in a process and a folder of its own. Figures are means over held-out prompts or pairs
with one standard error, as `fastdpo demo` writes them to its folder. Two to three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from shared import pages

from fastdpo.alignment.results import Estimate
from fastdpo.children import child_environment
from fastdpo.cli.demo import DEMO_FILE, SIZE_NAMES
from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.records import Record, read

RESULTS, README = pages.RESULTS / "demo.jsonl", pages.DOCS.parent / "README.md"
SEEDS = (0, 1)
FIGURES = ("accuracy", "margin", "reward", "kl")


def record_of(seed: int, size: str) -> Record:
    """The figures of a demo, run now."""
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as folder:
        output_dir = Path(folder) / "run"
        options = ["--output_dir", str(output_dir), "--seed", str(seed), "--size", size]
        command = [sys.executable, "-m", "fastdpo", "demo", *options]
        subprocess.run(command, env=child_environment(), check=True, stdout=sys.stderr)
        written = json.loads((output_dir / DEMO_FILE).read_text())
    models = [
        {"beta": model["beta"], "steps": last_step(model["log_history"]), **{name: model[name] for name in FIGURES}}
        for model in written["models"]
    ]
    facts = {name: written[name] for name in ("label_ceiling", "num_train_pairs", "num_heldout_pairs", "orderings")}
    return {"workload": f"demo, seed {seed}", "method": size, **facts, "seconds": written["seconds"], "models": models}


def last_step(log_history: Sequence[Record]) -> int:
    return max((entry["step"] for entry in log_history), default=0)


def part(records: Sequence[Record]) -> str:
    """The README's part: the table of the first seed, how it was made, and the smallest beta with the second."""
    newest = {record["workload"]: record for record in records}
    first, second = (newest[f"demo, seed {seed}"] for seed in SEEDS)
    trained = first["models"][1]
    lines = ["| model | accuracy | margin | true reward | KL to the reference |", "|---|---|---|---|---|"]
    for model in first["models"]:
        of = {name: Estimate(**model[name]) for name in FIGURES}
        margin, kl = ("0", "0") if model["beta"] is None else (of["margin"].text(), of["kl"].text())
        name = "reference" if model["beta"] is None else f"DPO, beta = {model['beta']:g}"
        lines.append(f"| {name} | {of['accuracy'].text(3)} | {margin} | {of['reward'].text()} | {kl} |")
    other = second["models"][1]
    words = (
        f"This took {first['seconds']:.0f} s on {first['device']}, {first['num_threads']} threads: {trained['steps']}"
        f" steps for each beta, {first['num_heldout_pairs']:,} held-out prompts, ± one standard error. Labels are"
        f" random draws, so even the true reward agrees with only {first['label_ceiling']:.3f} of them. The reference"
        f" has seen few texts, so the result at beta = {trained['beta']:g} depends on the seed: with `--seed"
        f" {SEEDS[1]}`, KL {other['kl']['mean']:.2f}, reward {other['reward']['mean']:.2f}."
    )
    return "\n".join([*lines, "", textwrap.fill(words, 120), ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZE_NAMES, default="full", help="of the demo; README has the full one")
    parser.add_argument("--write", action="store_true", help="into the project's results and README.md")
    parser.add_argument("--docs", action="store_true", help="README.md from the results as they are")
    options = parser.parse_args(argv)
    if options.write and options.size != "full":
        parser.error("--write must go with --size full")
    if options.docs:
        records = read(RESULTS)
    else:
        facts = machine_facts()
        records = [{**facts, **record_of(seed, options.size)} for seed in SEEDS]
        append_lines(str(RESULTS) if options.write else None, records)
        print(part(records))
    if options.write or options.docs:
        README.write_text(pages.filled(README.read_text(), {RESULTS.name: part(records)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
