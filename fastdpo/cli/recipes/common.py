"""Rules shared by several projects: datasets, held-out rows, W&B, DeepSpeed, evaluation by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.cli.recipes.book import Book, as_number

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'"
    " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
READ_BY_COLUMNS = "fastdpo reads rows by their columns and renders them with the tokenizer's chat template"


def put_data(book: Book, parts: Sequence[Mapping[str, Any]], comment: str, *, evaluated: bool = False) -> None:
    """Writes one dataset as name, split and configuration; several datasets, or one with more keys, as a list."""
    prefix = "eval_" if evaluated else ""
    if len(parts) == 1 and set(parts[0]) <= {"path", "split", "name"}:
        part = parts[0]
        split = str(part.get("split", "train"))
        if "[" not in split and "+" not in split and not (evaluated and "name" in part):
            book.put(f"{prefix}dataset", part["path"], comment)
            if "name" in part:
                book.put("dataset_config", part["name"], comment)
            if split != "train" or evaluated:
                book.put("eval_split" if evaluated else "dataset_split", split, comment)
            return
    book.put(f"{prefix}datasets", [dict(part) for part in parts], comment)


def put_held_out(book: Book, key: str, value: Any) -> None:
    """Writes the held-out share of the training rows."""
    share = as_number(value)
    if share is not None and 0 <= share < 1:
        book.put("eval_fraction", share, f"was {key}")
    elif share is not None:
        book.lose(key, value, "write a share instead of a number of rows: eval_fraction, such as 0.05")


def put_by_epoch(book: Book, what: str, key: str, times: Any, epochs: Any) -> None:
    """Writes the evaluations ("eval") or saves per epoch. `eval_steps` below 1 is a share of the whole run."""
    number, num_epochs = as_number(times), as_number(epochs)
    if not number:
        if number is not None:
            book.put(f"{what}_strategy", "no", f"was {key}: 0")
        return
    if number == 1 or not num_epochs:
        book.put(f"{what}_strategy", "epoch", f"was {key}: {times}")
        if number != 1:
            book.lose(
                key, times, f"written as once per epoch; for more, set {what}_steps below 1, a share of the whole run"
            )
        return
    book.put(f"{what}_strategy", "steps", f"was {key}: {times}")
    share = round(1 / (number * num_epochs), 6)
    book.put(f"{what}_steps", share, f"of the run: 1 / ({times} x {epochs} epochs)")


def put_deepspeed(book: Book, value: Any) -> None:
    """Writes the accelerate_config for a DeepSpeed file; the stage is read from the file's name."""
    if not value:
        return
    text = str(value).lower()
    stage = next((stage for stage in ("3", "2") if f"z{stage}" in text or f"zero{stage}" in text), None)
    if stage is None:
        book.put("deepspeed", value)
    else:
        book.put("accelerate_config", f"zero{stage}", f"was deepspeed: {value}")


def without_evaluation(book: Book, whose: str) -> None:
    """Without evaluation data in the recipe, training uses all rows."""
    if any(name in book.lines for name in ("eval_dataset", "eval_datasets", "eval_fraction", "eval_split")):
        if book.value("eval_fraction") != 0:
            return
    else:
        book.put("eval_fraction", 0, f"not in the recipe: {whose} trains on all rows")
    for name in ("eval_strategy", "eval_steps", "do_eval", "per_device_eval_batch_size"):
        line = book.lines.pop(name, None)
        if line is not None and line.value not in ("no", False):
            book.lose(name, line.value, "the recipe has no evaluation data: write eval_fraction or eval_dataset")
