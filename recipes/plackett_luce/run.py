"""Rankings of K answers: the Plackett-Luce loss against all pairs and against the best-worst pair of the same rankings.

The reference of the sentiment task answers every prompt K times, and a draw from Plackett-Luce with the true rewards
ranks the answers. Four kinds of training see the same answers and rankings:

    plackett_luce   the likelihood of each ranking
    all_pairs       the mean of `sigmoid` over all pairs of each ranking, as many tokens as plackett_luce
    best_worst      one pair for each ranking, once: fewer tokens
    best_worst_more the same pairs, in as many epochs as make about as many tokens as plackett_luce
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastdpo.alignment.task import Task
from fastdpo.report import Table
from fastdpo.report.sections import Section
from recipes.commands import command, home_of, measured_model, sample_words, train_prompts, train_words, write_prompts
from recipes.frontiers import REFERENCE, at_equal_kl, differences, frontier_plot, policies_table
from recipes.sentiment import SEEDS, task_of
from recipes.shared import Line, Options, finish, read_options, run_all, start

NAME = "plackett_luce"
METHODS = {
    "plackett_luce": "Plackett-Luce",
    "all_pairs": "all pairs",
    "best_worst": "best-worst",
    "best_worst_more": "best-worst, same compute",
}
NUM_RESPONSES = {"small": 4, "full": 8, "tiny": 3}
NUM_PROMPTS = {"small": 512, "full": 2048, "tiny": 48}
BATCH_SIZES = {"small": 16, "full": 32, "tiny": 8}  # rankings or pairs
BETAS = {"small": ("0.1", "0.3", "1"), "full": ("0.03", "0.1", "0.3", "1"), "tiny": ("0.3",)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not in results.jsonl, and writes the tables, the page and the plot."""
    options = read_options(NAME, "Plackett-Luce on rankings of K answers against their pairs.", argv)
    runs = []
    for seed in map(str, SEEDS[options.size]):
        runs.append({"method": REFERENCE, "seed": seed})
        runs += [{"method": m, "beta": beta, "seed": seed} for beta in BETAS[options.size] for m in METHODS]
    lines = run_all(runs, options, lambda params, folder: run_one(options, params, folder))
    finish(options, "Rankings and pairs", sections(lines))


def run_one(options: Options, params: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Trains one policy on a form of the rankings, and measures it."""
    task, method = task_of(options.size, int(params["seed"]), options.output_dir), params["method"]
    home, num_responses = home_of(task, options), NUM_RESPONSES[options.size]
    if method == REFERENCE:
        return measured_model(task, home / "reference")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)  # of a run that was stopped
    rankings = ranked(task, home, train_prompts(task)[: NUM_PROMPTS[options.size]], num_responses)
    data = rankings if method in ("plackett_luce", "all_pairs") else best_worst(rankings)
    epochs = num_epochs(task, method, num_responses)
    loss = "plackett_luce" if method == "plackett_luce" else "sigmoid"
    settings = train_words(
        task,
        beta=params["beta"],
        loss_type=loss,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH_SIZES[options.size],
    )
    words = ["--model", home / "reference", "--dataset", data, "--output_dir", folder / "model", *settings]
    command("train", *words, log=folder / "log.txt")
    return {
        **measured_model(task, folder / "model"),
        "steps": json.loads((folder / "model" / "trainer_state.json").read_text())["global_step"],
        "trained_tokens": round(epochs * num_tokens(data, task)),
    }


def num_epochs(task: Task, method: str, num_responses: int) -> float:
    """K / 2 times as many where two of K answers should cost as much as all of them."""
    return task.size.dpo_epochs * (num_responses / 2 if method == "best_worst_more" else 1)


def ranked(task: Task, home: Path, asked: Sequence[str], num_responses: int) -> Path:
    """Rankings of the reference's answers: rows of `responses` and `scores`. Equal answers are one."""
    path = home / f"rankings_of_{num_responses}.jsonl"
    if not path.is_file():
        prompts = write_prompts(home / "asked.jsonl", asked)
        words = ["--model", home / "reference", "--prompts", prompts, "-o", path, "--pairs", "ranking"]
        command("generate", *words, *sample_words(num_responses), "--seed", task.seed, log=home / "log.txt")
    return path


def best_worst(rankings: Path) -> Path:
    """The best and the worst answer of each ranking, as pairs."""
    path = rankings.with_name(f"best_worst_{rankings.name}")
    lines = []
    for line in rankings.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        order = sorted(range(len(row["scores"])), key=lambda i: row["scores"][i])
        pair = {"chosen": row["responses"][order[-1]], "rejected": row["responses"][order[0]]}
        lines.append(json.dumps({"prompt": row["prompt"], **pair}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def num_tokens(data: Path, task: Task) -> int:
    """The tokens of an epoch: each prompt once, and every answer."""
    from fastdpo.data.tokens.settings import TokenizationSettings
    from fastdpo.inspection.source import Source
    from fastdpo.inspection.tokens import survey_tokens

    settings = TokenizationSettings(max_length=None)
    return survey_tokens(Source(data, settings), task.tokenizer, settings).num_unique


def table(lines: Sequence[Line]) -> Table:
    """The methods at equal KL."""
    return at_equal_kl(lines, METHODS)


def compute_table(lines: Sequence[Line]) -> Table:
    """What each method computes."""
    rows = []
    for method, name in METHODS.items():
        of = [line for line in lines if line["params"]["method"] == method]
        tokens = fmean(line["trained_tokens"] for line in of)
        seconds = fmean(line["cpu_seconds"] for line in of)
        rows.append([name, f"{of[0]['steps']}", f"{tokens / 1000:,.0f}", f"{seconds:.1f}"])
    return Table(
        "Compute of a run",
        ("training", "steps", "tokens (thousands)", "CPU s"),
        rows,
        note="Tokens: each prompt once and every answer, in all epochs; means over seeds and betas. CPU time includes"
        " loading and measuring.",
    )


def sections(lines: Sequence[Line]) -> list[Section]:
    """Everything on the page."""
    return [
        table(lines),
        differences(lines, METHODS, base="plackett_luce"),
        frontier_plot(lines, METHODS),
        policies_table(lines, METHODS),
        compute_table(lines),
    ]


if __name__ == "__main__":
    start(main)
