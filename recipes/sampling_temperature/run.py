"""Policies sampled at temperatures from 0 to 1: win rate against reference texts (DPO paper, figure 2, right).

In: a size. Out: a line of results.jsonl for each method, temperature and seed; a table and two plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.alignment.generate import sample_responses
from fastdpo.alignment.task import MAX_NEW_TOKENS, Task
from fastdpo.data.synthetic import review_pairs, true_reward
from fastdpo.report import FigureGrid, Spot, Table, Text, lines
from fastdpo.report.sections import Section
from fastdpo.rewards.implicit import implicit_reward
from fastdpo.rounds.iterate import win_rate
from recipes import shared
from recipes.sentiment import SEEDS, bench_of, preferred_ft, task_of, trained

NAME = "sampling_temperature"
BETA = 0.3
LEARNING_RATE = 1e-3  # of Preferred-FT
REFERENCE, PREFERRED_FT, DPO, IPO = "Reference", "Preferred-FT", "DPO", "IPO"
BEST_OF_N = "Best of 4"
METHODS = (REFERENCE, PREFERRED_FT, DPO, IPO, BEST_OF_N)
NUM_BEST = 4
TEMPERATURES = {"tiny": (0.0, 1.0), "small": (0.0, 0.25, 0.5, 0.75, 1.0), "full": (0.0, 0.25, 0.5, 0.75, 1.0)}
FIGURES = ("win_rate", "reward", "distinct")
AXES = {"win_rate": "win rate against reference texts", "reward": "true reward (nats)", "distinct": "distinct answers"}


def main(argv: Sequence[str] | None = None) -> None:
    options = shared.read_options(NAME, __doc__ or "", argv)
    runs = [
        {"method": method, "temperature": f"{temperature:g}", "seed": str(seed)}
        for seed in SEEDS[options.size]
        for method in METHODS
        for temperature in TEMPERATURES[options.size]
    ]

    @lru_cache(maxsize=1)
    def policy_of(method: str, seed: int) -> Any:
        """The policy that is sampled; of the best of n the policy that judges."""
        return _policy(method, task_of(options.size, seed, options.output_dir))

    def run_one(params: dict[str, str], folder: Path) -> dict[str, Any]:
        seed = int(params["seed"])
        task = task_of(options.size, seed, options.output_dir)
        return _figures(params["method"], float(params["temperature"]), task, policy_of(params["method"], seed))

    results = shared.run_all(runs, options, run_one)
    sections: list[Section] = [_summary(results), table(results), _curves(results), _method(results, options.size)]
    shared.finish(options, "Sampling temperature", sections, subtitle="Policies sampled at temperatures from 0 to 1.")


def _policy(method: str, task: Task) -> Any:
    if method == REFERENCE:
        return task.reference
    if method == PREFERRED_FT:
        return preferred_ft(task, LEARNING_RATE)
    return trained(task, bench_of(task), beta=BETA, loss_type="ipo" if method == IPO else "sigmoid")


def _figures(method: str, temperature: float, task: Task, policy: Any) -> dict[str, float]:
    """Figures of one answer to each held-out prompt, against a grammar text that was preferred to another."""
    texts = review_pairs(task.heldout_prompts, task.seed)
    prompts = [row["prompt"] for row in texts]
    is_best = method == BEST_OF_N
    samples = sample_responses(
        task.reference if is_best else policy,
        task.tokenizer,
        prompts,
        num_samples=NUM_BEST if is_best and temperature > 0 else 1,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=temperature,
        batch_size=512,
        seed=10 * task.seed + 4,
    )
    answers: Sequence[str] = samples.responses
    if len(answers) > len(prompts):
        judged = implicit_reward(policy, task.reference, task.tokenizer, BETA)(list(samples.prompts), list(answers))
        scores = np.reshape([-np.inf if score is None else score for score in judged], (-1, NUM_BEST))
        answers = [answers[NUM_BEST * row + best] for row, best in enumerate(scores.argmax(1))]
    rewards = [true_reward(answer) for answer in answers]
    return {
        "win_rate": win_rate(rewards, [true_reward(row["chosen"]) for row in texts]),
        "reward": float(np.mean(rewards)),
        "distinct": len(set(answers)) / len(answers),
    }


def table(results: Sequence[shared.Line]) -> Table:
    rows = [
        [
            f"{group.params['method']} at {group.params['temperature']}",
            group.figures["win_rate"].text(3),
            group.figures["reward"].text(),
            group.figures["distinct"].text(3),
        ]
        for group in shared.over_seeds(results, FIGURES)
    ]
    num_seeds = len({line["params"]["seed"] for line in results})
    return Table(
        "Results on held-out prompts",
        ("method at temperature", "win rate", "true reward", "distinct"),
        rows,
        note=f"Mean ± one standard error over {num_seeds} seeds. The win rate is the share of prompts whose answer has"
        " a higher true reward than the reference text; a tie counts half."
        " Distinct: the share of answers left without repetitions.",
    )


def _series(results: Sequence[shared.Line], figure: str) -> dict[str, list[Spot]]:
    series: dict[str, list[Spot]] = {method: [] for method in METHODS}
    for group in shared.over_seeds(results, FIGURES):
        value = group.figures[figure]
        series[group.params["method"]].append(
            Spot(float(group.params["temperature"]), value.mean, y_stderr=value.stderr)
        )
    return series


def _curves(results: Sequence[shared.Line]) -> FigureGrid:
    figures = []
    for figure, axis in AXES.items():
        series = _series(results, figure)
        said = "; ".join(f"{name}: " + ", ".join(f"{s.x:g}: {s.y:.2f}" for s in of) for name, of in series.items())
        figures.append((f"{axis} by temperature. {said}", lines(series, "sampling temperature", axis)))
    return FigureGrid("By temperature", figures, note="Bars are one standard error.")


def _summary(results: Sequence[shared.Line]) -> Text:
    sentences = []
    for method, spots in _series(results, "win_rate").items():
        cold, warm = spots[0], spots[-1]
        sentences.append(f"{method}: {cold.y:.1%} at temperature {cold.x:g}, {warm.y:.1%} at {warm.x:g}.")
    return Text(
        "In short",
        [
            "Each policy answers held-out prompts at several temperatures. Its answers are compared with reference"
            " texts by their true reward.",
            "Win rates. " + " ".join(sentences),
        ],
    )


def _method(results: Sequence[shared.Line], size: str) -> Text:
    seconds = sum(line["cpu_seconds"] for line in results)
    return Text(
        "How it was done",
        [
            f"Size {size}: {len(results)} runs, {seconds:.0f} s of CPU time. DPO and IPO train at beta = {BETA:g},"
            f" Preferred-FT at a learning rate of {LEARNING_RATE:g}. {BEST_OF_N} draws {NUM_BEST} answers from the"
            " reference and keeps the one with the highest implicit reward of the DPO policy; at temperature 0 these"
            " answers are equal.",
            "The paper compares summaries with human-written ones, judged by GPT-4. Here the reference text of a prompt"
            " is the preferred of two texts of the grammar, and the true reward is the judge.",
        ],
    )


if __name__ == "__main__":
    shared.start(main)
