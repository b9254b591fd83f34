"""What a run's log says of its result: the metrics worth a row in the model card and in the report, and whose they are.

In: `trainer.state.log_history`. One evaluation dataset logs as `eval_loss`, several as `eval_<name>_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# in the order of the rows, by key of the log; what a run does not have is left out
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
    """The entries of training and of each evaluation, in order, with the keys of training and their step.

    `eval_seen_loss` becomes `loss` of "evaluation, seen"; sources that logged nothing are left out.
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
