"""`fastdpo demo`: a small version of the DPO paper's controlled-sentiment experiment, on texts with a known reward.

It prints the stages, a table, and whether the orderings that theory predicts hold. At the end it writes the HTML
report, the figures as JSON, the models and the preference pairs to output_dir. It replaces an earlier demo there, and
refuses an output_dir with anything else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fastdpo.cli.console import quiet_libraries
from fastdpo.cli.threads import FreeCores
from fastdpo.report import require_matplotlib, write_report

if TYPE_CHECKING:
    from fastdpo.alignment.experiment import Experiment
    from fastdpo.alignment.results import SweepResult

DEMO_FILE = "fastdpo_demo.json"  # marks a directory as the output of a demo; holds its options and figures
REPORT_FILE = "report.html"
SIZE_NAMES = ("full", "small")
MAX_THREADS = 2  # more do not help a model this small


@dataclass(frozen=True)
class DemoOptions:
    """The options of the demo."""

    output_dir: str = field(default="demo_run", metadata={"help": "Folder for report, models and pairs."})
    size: str = field(default="full", metadata={"help": "full: one to two minutes on 2 cores. small: a third of that."})
    seed: int = field(default=0, metadata={"help": "Seed for texts, weights, labels and samples."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Write to output_dir even if it contains something other than an earlier demo."},
    )

    def __post_init__(self) -> None:
        if self.size not in SIZE_NAMES:
            raise ValueError(f"size must be one of {SIZE_NAMES}, got {self.size!r}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


def main(argv: list[str]) -> None:
    """Parses the options and runs the demo.

    Raises:
        ValueError: an unknown option or an invalid value.
    """
    run_demo(_parse(argv))


def run_demo(options: DemoOptions, console: Console | None = None) -> SweepResult:
    """Runs the experiment, prints its table and writes its files.

    Raises:
        ValueError: matplotlib is missing, or output_dir holds other files; raised before any training.
    """
    console = console if console is not None else Console()
    require_matplotlib()
    output_dir = _checked_output_dir(options)
    started = time.perf_counter()
    threads = _Threads(FreeCores())
    with _Stages(console, threads) as stages, quiet_libraries(), threads:
        from fastdpo.alignment.experiment import SIZES, run_experiment
        from fastdpo.cli.demo_report import demo_sections

        experiment = run_experiment(
            SIZES[options.size],
            seed=options.seed,
            on_stage=stages.start,
            make_callbacks=lambda: [_step_callback(stages)],
        )
        stages.start("Writing the report")
        seconds = time.perf_counter() - started
        _write_data(output_dir, options, experiment, seconds)
        report = write_report(
            output_dir / REPORT_FILE,
            "DPO in a world with a known reward",
            demo_sections(experiment, seed=options.seed, seconds=seconds),
            subtitle="The controlled-sentiment experiment of the DPO paper in small: generated reviews, one reference"
            f" model, {len(experiment.policies)} values of beta.",
        )
    _print_results(console, experiment)
    console.print(f"Report: [bold]{report}[/bold]  ({time.perf_counter() - started:.0f} s)", soft_wrap=True)
    console.print(
        f"Train on the same pairs yourself: fastdpo train --model {output_dir / 'reference'} --dataset"
        f" {output_dir / 'pairs.jsonl'} --output_dir my_run --learning_rate 3e-4",
        soft_wrap=True,
        highlight=False,
    )
    return experiment.sweep


def _parse(argv: list[str]) -> DemoOptions:
    parser = argparse.ArgumentParser(
        prog="fastdpo demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, exit_on_error=False,
    )  # fmt: skip
    help_of = {name: f.metadata["help"] for name, f in DemoOptions.__dataclass_fields__.items()}
    default = DemoOptions()
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        default=default.output_dir,
        help=f"{help_of['output_dir']} Default: %(default)s.",
    )
    parser.add_argument("--size", choices=SIZE_NAMES, default=default.size, help=help_of["size"])
    parser.add_argument("--seed", type=int, default=default.seed, help=f"{help_of['seed']} Default: %(default)s.")
    parser.add_argument("--overwrite", action="store_true", help=help_of["overwrite"])
    try:
        known, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error} (all options: fastdpo demo --help)") from None
    if rest:
        raise ValueError(f"unknown option {rest[0]!r} (all options: fastdpo demo --help)")
    return DemoOptions(**vars(known))


def _checked_output_dir(options: DemoOptions) -> Path:
    output_dir = Path(options.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir must be a directory, got the file {output_dir}")
    holds_demo = (output_dir / DEMO_FILE).is_file()
    if output_dir.is_dir() and any(output_dir.iterdir()) and not holds_demo and not options.overwrite:
        raise ValueError(
            f"output_dir must be new, empty or from an earlier demo, got {output_dir}, which holds other files;"
            " choose another, or add --overwrite"
        )
    return output_dir


def _write_data(output_dir: Path, options: DemoOptions, experiment: Experiment, seconds: float) -> None:
    """Writes everything except the report. Removes leftovers of an earlier demo; other files stay."""
    output_dir.mkdir(parents=True, exist_ok=True)
    sweep = experiment.sweep
    figures = [
        {
            "model": model.name,
            "beta": model.beta,
            **{name: asdict(getattr(model, name)) for name in ("accuracy", "margin", "reward", "kl", "num_tokens")},
            "log_history": model.log_history,
        }
        for model in sweep.models
    ]
    orderings = {ordering.claim: ordering.num_stderrs for ordering in sweep.orderings()}
    facts = {"label_ceiling": experiment.label_ceiling, "orderings": orderings, "seconds": seconds}
    numbers = {"num_train_pairs": sweep.num_train_pairs, "num_heldout_pairs": sweep.num_heldout_pairs}
    record = {"options": asdict(options), **numbers, **facts, "models": figures}
    (output_dir / DEMO_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for stale in output_dir.glob("policy-beta-*"):
        shutil.rmtree(stale)
    for name, rows in (("pairs.jsonl", experiment.train_rows), ("heldout_pairs.jsonl", experiment.heldout_rows)):
        (output_dir / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    models = {"reference": experiment.reference}
    models.update({f"policy-beta-{beta:g}": policy for beta, policy in experiment.policies.items()})
    for name, model in models.items():
        model.save_pretrained(output_dir / name)
        experiment.tokenizer.save_pretrained(output_dir / name)


def _print_results(console: Console, experiment: Experiment) -> None:
    sweep = experiment.sweep
    num_samples = len(sweep.reference.samples)
    table = Table(
        title=f"{num_samples:,} held-out prompts, {sweep.num_heldout_pairs:,} held-out pairs, ± one standard error"
    )
    for heading in ("model", "accuracy", "margin", "true reward", "KL to ref."):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for model in sweep.models:
        margin, kl = ("0", "0") if model.beta is None else (model.margin.text(), model.kl.text())
        table.add_row(model.name, model.accuracy.text(3), margin, model.reward.text(), kl)
    console.print(table)
    console.print(
        "Accuracy: the share of pairs that the implicit reward ranks as labelled (for the reference: its log-probs);"
        f" the true reward itself reaches {experiment.label_ceiling:.3f}. All other figures are in nats."
    )
    console.print("Predicted orderings, and by how many standard errors each one holds:")
    for ordering in sweep.orderings():
        mark = "[green]holds[/green]" if ordering.holds else "[red]FAILS[/red]"
        console.print(f"  {mark}  {ordering.num_stderrs:5.1f}  {ordering.claim}", highlight=False)


class _Stages:
    """Prints one line per stage with its time; on a terminal, a running stage shows a spinner with the step."""

    def __init__(self, console: Console, threads: _Threads) -> None:
        self.console = console
        self._threads = threads
        self._status = console.status("")
        self._name = ""
        self._started = 0.0

    def __enter__(self) -> _Stages:
        self._status.start()
        self.start("Loading PyTorch and transformers")
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._finish(done=kind is None)
        self._status.stop()

    def start(self, name: str) -> None:
        self._finish(done=True)
        self._name, self._started = name, time.perf_counter()
        self._status.update(f"{name} ...")
        self._threads.update()

    def show_step(self, step: int, num_steps: int) -> None:
        self._threads.update()
        self._status.update(f"{self._name} ... step {step} of {num_steps}")

    def _finish(self, *, done: bool) -> None:
        if self._name and done:
            self.console.print(f"{time.perf_counter() - self._started:6.1f} s  {self._name}", highlight=False)
        self._name = ""


class _Threads:
    """Context manager that sets PyTorch's threads to the number of free cores, at most MAX_THREADS, and adjusts it at
    every stage and step. PyTorch need not be imported before; the former number is restored at the end.
    """

    def __init__(self, cores: FreeCores) -> None:
        self._cores = cores
        self._before: int | None = None

    def __enter__(self) -> None:
        import torch

        self._before = torch.get_num_threads()
        self.update()

    def __exit__(self, *rest: Any) -> None:
        import torch

        if self._before is not None:
            torch.set_num_threads(self._before)
        self._before = None

    def update(self) -> None:
        if self._before is not None:
            import torch

            torch.set_num_threads(self._cores.threads(min(MAX_THREADS, self._before)))


def _step_callback(stages: _Stages) -> Any:
    from transformers import TrainerCallback

    class ShowStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stages.show_step(state.global_step, state.max_steps)

    return ShowStep()
