"""Losses of fastdpo and of TRL over 200 steps from the same start, for every loss of TRL: docs/converging.md.

    python benchmarks/bench_converging.py                  # trains; prints a line per loss; --quick: five steps
    python benchmarks/bench_converging.py --losses ipo     # some losses
    python benchmarks/bench_converging.py --write          # writes results/converging.jsonl, the page and its plot
    python benchmarks/bench_converging.py --docs           # page and plot from the results as they are

Both trainers get the demo's reference (a Llama with under a million weights), its pairs, one seed and one set of
TrainingArguments, in fp32 on a CPU. A distance is the largest difference over the steps, divided by the largest value
of TRL's curve. TRL also runs a second time with longer padding, which changes nothing but the order of sums: its
distance from TRL itself is what rounding grows to. Refuses losses that TRL does not have.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared import pages

from fastdpo.alignment.task import SIZES, Task, cached_task
from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.records import Record, machine_of, read
from fastdpo.modeling.prepared import unprepare_model

RESULTS, PAGE = pages.RESULTS / "converging.jsonl", pages.DOCS / "converging.md"
PICTURE = pages.DOCS / "pictures" / "converging.svg"
SMOOTHED = {"label_smoothing": 0.1}
LOSSES: dict[str, dict[str, Any]] = {  # with settings that are not the defaults
    **{name: {} for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo")},
    **dict.fromkeys(("exo_pair", "robust"), SMOOTHED),
    **{name: {} for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")},
    **{name: {} for name in ("aot", "aot_unpaired", "sft")},
}
COMPARED = {"loss": "loss", "grad_norm": "gradient norm", "rewards/margins": "margin"}
STEPS, PAIRS = 200, 8  # pairs of a step
LONGER = 64  # tokens that TRL pads to a multiple of, the second time
DIGITS = 6  # of the losses that are kept
DRAWN, LAST = 5, 20  # steps of which the plot shows the mean, and steps at the end of which the table does


def run(package: Any, task: Task, loss: str, steps: int, **more: Any) -> list[dict[str, float]]:
    """What a package's DPOTrainer logs at each step."""
    from datasets import Dataset
    from transformers import PrinterCallback

    settings = {**task.dpo_settings(), "max_steps": steps, "logging_steps": 1, "per_device_train_batch_size": PAIRS}
    settings |= {"optim": "adamw_torch", "use_cpu": True, "loss_type": loss, **LOSSES[loss], **more}
    del settings["token_metrics"]
    start = unprepare_model(task.reference)  # fastdpo has trained it
    with tempfile.TemporaryDirectory() as folder:
        trainer = package.DPOTrainer(
            copy.deepcopy(start),
            copy.deepcopy(start),
            args=package.DPOConfig(folder, **settings),
            train_dataset=Dataset.from_list(task.train_rows),
            processing_class=task.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def distances(logs: Sequence[dict[str, float]], others: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest difference of each compared number, relative to the largest one of `others`."""
    found = {}
    for key in COMPARED:
        off = max(abs(log[key] - other[key]) for log, other in zip(logs, others, strict=True))
        found[key] = off / max(abs(other[key]) for other in others)
    return found


def measure(task: Task, loss: str, steps: int) -> Record:
    import trl

    import fastdpo

    ours, theirs = run(fastdpo, task, loss, steps, packing="packed"), run(trl, task, loss, steps)
    padded = run(trl, task, loss, steps, pad_to_multiple_of=LONGER)
    curves = {"fastdpo": ours, "TRL": theirs}
    return {
        "method": loss,
        "settings": LOSSES[loss],
        "steps": steps,
        "pairs_per_step": PAIRS,
        "trl": trl.__version__,
        "distance": distances(ours, theirs),
        "rounding": distances(padded, theirs),
        "losses": {name: [float(f"{log['loss']:.{DIGITS}g}") for log in logs] for name, logs in curves.items()},
    }


def table(records: Sequence[Record]) -> str:
    """Markdown: distances of fastdpo from TRL, and of TRL from itself with longer padding."""
    names = [f"{whose}{name}" for whose in ("", "TRL: ") for name in COMPARED.values()]
    lines = [f"| `loss_type` | first loss | last {LAST} steps | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for record in records:
        smoothing = record["settings"].get("label_smoothing")
        name = f"`{record['method']}`" + (f", smoothing {smoothing}" if smoothing else "")
        losses = record["losses"]["fastdpo"]
        ends = [f"{losses[0]:.4f}", f"{statistics.fmean(losses[-LAST:]):.4f}"]
        figures = [f"{record[which][key]:.0e}" for which in ("distance", "rounding") for key in COMPARED]
        lines.append(f"| {' | '.join([name, *ends, *figures])} |")
    first = records[0]
    about = f"{first['steps']} steps of {first['pairs_per_step']} pairs; {machine_of(first)}, TRL {first['trl']}"
    return "\n".join([about, "", *lines]) + "\n"


def blocks(losses: Sequence[float]) -> list[Sequence[float]]:
    return [losses[start : start + DRAWN] for start in range(0, len(losses), DRAWN)]


def figure(records: Sequence[Record]) -> Any:
    """A panel per loss: TRL's curve as a broad line, fastdpo's as a narrow one over it; means of DRAWN steps."""
    from fastdpo.report.plots import COLORS, clean, new_figure

    drawn = new_figure(width=10, height=1.9 * -(-len(records) // 3))
    for place, record in enumerate(records, 1):
        panel = drawn.add_subplot(-(-len(records) // 3), 3, place)
        for name, color, width in (("TRL", "#b9c4d4", 3.5), ("fastdpo", COLORS[1], 0.9)):
            means = [statistics.fmean(block) for block in blocks(record["losses"][name])]
            panel.plot(range(DRAWN, record["steps"] + 1, DRAWN), means, color=color, linewidth=width, label=name)
        panel.set_title(record["method"], fontsize=9, loc="left")
        clean(panel)
        panel.tick_params(labelsize=8)
        panel.locator_params(nbins=4)
    drawn.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    drawn.supxlabel(f"optimizer step (each point is the mean of {DRAWN})", fontsize=9)
    return drawn


def known() -> list[Record]:
    """The records of the results, in the order of LOSSES."""
    of = {record["method"]: record for record in read(RESULTS)}
    return [of[loss] for loss in LOSSES if loss in of]


def write_docs() -> None:
    from fastdpo.report.sections import svg

    PICTURE.write_bytes(svg(figure(known())))
    PAGE.write_text(pages.filled(PAGE.read_text(), {RESULTS.name: table(known())}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", action="store_true", help="five steps")
    parser.add_argument("--task", type=Path, help="folder where the demo's reference and pairs are kept")
    parser.add_argument("--write", action="store_true", help="into the project's results and docs/converging.md")
    parser.add_argument("--docs", action="store_true", help="docs/converging.md from the results as they are")
    options = parser.parse_args(argv)
    steps = 5 if options.quick else options.steps
    if options.write and steps != STEPS:
        parser.error(f"--write takes {STEPS} steps")
    if options.docs:
        write_docs()
        return 0
    facts = machine_facts()
    with tempfile.TemporaryDirectory() as scratch:
        task = cached_task(SIZES["small"], 0, options.task or Path(scratch, "task"))
        for loss in options.losses:
            record = {**facts, **measure(task, loss, steps)}
            print(json.dumps({key: record[key] for key in ("method", "distance", "rounding")}), flush=True)
            append_lines(str(RESULTS) if options.write else None, [record])
    if options.write:
        write_docs()
    return 0


if __name__ == "__main__":
    sys.exit(main())
