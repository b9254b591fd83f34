"""Online DPO in rounds against offline DPO with as many pairs, on the sentiment task, whose true reward is known.

Labels are Bradley-Terry draws from the true reward. Prompts, pairs and optimizer steps are as many in each:

    offline   the reference answers every prompt as often as there are rounds; one run trains on all pairs
    parts     the same pairs, in one run after another: what rounds change apart from who answers; not in the small size
    rounds    `fastdpo iterate`: the model of each round answers every prompt once more
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastdpo.alignment.results import Estimate
from fastdpo.alignment.task import Task
from fastdpo.data.synthetic import true_reward
from fastdpo.report import Table
from fastdpo.report.sections import Section
from recipes.commands import (
    command,
    home_of,
    measured_model,
    sample_words,
    train_prompts,
    train_words,
    write_prompts,
)
from recipes.frontiers import REFERENCE, at_equal_kl, differences, frontier_plot, policies_table
from recipes.sentiment import SEEDS, task_of
from recipes.shared import Line, Options, finish, over_seeds, read_options, run_all, start

NAME = "iterated_rounds"
METHODS = {"offline": "offline", "parts": "offline, in parts", "rounds": "in rounds"}
RUN = {"small": ("offline", "rounds"), "full": tuple(METHODS), "tiny": tuple(METHODS)}
NUM_ROUNDS = {"small": 3, "full": 3, "tiny": 2}
NUM_PROMPTS = {"small": 340, "full": 1365, "tiny": 24}  # answered in every round
BATCH_SIZES = {"small": 16, "full": 32, "tiny": 8}
BETAS = {"small": ("0.1", "0.3", "1"), "full": ("0.03", "0.1", "0.3", "1"), "tiny": ("0.3",)}
NUM_EVAL_PROMPTS = 8  # `fastdpo iterate` measures on these; the recipe measures again, on the task's held-out prompts


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not in results.jsonl, and writes the tables, the page and the plot."""
    options = read_options(NAME, "Online DPO in rounds against offline DPO with as many pairs.", argv)
    runs = []
    for seed in map(str, SEEDS[options.size]):
        runs.append({"method": REFERENCE, "seed": seed})
        runs += [{"method": m, "beta": beta, "seed": seed} for beta in BETAS[options.size] for m in RUN[options.size]]
    lines = run_all(runs, options, lambda params, folder: run_one(options, params, folder))
    finish(options, "DPO in rounds", sections(lines))


