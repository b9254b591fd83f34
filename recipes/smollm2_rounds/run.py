"""SmolLM2-135M-Instruct in rounds with a judge: `fastdpo generate`, then `iterate`, then `rank`.

In: the instructions of LLMs-from-scratch with their own answers. Out: judged pairs of the start's answers, rounds of
online DPO with LoRA, and the start and all rounds ranked on those pairs; answers before and after.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.alignment.results import Estimate
from fastdpo.report import Figure, Interval, SampleList, Table, Text, intervals
from fastdpo.report.sections import Section
from fastdpo.rounds.measure import answers_side_by_side
from fastdpo.training.callbacks.json_lines import read_lines
from recipes.commands import command
from recipes.shared import Line, Options, finish, run_all, start
from recipes.smollm2 import Task, read_options, read_tasks, start_model, write_rows
from recipes.smollm2_rounds.judge import learn

NAME = "smollm2_rounds"
JUDGE = f"recipes.{NAME}.judge:agreement"
BETA, LEARNING_RATE, LORA_R = 0.1, 3e-4, 16


@dataclass(frozen=True)
class Size:
    """Sizes of the rounds."""

    num_rounds: int
    num_prompts: int  # answered in every round
    num_measured: int  # held-out instructions, answered once after every round
    num_ranked: int  # other instructions, whose judged pairs rank the models
    num_responses: int = 4
    max_new_tokens: int = 32
    epochs: int = 2


SIZES = {
    "full": Size(3, 512, 128, 200),
    "small": Size(2, 32, 24, 24),
    "tiny": Size(2, 6, 4, 4, num_responses=3, max_new_tokens=6, epochs=4),
}
STEPS = ("generate", "iterate", "rank")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not in results.jsonl, and writes the tables, the page and the plot."""
    options, parsed = read_options(NAME, "Online DPO of a real chat model in rounds, with a judge.", argv)
    size, tasks = SIZES[options.size], read_tasks(parsed.data)
    needed = size.num_ranked + size.num_measured + size.num_prompts
    if len(tasks) < needed:
        raise ValueError(f"data must hold at least {needed} pairs for this size, got {len(tasks)} in {parsed.data}")
    learn({task.prompt: task.answer for task in tasks})
    rounds = Rounds(options, size, start_model(parsed.model, options.output_dir.parent), tasks)
    runs = [{"step": step} for step in STEPS]
    lines = run_all(runs, options, rounds.run, model=str(rounds.base), data=parsed.data)
    finish(options, "A small chat model in rounds", sections(lines, size, options.output_dir))


class Rounds:
    """The three steps, bound to the model and its instructions."""

    def __init__(self, options: Options, size: Size, base: Path, tasks: Sequence[Task]) -> None:
        self.size, self.base, self.home = size, base, options.output_dir
        self.pairs, self.log = self.home / "judged.jsonl", self.home / "log.txt"
        rows = [task.as_prompt() for task in tasks]
        self.ranked = write_rows(self.home / "ranked_prompts.jsonl", rows[: size.num_ranked])
        rows = rows[size.num_ranked :][: size.num_measured + size.num_prompts]
        self.prompts = write_rows(self.home / "prompts.jsonl", rows)  # iterate holds the first ones out
        self.sampling = ["--judge", JUDGE, "-n", size.num_responses, "--max_new_tokens", size.max_new_tokens]

    def run(self, params: Mapping[str, str], folder: Path) -> dict[str, Any]:
        """One step."""
        return {"generate": self.generate, "iterate": self.iterate, "rank": self.rank}[params["step"]]()

    def generate(self) -> dict[str, Any]:
        """Pairs of the start's own answers, labelled by the judge, for the ranking."""
        words = ["--model", self.base, "--prompts", self.ranked, "-o", self.pairs, *self.sampling]
        command("generate", *words, log=self.log)
        return {"prompts": self.size.num_ranked, "pairs": len(read_lines(self.pairs))}

    def iterate(self) -> dict[str, Any]:
        """The rounds. A stopped one continues."""
        size = self.size
        words = ["--model", self.base, "--prompts", self.prompts, "--output_dir", self.home / "rounds", *self.sampling]
        words += ["--rounds", size.num_rounds, "--eval_prompts", size.num_measured, "--beta", BETA, "--use_peft"]
        words += ["--lora_r", LORA_R, "--lora_alpha", LORA_R, "--learning_rate", LEARNING_RATE, "--warmup_steps", 0.1]
        words += ["--num_train_epochs", size.epochs, "--per_device_train_batch_size", 8, "--eval_fraction", 0]
        words += ["--save_strategy", "no", "--logging_steps", 4, "--report_to", "none"]
        command("iterate", *words, log=self.log)
        manifests = [
            self.home / "rounds" / f"round_{number}" / "manifest.json" for number in range(size.num_rounds + 1)
        ]
        return {"history": [json.loads(path.read_text()) for path in manifests]}

    def rank(self) -> dict[str, Any]:
        """The start and every round, by the judged pairs that they prefer."""
        models = [self.base, *(self.home / "rounds" / f"round_{n + 1}" / "model" for n in range(self.size.num_rounds))]
        named = self.home / "models"  # a model is named by its folder
        shutil.rmtree(named, ignore_errors=True)
        named.mkdir()
        for number, model in enumerate(models):
            (named / _name(number)).symlink_to(model.resolve())
        words = ["--models", *(named / _name(number) for number in range(len(models))), "--data", self.pairs]
        out = self.home / "ratings.jsonl"
        command("rank", *words, "-o", out, "--html", self.home / "ratings.html", log=self.log)
        return {"ratings": {Path(line["model"]).name: line for line in read_lines(out)}}


