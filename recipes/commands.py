"""For recipes on the sentiment task that train through the commands of fastdpo: how they call and measure.

A command runs in the recipe's process, so that libraries load once. What it prints goes to a file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdpo.alignment.task import MAX_NEW_TOKENS, Task
from recipes.sentiment import bench_of, measured
from recipes.shared import Options

JUDGE = "recipes.judges:bradley_terry"


def command(name: str, *words: Any, log: Path) -> None:
    """Runs `fastdpo NAME WORDS`.

    Raises:
        ValueError: it fails.
    """
    from fastdpo.cli.main import main as fastdpo

    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = fastdpo([name, *map(str, words)])
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ValueError(f"fastdpo {name} ended with exit code {code}; the end of {log}: {' '.join(last)}")


def train_words(task: Task, **settings: Any) -> list[str]:
    """The task's settings as options of `fastdpo train`. All rows are trained on."""
    # a share: runs of different lengths warm up alike
    settings = {**task.dpo_settings(), "warmup_steps": 0.1, "eval_fraction": 0, **settings}
    return [
        word
        for name, value in settings.items()
        if value is not None
        for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def sample_words(num_responses: int) -> list[str]:
    """The options of `fastdpo generate` and `iterate` for samples of the task, labelled with Bradley-Terry's noise."""
    sizes = {"n": num_responses, "max_new_tokens": MAX_NEW_TOKENS, "batch_size": 256}
    return ["--judge", JUDGE, *(word for k, v in sizes.items() for word in (f"{'-' if k == 'n' else '--'}{k}", str(v)))]


def home_of(task: Task, options: Options) -> Path:
    """The folder of a task, with its reference and what the runs of its seed share."""
    return options.output_dir / f"task_seed_{task.seed}"


def measured_model(task: Task, folder: Path) -> dict[str, float]:
    """The figures of a saved model: true reward and KL to the reference on the held-out prompts, accuracy on the
    held-out pairs."""
    from transformers import AutoModelForCausalLM

    return measured(bench_of(task), AutoModelForCausalLM.from_pretrained(folder))


def train_prompts(task: Task) -> list[str]:
    """The distinct prompts of the task's pairs."""
    return list(dict.fromkeys(row["prompt"] for row in task.train_rows))


def write_prompts(path: Path, prompts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path
