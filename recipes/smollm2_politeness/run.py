"""Politeness of SmolLM2-135M-Instruct: DPO with LoRA on pairs of a polite and a blunt answer, beside Preferred-FT.

In: the pairs of LLMs-from-scratch. Out: for the start, fine-tuning on the polite answers, and DPO: how polite sampled
answers to held-out instructions are, by counting phrases; accuracy and margins on held-out pairs; the answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.alignment.results import Estimate
from fastdpo.report import Figure, Interval, SampleList, Table, Text, intervals
from fastdpo.report.sections import Section
from fastdpo.rewards.intervals import wilson
from fastdpo.rounds.measure import answers_side_by_side, measure
from recipes.commands import command
from recipes.shared import Line, finish, run_all, start
from recipes.smollm2 import Task, read_options, read_tasks, start_model, write_rows

NAME = "smollm2_politeness"
METHODS = {"start": "start", "dpo": "DPO, beta = 0.1", "preferred_ft": "Preferred-FT"}
# Chosen by reading the pairs, before any model was trained.
COURTEOUS = re.compile(
    r"\b(please|kindly|thank\w*|happy|glad|pleased|would|could|may|might|i'd|assist|suggest|recommend|suitable"
    r"|appropriate|certainly|indeed)\b",
    re.IGNORECASE,
)
BLUNT = re.compile(
    r"\b(obviously|duh|stupid|ridiculous\w*|freaking|damn|whatever|anyway|yourself|okay|straight up|genius|basically"
    r"|get it together|look it up|figure it out|deal with it|i'll tell you|next time)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Size:
    """Sizes of data and samples."""

    num_train: int
    num_heldout: int  # pairs
    num_answers: int  # to the first of their instructions, one each
    max_new_tokens: int = 32


SIZES = {"full": Size(894, 200, 200, 64), "small": Size(128, 48, 32), "tiny": Size(12, 6, 4, 6)}
LEARNING_RATE, LORA_R, BATCH_SIZE = 3e-4, 16, 8


def politeness(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """Courteous minus blunt phrases in each answer. A judge with TRL's signature."""
    texts = [said if isinstance(said, str) else said[-1]["content"] for said in completions]
    return [float(len(COURTEOUS.findall(text)) - len(BLUNT.findall(text))) for text in texts]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not in results.jsonl, and writes the tables, the page and the plot."""
    options, parsed = read_options(NAME, "DPO with LoRA on a real chat model: politeness before and after.", argv)
    size, home = SIZES[options.size], options.output_dir
    tasks = read_tasks(parsed.data)
    needed = size.num_train + size.num_heldout
    if len(tasks) < needed:
        raise ValueError(f"data must hold at least {needed} pairs for this size, got {len(tasks)} in {parsed.data}")
    heldout, train = tasks[: size.num_heldout], tasks[size.num_heldout : needed]
    pairs = write_rows(home / "train.jsonl", [task.as_pair() for task in train])
    base = start_model(parsed.model, home.parent)

    def run_one(params: dict[str, str], folder: Path) -> dict[str, Any]:
        model = base if params["method"] == "start" else trained(params["method"], base, pairs, folder)
        return {**of_answers(model, base, heldout, size, home), **of_pairs(model, base, heldout, home)}

    lines = run_all([{"method": method} for method in METHODS], options, run_one, model=str(base), data=parsed.data)
    finish(options, "Politeness of a small chat model", sections(lines, heldout, home, size))


def trained(method: str, base: Path, pairs: Path, folder: Path) -> Path:
    """The adapter that a command trains."""
    words = ["--model", base, "--dataset", pairs, "--output_dir", folder / "model", "--overwrite_output_dir"]
    words += ["--use_peft", "--lora_r", LORA_R, "--lora_alpha", LORA_R, "--learning_rate", LEARNING_RATE]
    words += ["--per_device_train_batch_size", BATCH_SIZE, "--num_train_epochs", 1, "--warmup_steps", 0.1]
    words += ["--eval_fraction", 0, "--save_strategy", "no", "--logging_steps", 4, "--report_to", "none"]
    folder.mkdir(parents=True, exist_ok=True)
    if method == "dpo":
        command("train", *words, "--beta", 0.1, log=folder / "log.txt")
    else:
        command("sft", *words, log=folder / "log.txt")
    return folder / "model"


def of_answers(model: Path, base: Path, heldout: Sequence[Task], size: Size, home: Path) -> dict[str, Any]:
    """Politeness of one sampled answer to each instruction, and the KL to the start."""
    from fastdpo.rounds.generate import Sampling
    from fastdpo.rounds.loading import Loader
    from fastdpo.rounds.state import read_json
    from fastdpo.training import DPOConfig

    loader = Loader(f"recipes.{NAME}.run:politeness", DPOConfig("not_used", max_length=None))
    policy = loader.model(str(model))
    first = None if model == base else loader.model(str(base))
    prompts = [task.as_prompt()["prompt"] for task in heldout[: size.num_answers]]
    sampling = Sampling(max_new_tokens=size.max_new_tokens)
    own_file = home / f"answers_{model.parent.name}.json"
    start_file = home / "answers_start.json"
    tokenizer = loader.tokenizer(str(base))
    figures = measure(policy, tokenizer, politeness, prompts, sampling, first, start_file, own_file)
    answers = read_json(start_file if first is None else own_file)["answers"]
    counts = {"courteous": COURTEOUS, "blunt": BLUNT}
    shares = {name: sum(bool(pattern.search(text)) for text in answers) for name, pattern in counts.items()}
    return {**figures, **shares, "answers": len(answers)}


def of_pairs(model: Path, base: Path, heldout: Sequence[Task], home: Path) -> dict[str, Any]:
    """Accuracy on held-out pairs: by log-prob, and by the implicit reward of a trained model."""
    from fastdpo.rewards.scores import score
    from fastdpo.training import DPOConfig

    args = DPOConfig("not_used", max_length=None, ref_cache_dir=str(home / "logps"))
    reference = None if model == base else str(base)
    rows = score(str(model), reference, [task.as_pair() for task in heldout], args).rows
    preferred = sum((row.logps[0] > row.logps[1]) for row in rows)
    found = {"pairs": len(rows), "right_by_logp": preferred}
    if reference is None:
        return found
    margins = [row.margins[0] for row in rows]
    margin = Estimate.of(margins)
    right = sum(m > 0 for m in margins)
    return {**found, "right_by_reward": right, "margin": margin.mean, "margin_stderr": margin.stderr}


def measure_check(tasks: Sequence[Task]) -> dict[str, int]:
    """How often the measure itself agrees with the labels of pairs."""
    scores = [politeness([], [task.chosen, task.rejected]) for task in tasks]
    right, wrong = sum(a > b for a, b in scores), sum(a < b for a, b in scores)
    return {"right": right, "equal": len(scores) - right - wrong, "wrong": wrong}


def table(lines: Sequence[Line]) -> Table:
    """The answers of each model."""
    columns = ("model", "politeness", "courteous answers", "blunt answers", "KL to the start", "tokens")
    rows = [
        [
            METHODS[line["params"]["method"]],
            Estimate(line["reward"], line["reward_stderr"]).text(),
            _share(line["courteous"], line["answers"]),
            _share(line["blunt"], line["answers"]),
            Estimate(line["kl"], line["kl_stderr"]).text(1),
            f"{line['tokens']:.1f}",
        ]
        for line in lines
    ]
    return Table("Answers to held-out instructions", columns, rows, note="± one standard error; brackets: 95%.")


def pairs_table(lines: Sequence[Line]) -> Table:
    """How each model ranks held-out pairs."""
    columns = ("model", "accuracy of log-prob", "accuracy of implicit reward", "margin (nats)")
    rows = [
        [
            METHODS[line["params"]["method"]],
            _share(line["right_by_logp"], line["pairs"]),
            _share(line["right_by_reward"], line["pairs"]) if "right_by_reward" in line else "",
            Estimate(line["margin"], line["margin_stderr"]).text() if "margin" in line else "",
        ]
        for line in lines
    ]
    return Table("Held-out pairs", columns, rows, note="The margin is of beta = 0.1, also for Preferred-FT.")


def _share(count: int, of: int) -> str:
    low, high = wilson(count, of)
    return f"{count / of:.0%} ({low:.0%} to {high:.0%})"


def sections(lines: Sequence[Line], heldout: Sequence[Task], home: Path, size: Size) -> list[Section]:
    """Everything on the page."""
    check = measure_check(heldout)
    about = Text(
        "The measure",
        [
            "Politeness is the number of courteous phrases in an answer (please, would, happy, suggest, indeed, ...)"
            " minus the number of blunt ones (obviously, duh, look it up, ...). Of the"
            f" {len(heldout)} held-out pairs it ranks {check['right']} as labelled, {check['wrong']} the other way"
            f" round, and cannot tell {check['equal']}.",
            f"Each model answers {lines[0]['answers']} held-out instructions once, at temperature 1, in at most"
            f" {size.max_new_tokens} tokens.",
        ],
    )
    files = {METHODS[line["params"]["method"]]: home / f"answers_{_file(line)}.json" for line in lines}
    samples = answers_side_by_side(files)
    return [
        table(lines),
        pairs_table(lines),
        _plot(lines),
        about,
        SampleList("Answers before and after", samples, "Politeness"),
    ]


def _file(line: Mapping[str, Any]) -> str:
    method: str = line["params"]["method"]
    return method if method == "start" else f"method={method}"


def _plot(lines: Sequence[Line]) -> Figure:
    def interval(line: Line, count: str, of: str) -> Interval:
        low, high = wilson(line[count], line[of])
        return Interval(METHODS[line["params"]["method"]], line[count] / line[of], low, high)

    series = {
        "courteous answers": [interval(line, "courteous", "answers") for line in lines],
        "accuracy of log-prob": [interval(line, "right_by_logp", "pairs") for line in lines],
    }
    alt = "; ".join(f"{name}: " + ", ".join(f"{i.name} {i.value:.2f}" for i in of) for name, of in series.items())
    figure = intervals(series, "share, with 95% interval", mark=0.5)
    return Figure("Answers and pairs", figure, alt=alt)


if __name__ == "__main__":
    start(main)
