"""A small version of the controlled-sentiment experiment of the DPO paper (arXiv 2305.18290, section 6.1).

In: a size and a seed. Out: an Experiment: the models, the preference rows, and the result of the beta sweep. The
experiment generates everything itself (`task.py`).

    the task: a reference and pairs of its samples -> DPO at every beta -> measurements on held-out prompts
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.alignment.results import SweepResult
from fastdpo.alignment.sweep import sweep_beta
from fastdpo.alignment.task import SIZES, Size, prepare_task
from fastdpo.data.synthetic import true_reward

__all__ = ["BETAS", "SIZES", "Experiment", "Size", "run_experiment"]
BETAS = (0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Experiment:
    """The models, rows and measurements of a run."""

    size: Size
    tokenizer: Any
    reference: Any  # the SFT model
    policies: dict[float | None, Any]  # by beta
    sft_history: tuple[dict[str, Any], ...]  # log_history of the SFT trainer
    train_rows: list[dict[str, str]]
    heldout_rows: list[dict[str, str]]
    label_ceiling: float  # share of held-out pairs that the true reward itself ranks as labelled
    reference_rewards: list[float]  # of all samples drawn from the reference
    sweep: SweepResult


def run_experiment(
    size: Size,
    *,
    seed: int = 0,
    betas: Sequence[float] = BETAS,
    on_stage: Callable[[str], None] = lambda stage: None,
    make_callbacks: Callable[[], list[Any]] = list,
) -> Experiment:
    """Runs all stages in fp32, on the GPU if there is one.

    Args:
        on_stage: called with the name of each stage when it starts.
        make_callbacks: returns the callbacks for each trainer.
    """
    from fastdpo.training import DPOConfig

    task = prepare_task(size, seed, on_stage=on_stage, make_callbacks=make_callbacks)
    policies: dict[float | None, Any] = {}

    def callbacks_of(beta: float) -> list[Any]:
        on_stage(f"DPO with beta = {beta:g}")
        return make_callbacks()

    with tempfile.TemporaryDirectory() as scratch:
        args = DPOConfig(
            scratch,
            logging_steps=0.04,  # of all steps
            eval_strategy="steps",
            eval_steps=0.25,
            **task.dpo_settings(),
        )
        sweep = sweep_beta(
            task.reference,
            task.tokenizer,
            betas,
            args=args,
            train_rows=task.train_rows,
            heldout_rows=task.heldout_rows,
            measurement=task.measurement(),
            make_callbacks=callbacks_of,
            on_policy=lambda policy, result: policies.update({result.beta: policy}),
        )
    ranked = [true_reward(row["chosen"]) > true_reward(row["rejected"]) for row in task.heldout_rows]
    return Experiment(
        size=size,
        tokenizer=task.tokenizer,
        reference=task.reference,
        policies=policies,
        sft_history=task.sft_history,
        train_rows=task.train_rows,
        heldout_rows=task.heldout_rows,
        label_ceiling=sum(ranked) / len(ranked),
        reference_rewards=[*task.reference_rewards, *sweep.reference.rewards],
        sweep=sweep,
    )
