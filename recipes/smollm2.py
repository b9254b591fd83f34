"""What the recipes on a real model share: SmolLM2-135M-Instruct as a folder, and the pairs of LLMs-from-scratch.

The model's GGUF file has 4-bit weights. They are converted once, to fp32 in safetensors, with the tokenizer and its
chat template. Refuses files without the columns of LLMs-from-scratch.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.evidence.smollm2 import smollm2_file
from fastdpo.training.setup.gguf_files import convert
from recipes.shared import Options, options_of, parser_of

SOURCE = (
    "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json of github.com/rasbt/LLMs-from-scratch"
)
COLUMNS = ("instruction", "input", "output", "chosen", "rejected")


@dataclass(frozen=True)
class Task:
    """The file of one instruction with its answers."""

    prompt: str
    answer: str  # the instruction's own answer
    chosen: str
    rejected: str

    def as_prompt(self) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": self.prompt}]}

    def as_pair(self) -> dict[str, Any]:
        said = {"chosen": self.chosen, "rejected": self.rejected}
        return {**self.as_prompt(), **{side: [{"role": "assistant", "content": text}] for side, text in said.items()}}


def read_options(name: str, description: str, argv: Sequence[str] | None) -> tuple[Options, argparse.Namespace]:
    """The options of these recipes: those of every recipe, `data` and `model`."""
    parser = parser_of(name, description)
    parser.add_argument("--data", required=True, metavar="FILE", help=f"Preference pairs: {SOURCE}.")
    parser.add_argument("--model", metavar="DIR", help="Another chat model. Default: SmolLM2.")
    parsed = parser.parse_args(argv)
    return options_of(name, parsed), parsed


def read_tasks(path: str | Path) -> list[Task]:
    """All rows whose two answers differ, in an order that does not depend on the file's.

    Raises:
        ValueError: there is no such file, or it has other columns.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data must be the file {SOURCE}, got {path}, which does not exist")
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"data must be a JSON list of rows, as in {SOURCE}, got {path}")
    missing = [column for column in COLUMNS if column not in rows[0]]
    if missing:
        raise ValueError(f"data must have the columns {', '.join(COLUMNS)}, got {path} without {', '.join(missing)}")
    tasks: dict[str, Task] = {}
    for row in rows:
        prompt = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        if row["chosen"] != row["rejected"]:
            tasks.setdefault(prompt, Task(prompt, row["output"], row["chosen"], row["rejected"]))
    found = [tasks[prompt] for prompt in sorted(tasks)]
    random.Random(0).shuffle(found)
    return found


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """JSON Lines. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def start_model(given: str | None, home: Path) -> Path:
    """The folder of the model to start from: the given one, or SmolLM2 in `home`, converted if it is not there yet.

    Raises:
        ValueError: no model is given, and SmolLM2 is not installed.
    """
    if given is not None:
        return Path(given)
    folder = home / "smollm2_135m_instruct"
    if folder.is_dir():
        return folder
    convert(smollm2_file(), folder)
    return folder