def run_one(options: Options, params: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Trains one policy and measures it, and the models of its rounds."""
    task = task_of(options.size, int(params["seed"]), options.output_dir)
    home, num_rounds = home_of(task, options), NUM_ROUNDS[options.size]
    if params["method"] == REFERENCE:
        return measured_model(task, home / "reference")
    folder.mkdir(parents=True, exist_ok=True)
    asked = train_prompts(task)[: NUM_PROMPTS[options.size]]
    settings = train_words(task, beta=params["beta"], per_device_train_batch_size=BATCH_SIZES[options.size])
    if params["method"] == "rounds":
        prompts = write_prompts(home / "prompts.jsonl", [*task.heldout_prompts[:NUM_EVAL_PROMPTS], *asked])
        words = ["--model", home / "reference", "--prompts", prompts, "--output_dir", folder / "rounds"]
        words += ["--rounds", num_rounds, "--eval_prompts", NUM_EVAL_PROMPTS, *sample_words(2)]
        command("iterate", *words, *settings, log=folder / "log.txt")
        rounds = [folder / "rounds" / f"round_{number}" for number in range(1, num_rounds + 1)]
        models, files = [r / "model" for r in rounds], [r / "pairs.jsonl" for r in rounds]
    else:
        files = offline_pairs(task, home, asked, num_rounds)
        files = files if params["method"] == "parts" else [joined(files, home / "offline.jsonl")]
        models = [folder / f"model_{number}" for number in range(1, len(files) + 1)]
        for start_from, file, model in zip([home / "reference", *models], files, models, strict=False):
            shutil.rmtree(model, ignore_errors=True)  # of a run that was stopped
            words = ["--model", start_from, "--dataset", file, "--output_dir", model]
            words += ["--ref_model", home / "reference"] if start_from != home / "reference" else []
            command("train", *words, *settings, log=folder / "log.txt")
    figures = [measured_model(task, model) for model in models]
    path = [{"kl": f["kl"], "reward": f["reward"]} for f in figures]
    return {**figures[-1], "path": path, "pairs": [pair_facts(file) for file in files]}


def pair_facts(file: Path) -> dict[str, Any]:
    """How many pairs a file has, how far apart their true rewards are, and how many labels agree with those."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    differences = [true_reward(row["chosen"]) - true_reward(row["rejected"]) for row in rows]
    agreeing = fmean((difference > 0) + (difference == 0) / 2 for difference in differences)
    return {"number": len(rows), "distance": fmean(map(abs, differences)), "agreeing": agreeing}


def offline_pairs(task: Task, home: Path, asked: Sequence[str], num_rounds: int) -> list[Path]:
    """As many pairs as the rounds make, all answered by the reference: a file for each round."""
    prompts = write_prompts(home / "asked.jsonl", asked)
    files = [home / f"offline_{number}.jsonl" for number in range(num_rounds)]
    for number, file in enumerate(files):
        if not file.is_file():
            words = ["--model", home / "reference", "--prompts", prompts, "-o", file, *sample_words(2)]
            seed = task.seed + 1_000_000 * (number + 1)  # not those of the rounds
            command("generate", *words, "--seed", seed, log=home / "log.txt")
    return files


def joined(files: Sequence[Path], path: Path) -> Path:
    """One file with the lines of all."""
    path.write_text("".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")
    return path


def methods_of(lines: Sequence[Line]) -> dict[str, str]:
    """The methods that ran, with their names."""
    ran = {line["params"]["method"] for line in lines}
    return {method: name for method, name in METHODS.items() if method in ran}


def table(lines: Sequence[Line]) -> Table:
    """The methods at equal KL."""
    return at_equal_kl(lines, methods_of(lines))


def by_round(lines: Sequence[Line]) -> Table:
    """Reward and KL after each round."""
    rounds = [line for line in lines if line["params"]["method"] == "rounds"]
    flat: list[Line] = [
        {"params": {**line["params"], "round": str(number)}, **figures}
        for line in rounds
        for number, figures in enumerate(line["path"], start=1)
    ]
    groups = sorted(over_seeds(flat, ("reward", "kl")), key=lambda g: float(g.params["beta"]))
    rows = [
        [f"beta {g.params['beta']}, round {g.params['round']}", g.figures["reward"].text(), g.figures["kl"].text()]
        for g in groups
    ]
    return Table("After each round", ("policy", "true reward", "KL to the reference"), rows)


def pairs_table(lines: Sequence[Line]) -> Table:
    """The pairs that training sees offline and in every round."""
    rows = []
    for method in ("offline", "rounds"):
        files = [line["pairs"] for line in lines if line["params"]["method"] == method]
        for number, of_round in enumerate(zip(*files, strict=True), start=1):
            figures = {key: Estimate.of([facts[key] for facts in of_round]) for key in ("distance", "agreeing")}
            where = f"{METHODS[method]}, round {number}" if method == "rounds" else METHODS[method]
            num_pairs = f"{fmean(facts['number'] for facts in of_round):,.0f}"
            rows.append([where, num_pairs, figures["distance"].text(), figures["agreeing"].text(3)])
    return Table(
        "The pairs",
        ("training", "pairs", "reward gap", "right labels"),
        rows,
        note="Means and standard errors over seeds and betas. Every pair is trained on once; equal answers make none."
        " Reward gap: the difference of true rewards in a pair. Right labels: the share that agrees with the true"
        " reward. The smaller the gap, the more often a Bradley-Terry label is wrong.",
    )


def sections(lines: Sequence[Line]) -> list[Section]:
    """Everything on the page."""
    names = methods_of(lines)
    return [
        table(lines),
        differences(lines, names, base="offline"),
        frontier_plot(lines, names),
        policies_table(lines, names),
        by_round(lines),
        pairs_table(lines),
    ]


if __name__ == "__main__":
    start(main)
