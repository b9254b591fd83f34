"""Labels flipped at random: sigmoid DPO against two losses that are told the share of flipped labels.

In: a size. Out: a line of results.jsonl for each share, loss and seed; a table, and plots of reward, KL and accuracy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastdpo.alignment.results import Estimate
from fastdpo.alignment.task import Row, Task
from fastdpo.report import FigureGrid, Spot, Table, Text, lines
from fastdpo.report.sections import Section
from recipes import shared
from recipes.sentiment import FIGURES, SEEDS, bench_of, measured, task_of, trained

NAME = "label_noise"
BETA = 0.3
SIGMOID = "sigmoid"
# name -> loss_type; the last two get the share of flipped labels as label_smoothing
LOSSES = {SIGMOID: "sigmoid", "cDPO": "sigmoid", "robust": "robust"}
SHARES = {"tiny": (0.0, 0.4), "small": (0.0, 0.1, 0.2, 0.3, 0.4), "full": (0.0, 0.1, 0.2, 0.3, 0.4)}
AXES = {"reward": "true reward (nats)", "kl": "KL to the reference (nats)", "accuracy": "accuracy on clean pairs"}


def main(argv: Sequence[str] | None = None) -> None:
    options = shared.read_options(NAME, __doc__ or "", argv)
    runs = [
        {"flipped": f"{share:g}", "loss": loss, "seed": str(seed)}
        for seed in SEEDS[options.size]
        for share in SHARES[options.size]
        for loss in LOSSES
        if share > 0 or loss == SIGMOID  # without smoothing all three are the same
    ]

    @lru_cache(maxsize=1)
    def noisy_task(seed: int, share: float) -> Task:
        task = task_of(options.size, seed, options.output_dir)
        return replace(task, train_rows=flipped(task.train_rows, share, seed))

    def run_one(params: dict[str, str], folder: Path) -> dict[str, Any]:
        share = float(params["flipped"])
        task = noisy_task(int(params["seed"]), share)
        bench = bench_of(task)
        smoothing = 0.0 if params["loss"] == SIGMOID else share
        policy = trained(task, bench, beta=BETA, loss_type=LOSSES[params["loss"]], label_smoothing=smoothing)
        return measured(bench, policy)

    results = shared.run_all(runs, options, run_one)
    sections: list[Section] = [_summary(results), table(results), _curves(results), _method(results, options.size)]
    shared.finish(options, "Flipped labels", sections, subtitle="DPO, cDPO and robust DPO on noisy preferences.")


def flipped(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """The rows with chosen and rejected swapped in `share` of them. A row that is swapped at a share is also swapped at
    every larger one."""
    rng = random.Random(f"flips {seed}")
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if rng.random() < share else row for row in rows
    ]


def table(results: Sequence[shared.Line]) -> Table:
    rows = [
        [
            f"{float(group.params['flipped']):.0%}, "
            + (group.params["loss"] if group.params["flipped"] != "0" else "all three"),
            group.figures["reward"].text(),
            group.figures["kl"].text(),
            group.figures["accuracy"].text(3),
        ]
        for group in shared.over_seeds(results, FIGURES)
    ]
    num_seeds = len({line["params"]["seed"] for line in results})
    return Table(
        "Results on held-out prompts",
        ("flipped, loss", "true reward", "KL", "accuracy"),
        rows,
        note=f"Mean ± one standard error over {num_seeds} seeds. Reward and KL to the reference are in nats."
        " Accuracy is measured on held-out pairs without flips.",
    )


def _curves(results: Sequence[shared.Line]) -> FigureGrid:
    figures = []
    for figure, axis in AXES.items():
        series: dict[str, list[Spot]] = {loss: [] for loss in LOSSES}
        for group in shared.over_seeds(results, FIGURES):
            share, value = 100 * float(group.params["flipped"]), group.figures[figure]
            for loss in LOSSES if share == 0 else [group.params["loss"]]:
                series[loss].append(Spot(share, value.mean, y_stderr=value.stderr))
        said = "; ".join(f"{loss}: " + ", ".join(f"{s.x:.0f} %: {s.y:.2f}" for s in of) for loss, of in series.items())
        figures.append((f"{axis} by flipped labels. {said}", lines(series, "flipped labels (%)", axis)))
    return FigureGrid("What flipped labels do", figures, note="Bars are one standard error.")


def differences(results: Sequence[shared.Line], share: str, figure: str) -> dict[str, Estimate]:
    """By how much cDPO and robust are above sigmoid at a share, within each seed."""
    of: dict[str, dict[str, float]] = {loss: {} for loss in LOSSES}
    for line in results:
        if line["params"]["flipped"] == share:
            of[line["params"]["loss"]][line["params"]["seed"]] = line[figure]
    return {
        loss: Estimate.of([values[seed] - of[SIGMOID][seed] for seed in values])
        for loss, values in of.items()
        if loss != SIGMOID
    }


def _summary(results: Sequence[shared.Line]) -> Text:
    most = max((line["params"]["flipped"] for line in results), key=float)
    found = [
        f"{loss} {of['reward'].text()} nats of true reward and {of['accuracy'].text(3)} of accuracy"
        for loss, of in (
            (loss, {figure: differences(results, most, figure)[loss] for figure in ("reward", "accuracy")})
            for loss in LOSSES
            if loss != SIGMOID
        )
    ]
    return Text(
        "In short",
        [
            "A share of the labels is swapped on top of the Bradley-Terry noise that they have anyway. cDPO and robust"
            " DPO are told this share (label_smoothing); sigmoid is not.",
            f"Against sigmoid with {float(most):.0%} of the labels flipped: {'; '.join(found)}.",
        ],
    )


def _method(results: Sequence[shared.Line], size: str) -> Text:
    seconds = sum(line["cpu_seconds"] for line in results)
    return Text(
        "How it was done",
        [
            f"Size {size}: {len(results)} runs at beta = {BETA:g}, {seconds:.0f} s of CPU time. Each seed has its own"
            " texts, reference, pairs and labels; held-out prompts and pairs are the same for all runs of a seed, and"
            " a label that is flipped at one share is flipped at all larger ones.",
            "cDPO is the cross-entropy with a label of 1 - share. Robust DPO divides by 1 - 2 * share, which makes the"
            " loss unbiased for the loss on clean labels, and its gradients larger and noisier (arXiv 2403.00409).",
        ],
    )


if __name__ == "__main__":
    shared.start(main)
