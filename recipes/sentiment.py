"""What the recipes on the sentiment task share: its sizes, and one policy trained and measured.

In: the size's name, a seed, settings of DPOConfig. Out: the figures of a policy: true reward and KL to the reference of
samples on held-out prompts, accuracy on held-out pairs. The task is `fastdpo/alignment/task.py`.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastdpo.alignment.results import PolicyResult
from fastdpo.alignment.sweep import Bench, measure_policy, prepare_bench, train_policy
from fastdpo.alignment.task import SIZES, Row, Size, Task, cached_task
from fastdpo.training import DPOConfig

TASK_SIZES = {
    **SIZES,
    "tiny": replace(
        SIZES["small"], num_train_prompts=48, num_heldout_prompts=24, num_pairs=48, hidden_size=16, num_layers=1,
        sft_epochs=1,
    ),
}  # fmt: skip
SEEDS = {"small": (0, 1, 2), "full": (0, 1, 2, 3, 4), "tiny": (0, 1)}
FIGURES = ("reward", "kl", "accuracy", "tokens")


def size_of(name: str) -> Size:
    return TASK_SIZES[name]


@lru_cache(maxsize=1)
def task_of(size: str, seed: int, output_dir: Path) -> Task:
    """The task of a seed, kept in the recipe's folder."""
    return cached_task(TASK_SIZES[size], seed, output_dir / f"task_seed_{seed}")


def bench_of(task: Task, train_rows: list[Row] | None = None) -> Bench:
    """What the policies of a seed share. `train_rows` replaces the task's own."""
    args = DPOConfig("not_used", **task.dpo_settings())
    return prepare_bench(
        task.reference,
        task.tokenizer,
        args=args,
        train_rows=task.train_rows if train_rows is None else train_rows,
        heldout_rows=task.heldout_rows,
        measurement=task.measurement(),
    )


def trained(task: Task, bench: Bench, **settings: Any) -> Any:
    """A policy trained from the reference with settings of DPOConfig."""
    with tempfile.TemporaryDirectory() as scratch:
        policy, _ = train_policy(bench, DPOConfig(scratch, **{**task.dpo_settings(), **settings}))
    return policy


def figures_of(result: PolicyResult) -> dict[str, float]:
    """The figures of a policy, as they stand in results.jsonl."""
    return {
        "reward": result.reward.mean,
        "kl": result.kl.mean,
        "accuracy": result.accuracy.mean,
        "tokens": result.num_tokens.mean,
    }


def measured(bench: Bench, policy: Any) -> dict[str, float]:
    """The figures of a policy. Its accuracy does not depend on beta."""
    return figures_of(measure_policy(bench, policy, 1.0))
