"""The table of metrics before and after a run, with notes on their reliability.

In: the evaluations before and after, or the first and last logged training steps. Out: a rich Table, and notes. Pairs
that policy and reference score equally (all pairs, when training begins) are ties: neither right nor wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fastdpo.training.base import PackedTrainer
from fastdpo.training.inputs.streams import is_stream

FEW_ROWS = 30
_ACCURACY = "rewards/accuracies"


def comparison_table(
    trainer: PackedTrainer, before: dict[str, float], after: dict[str, float], columns: list[tuple[str, str]]
) -> tuple[Table, list[str]]:
    """The table and the notes below it: on the evaluation data, or without evaluation on the first and last logged
    training steps.

    Args:
        before, after: metrics of evaluations, with the prefix eval_; empty without evaluation.
        columns: (metric, label) of the rows, metrics without prefix.
    """
    num_rows = None
    if before:
        data: Any = trainer.eval_dataset
        first, last = (
            {key.removeprefix("eval_"): value for key, value in metrics.items()} for metrics in (before, after)
        )
        num_rows = None if is_stream(data) else len(data)
        where = "the evaluation rows" if num_rows is None else f"{num_rows:,} evaluation row{'s' * (num_rows != 1)}"
    else:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry] or [{}]
        first, last = logs[0], logs[-1]
        where = "the first and the last logged training steps"
    table = Table(title=f"before and after, on {where}")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    beta = getattr(trainer.args, "beta", 1.0)
    for key, label in columns:
        values = [metrics.get(key) for metrics in (first, last)]
        if None not in values:
            shown = [_shown(key, metrics, beta) for metrics in (first, last)]
            table.add_row(label, *shown)
    return table, _notes(first, beta, num_rows)


def all_ties(metrics: Mapping[str, float], beta: float) -> bool:
    """Whether policy and reference score every pair equally, up to rounding (compare DPOTrainer's first loss, ln 2)."""
    rewards = [metrics.get(f"rewards/{name}") for name in ("chosen", "rejected", "margins")]
    size = sum(abs(metrics.get(f"logps/{name}", 0.0)) for name in ("chosen", "rejected"))
    return all(reward is not None and abs(reward) <= 1e-6 + 1e-6 * beta * size for reward in rewards)


def _shown(key: str, metrics: Mapping[str, float], beta: float) -> str:
    return "ties" if key == _ACCURACY and all_ties(metrics, beta) else f"{metrics[key]:.4f}"


def _notes(first: Mapping[str, float], beta: float, num_rows: int | None) -> list[str]:
    notes = []
    if all_ties(first, beta):
        notes.append("ties: policy and reference score every pair equally (accuracies in the logs are rounding noise)")
    if num_rows is not None and num_rows < FEW_ROWS:
        spread = f": chance alone moves an accuracy by {1 / math.sqrt(num_rows):.0%}" if _ACCURACY in first else ""
        rows = "1 row is" if num_rows == 1 else f"{num_rows} rows are"
        notes.append(f"{rows} too few{spread}; hold out {FEW_ROWS} or more (--eval_fraction, --eval_dataset)")
    return notes
