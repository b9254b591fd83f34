"""A long run of a small model that is watched: memory, live tensors, open files, and the time of steps, logs and saves.

`make soak` runs it: 2,000 steps on a stream with bad rows, a moving reference, evaluations, samples and saves; then
shorter ones on a dataset and with two data loader workers. SOAK="--steps 500 --data rows --workers 2" chooses another.
Prints a table of what each measure grows by, and writes soak.html with the curves. The exit code is 1 if a measure
grows, and 3 if none does but the measurements of one are too uneven to tell.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import torch
from datasets import Dataset, IterableDataset
from tiny import make_llama, make_rows
from tiny_runs import tiny_trainer
from transformers import TrainerCallback
from trends import GROWS, LEAST, UNDECIDED, as_if_alone, trend

from fastdpo.report import FigureGrid, Spot, Table, Text, lines, require_matplotlib, write_report

MIB = 2**20
# measure -> (unit, growth over a run that is tolerated, as a share of the level, and at least)
MEASURES = {
    "memory of the process": ("MiB", 0.02, 4.0),
    "memory of its workers": ("MiB", 0.02, 4.0),
    "live tensors": ("tensors", 0.0, 0.5),
    "bytes of live tensors": ("KiB", 0.05, 16.0),  # batches differ in size
    "open files": ("files", 0.0, 0.5),
    "time of a step": ("ms of CPU", 0.2, 0.0),  # the share that a busy machine lets one tell
    "time of a log entry": ("ms of CPU", 0.2, 0.2),
    "time of an evaluation": ("ms of CPU", 0.2, 0.0),
    "time of a save": ("ms of CPU", 0.2, 0.0),
}
BAD_ROWS = (
    {"prompt": "the cat ", "chosen": "sees", "rejected": "sees"},
    {"prompt": "the cat ", "chosen": "", "rejected": "sees"},
    {"prompt": "the cat " * 99, "chosen": "sees", "rejected": "likes"},
)
EVERY_BAD = 23  # rows: one of them is bad
WORK = torch.ones(128, 128)  # of `timed_work`


def rows_with_bad_ones(num_rows):
    """Rows for a run, every 23rd of which cannot be used: equal answers, an empty one, a prompt that is too long."""
    for number, row in enumerate(make_rows(num_rows)):
        yield row
        if number % EVERY_BAD == EVERY_BAD - 1:
            yield BAD_ROWS[number // EVERY_BAD % len(BAD_ROWS)]


def timed_work():
    """CPU seconds of work that is always the same, about one millisecond: what else the machine does is in it, too."""
    began = time.process_time()
    (WORK @ WORK).sum().item()
    sorted(range(9_000), key=lambda number: number * 7_919 % 9_001)
    return time.process_time() - began


class Watch(TrainerCallback):
    """Collects the measures of a run as (step, value) pairs, by name; a time is a (step, value, CPU seconds of the same
    work at that moment)."""

    def __init__(self, every):
        self.every, self.process = every, psutil.Process()
        self.values, self.times = defaultdict(list), defaultdict(list)
        self.step, self._began, self._work = 0, 0.0, 0.0

    def measured(self):
        """{measure: (step, value) pairs}."""
        return {**self.values, **{measure: as_if_alone(times) for measure, times in self.times.items()}}

    def time_calls(self, trainer):
        """Measures how long the trainer's calls take."""
        for name, measure in {"log": "a log entry", "evaluate": "an evaluation", "_save_checkpoint": "a save"}.items():
            setattr(trainer, name, self._timed(getattr(trainer, name), f"time of {measure}"))

    def _timed(self, inner, measure):
        def timed(*args, **kwargs):
            before, began = timed_work(), time.process_time()
            result = inner(*args, **kwargs)
            seconds = time.process_time() - began
            self.times[measure].append((self.step, 1e3 * seconds, before + timed_work()))
            return result

        return timed

    def on_step_begin(self, args, state, control, **kwargs):
        self._work, self._began = timed_work(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        step, seconds = state.global_step, time.process_time() - self._began
        self.step = step
        self.times["time of a step"].append((step, 1e3 * seconds, self._work + timed_work()))
        if step % self.every == 0:
            self._look(step)

    def _look(self, step):
        gc.collect()
        tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
        found = {
            "memory of the process": self.process.memory_info().rss / MIB,
            "live tensors": len(tensors),
            "bytes of live tensors": sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1024,
            "open files": self.process.num_fds(),
        }
        workers = [child.memory_info().rss for child in self.process.children() if child.status() != "zombie"]
        if workers:
            found["memory of its workers"] = sum(workers) / MIB
        del tensors
        for measure, value in found.items():
            self.values[measure].append((step, value))


def soak(folder, *, steps=2000, data="stream", workers=0, callbacks=()):
    """The measures of one run: {name: (step, value) pairs}.

    Args:
        data: "stream" or "rows", a dataset that is prepared before the run.
        callbacks: further ones, such as a leak that the soak must find.
    """
    num_rows, short = 4 * 97, steps < 500
    if data == "stream":
        train = IterableDataset.from_generator(rows_with_bad_ones, gen_kwargs={"num_rows": num_rows})
    else:
        train = Dataset.from_list(list(rows_with_bad_ones(num_rows)))
    watch = Watch(every=max(steps // 100, 1))
    often = max(steps // 80, 6)
    trainer = tiny_trainer(
        Path(folder) / "out",
        make_llama(attention_dropout=0.1),
        train_dataset=train,
        eval_dataset=Dataset.from_list(make_rows(8, seed=1)),
        callbacks=[watch, *callbacks],
        max_steps=steps,
        max_length=64,
        sync_ref_model=True,
        ref_model_sync_steps=often // 2,
        eval_strategy="steps",
        eval_steps=often,
        num_eval_samples=2,
        eval_sample_tokens=8,
        save_strategy="steps",
        save_steps=often,
        save_total_limit=2,
        logging_steps=2 if short else 5,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=False,
    )
    watch.time_calls(trainer)
    gc.collect()
    gc.freeze()  # what is alive now is not looked at again: a look then takes milliseconds
    try:
        trainer.train()
    finally:
        gc.unfreeze()
    return watch.measured()


def judged(values):
    """(measure, Trend, tolerated growth, verdict) of each measure."""
    found = []
    for measure, (_, share, least) in MEASURES.items():
        if len(values.get(measure, ())) >= LEAST:
            line = trend(values[measure])
            tolerated = max(share * line.level, least)
            found.append((measure, line, tolerated, line.verdict(tolerated)))
    return found


def table(name, results):
    rows = [
        [
            measure,
            verdict,
            f"{line.level:,.2f} {MEASURES[measure][0]}",
            f"{line.growth:+,.3f}",
            f"{line.low:+,.3f} to {line.high:+,.3f}",
            f"{tolerated:,.2f}",
        ]
        for measure, line, tolerated, verdict in results
    ]
    return Table(name, ("", "", "median", "growth", "95% interval", "tolerated"), rows)


def curves(name, values, results):
    figures = []
    for measure, line, _, verdict in results:
        measured = values[measure]
        shown = [Spot(*spot) for spot in measured[:: max(len(measured) // 200, 1)]]
        axis = f"{measure} ({MEASURES[measure][0]})"
        figure = lines({"measured": shown}, "optimizer step", axis, best=line.line, best_name="trend")
        figures.append((f"{measure}: {verdict}", figure))
    return FigureGrid(f"{name}: curves", figures)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--data", choices=("stream", "rows"), default=None, help="all kinds by default")
    parser.add_argument("--workers", type=int, default=0, help="data loader workers")
    parser.add_argument("--report", type=Path, default=Path("soak.html"))
    options = parser.parse_args(argv)
    require_matplotlib()
    torch.set_num_threads(1)
    runs = [(options.steps, options.data, options.workers)]
    if options.data is None:
        fewer = max(options.steps // 4, 1)
        runs = [(options.steps, "stream", 0), (fewer, "rows", 0), (fewer, "stream", 2), (fewer, "rows", 2)]
    sections, verdicts, printed = [], [], options.report.with_suffix(".log")
    print(f"what the runs print is in {printed}")
    for steps, data, workers in runs:
        name = f"{steps:,} steps on {'a stream' if data == 'stream' else 'a dataset'}, {workers} workers"
        began = time.process_time()
        with (
            tempfile.TemporaryDirectory() as folder,
            open(printed, "a") as file,
            redirect_stdout(file),
            redirect_stderr(file),
        ):
            values = soak(folder, steps=steps, data=data, workers=workers)
        results = judged(values)
        verdicts += [verdict for *_, verdict in results]
        sections += [table(name, results), curves(name, values, results)]
        print(f"{name} ({time.process_time() - began:.0f} s of CPU)")
        for row in table(name, results).rows:
            print(f"  {row[0]:<24} {row[2]:>22}  growth {row[3]:>10}  ({row[4]})  tolerated {row[5]:>8}: {row[1]}")
    note = (
        "Growth is from the first step that counts (after a quarter of the run) to the last, on a line through the"
        " medians of ten blocks; the interval is Student's t. Time is CPU time of the process, which other processes of"
        " the machine lengthen: it is divided by that of a fixed piece of work right before and after."
    )
    path = write_report(options.report, "Soak", [Text("How to read this", [note]), *sections])
    print(f"report: {path}")
    return 1 if GROWS in verdicts else 3 if UNDECIDED in verdicts else 0


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.exit(main())
