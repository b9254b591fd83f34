"""The results in a run's log: the metrics that model card and report show, by training and evaluation dataset.

In: `trainer.state.log_history`. One evaluation dataset logs as `eval_loss`, several as `eval_<name>_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# key of the log -> name, in the order of the table's rows; a run without a metric has no row for it
RESULTS = {
    "loss": "Loss",
    "rewards/accuracies": "Accuracy of pairs",
    "rewards/margins": "Reward margin",
    "rewards/chosen": "Reward, chosen",
    "rewards/rejected": "Reward, rejected",
    "rewards/weight": "Gradient weight",
    "logps/chosen": "Log-prob, chosen",
    "logps/rejected": "Log-prob, rejected",
    "aux_loss": "Load-balancing loss",
    "entropy": "Entropy per token",
    "mean_token_accuracy": "Accuracy of tokens",
}


def logs_by_source(history: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The log entries of training and of each evaluation, in order, with their step. All use training's keys.

    For example, `eval_seen_loss` becomes `loss` of "evaluation, seen". Sources without entries are left out.
    """
    prefixes = {"training": ""}
    for entry in history:
        for key in entry:
            if key.startswith("eval_") and key.endswith("_runtime"):  # Trainer writes one for every evaluation
                name = key.removeprefix("eval_").removesuffix("runtime").removesuffix("_")
                prefixes[f"evaluation, {name}" if name else "evaluation"] = key.removesuffix("runtime")
    found = {
        source: [
            {"step": entry["step"], **{key: entry[prefix + key] for key in RESULTS if prefix + key in entry}}
            for entry in history
            if f"{prefix}loss" in entry
        ]
        for source, prefix in prefixes.items()
    }
    return {source: entries for source, entries in found.items() if entries}