def _name(number: int) -> str:
    return f"round_{number}" if number else "start"


def table(lines: Sequence[Line]) -> Table:
    """The judge's view of held-out answers after every round."""
    columns = ("model", "judged reward", "win rate", "KL to the start", "tokens")
    rows = []
    for number, manifest in enumerate(lines[1]["history"]):
        now = manifest["metrics"]
        rows.append(
            [
                f"round {number}" if number else "start",
                Estimate(now["reward"], now["reward_stderr"]).text(3),
                f"{now['win_rate']:.0%}" if number else "",
                Estimate(now["kl"], now["kl_stderr"]).text(1),
                f"{now['tokens']:.1f}",
            ]
        )
    return Table("After each round", columns, rows, note="± one standard error. The win rate is against the start.")


def ranking_table(lines: Sequence[Line]) -> Table:
    """What the models prefer on the judged pairs of the start's answers."""
    ratings = lines[2]["ratings"]
    is_tied = all(of["wins"] == of["losses"] == 0 for of in ratings.values())
    rows = []
    for number in range(len(ratings)):
        of = ratings[_name(number)]
        share, low, high = of["accuracy_sum"], of["accuracy_sum_lower"], of["accuracy_sum_upper"]
        rating = "ties only" if is_tied else "none" if of["rating"] is None else f"{of['rating']:.0f}"
        if not is_tied and of["rating"] is not None:
            rating += f" ({of['rating_lower']:.0f} to {of['rating_upper']:.0f})"
        rows.append([f"round {number}" if number else "start", f"{share:.0%} ({low:.0%} to {high:.0%})", rating])
    columns = ("model", "accuracy of log-prob", "Bradley-Terry rating")
    return Table("Ranked on judged pairs", columns, rows, note="Brackets: 95% intervals.")


def sections(lines: Sequence[Line], size: Size, home: Path) -> list[Section]:
    """Everything on the page."""
    generated, iterated, _ = lines
    history = iterated["history"]
    made = ", ".join(str(manifest["pairs"]) for manifest in history[1:])
    about = Text(
        "What was done",
        [
            "The judge is the F1 of the words of an answer and of the data's own answer. In each of"
            f" {size.num_rounds} rounds the model answers {size.num_prompts} instructions {size.num_responses} times;"
            f" the best and the worst answer to each are a pair ({made} pairs), and DPO with LoRA trains on them.",
            f"Reward, win rate and KL are of one answer to each of {size.num_measured} held-out instructions."
            f" Accuracy and rating are of {generated['pairs']} pairs of the start's answers to other instructions,"
            " labelled by the judge.",
        ],
    )
    files = {"start": home / "rounds" / "start_answers.json"}
    files |= {f"round {n}": home / "rounds" / f"round_{n}" / "answers.json" for n in range(1, len(history))}
    answers = SampleList("Answers before and after", answers_side_by_side(files), "F1")
    return [table(lines), ranking_table(lines), _plot(history), about, answers]


def _plot(history: Sequence[Mapping[str, Any]]) -> Figure:
    spans = [(m["metrics"]["reward"], 1.96 * m["metrics"]["reward_stderr"]) for m in history]
    names = [f"round {number}" if number else "start" for number in range(len(history))]
    points = [Interval(name, mean, mean - half, mean + half) for name, (mean, half) in zip(names, spans, strict=True)]
    alt = ", ".join(f"{point.name}: {point.value:.3f}" for point in points)
    figure = intervals({"judged reward": points}, "judged reward, with 95% interval")
    return Figure("Judged reward", figure, alt=alt)


if __name__ == "__main__":
    start(main)
