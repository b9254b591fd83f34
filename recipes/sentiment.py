"""What the recipes on the sentiment task share: its sizes, and one policy trained and measured.

In: the size's name, a seed, settings of DPOConfig. Out: the figures of a policy: true reward and KL to the reference of
samples on held-out prompts, accuracy on held-out pairs. The task is `fastdpo/alignment/task.py`.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from fastdpo.alignment.results import PolicyResult
from fastdpo.alignment.sweep import Bench, measure_policy, prepare_bench, train_policy
from fastdpo.alignment.task import SIZES, Task, cached_task
from fastdpo.training import DPOConfig, SFTConfig, SFTTrainer

TASK_SIZES = {
    "small": replace(SIZES["small"], num_pairs=1024, num_heldout_prompts=512, dpo_batch_size=16),
    "full": SIZES["full"],
    "tiny": replace(
        SIZES["small"], num_train_prompts=48, num_heldout_prompts=24, num_pairs=48, hidden_size=16, num_layers=1,
        sft_epochs=1,
        dpo_batch_size=8,
    ),
}  # fmt: skip
SEEDS = {"small": (0, 1, 2), "full": (0, 1, 2, 3, 4), "tiny": (0, 1)}
FIGURES = ("reward", "kl", "accuracy", "tokens")


@lru_cache(maxsize=1)
def task_of(size: str, seed: int, output_dir: Path) -> Task:
    """The task of a seed, kept in the recipe's folder."""
    return cached_task(TASK_SIZES[size], seed, output_dir / f"task_seed_{seed}")


@lru_cache(maxsize=1)
def bench_of(task: Task) -> Bench:
    """What the policies of a task share."""
    return prepare_bench(
        task.reference,
        task.tokenizer,
        args=DPOConfig("not_used", **task.dpo_settings()),
        train_rows=task.train_rows,
        heldout_rows=task.heldout_rows,
        measurement=task.measurement(),
    )


def trained(task: Task, bench: Bench, **settings: Any) -> Any:
    """A policy trained from the reference with settings of DPOConfig."""
    with tempfile.TemporaryDirectory() as scratch:
        policy, _ = train_policy(bench, DPOConfig(scratch, **{**task.dpo_settings(), **settings}))
    return policy


def preferred_ft(task: Task, learning_rate: float) -> Any:
    """The reference, fine-tuned further on the chosen responses of the pairs."""
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in task.train_rows]
    with tempfile.TemporaryDirectory() as scratch:
        settings = {**task.dpo_settings(), "learning_rate": learning_rate}
        settings.pop("token_metrics")
        args = SFTConfig(scratch, **settings)
        trainer = SFTTrainer(
            copy.deepcopy(task.reference), args=args, train_dataset=rows, processing_class=task.tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model


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
