"""`fastdpo plan --pair_tokens N`: what a pair of that length takes with each setting, and the smallest GPU for it.

In: estimates of every candidate at that length, and the GPU's memory if one is named. Out: a table or JSON records, and
the commands to type. Refuses lengths that fit no setting on that GPU, or on the largest usual one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from fastdpo.cli.plan_names import GB, gigabytes, kept_activations, seconds_text, training_name
from fastdpo.training.memory.card.plans import CARDS, USABLE_SHARE, Plan, Timed, fastest, smallest_card


def fitting_plans(plans: Sequence[Plan], memory: int | None, model: str, tokens: int) -> list[Plan]:
    """Those that fit the GPU, or the largest usual one.

    Raises:
        ValueError: none does.
    """
    most = CARDS[-1] if memory is None else memory
    fitting = [plan for plan in plans if plan.estimate.total <= most * USABLE_SHARE]
    if not fitting:
        least = min(plans, key=lambda plan: plan.estimate.total)
        raise ValueError(
            f"pair_tokens must be fewer for {most / GB:g}GB, got {tokens}: {model} takes"
            f" {least.estimate.total / USABLE_SHARE / GB:.1f}GB for it, with {training_name(least.settings)},"
            f" checkpointing ({kept_activations(least.settings)}), {least.settings.optim}; with --on_oversized_row"
            " split only the longest sequence has to fit, and several GPUs (--gpus) share a model"
        )
    return fitting


def length_table(timed: Sequence[Timed], memory: int | None) -> Table:
    """All settings with the memory that they need; those that do not fit are dim."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("train", "checkpointing", "reference", "optim"):
        table.add_column(name, no_wrap=True)
    for name in ("needs", "smallest GPU", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan, seconds in timed:
        settings, card = plan.settings, smallest_card(plan.estimate.total)
        is_dim = plan.estimate.total > (CARDS[-1] if memory is None else memory) * USABLE_SHARE
        table.add_row(
            training_name(settings),
            kept_activations(settings),
            settings.reference,
            settings.optim,
            gigabytes(int(plan.estimate.total / USABLE_SHARE)),
            f"over {CARDS[-1] / GB:g} GB" if card is None else f"{card / GB:g} GB",
            seconds_text(seconds),
            style="dim" if is_dim else None,
        )
    return table


def fastest_of_smallest_cards(fitting: Sequence[Timed], memory: int | None) -> list[tuple[int, Plan]]:
    """What to type: (bytes of a GPU, plan) of each method, the fastest on the GPU that is named, or else on the
    smallest GPU that takes the method."""
    found = []
    for method in dict.fromkeys(plan.settings.method for plan, _ in fitting):
        own = [one for one in fitting if one[0].settings.method == method]
        card = memory or smallest_card(min(plan.estimate.total for plan, _ in own))
        assert card is not None  # it fits the largest
        (best,) = fastest([one for one in own if one[0].estimate.total <= card * USABLE_SHARE])
        found.append((card, best))
    return sorted(found, key=lambda pair: pair[0])


def length_record(plan: Plan, memory: int | None, lora_r: int) -> dict[str, Any]:
    """One setting in JSON, besides its own fields."""
    needed = int(plan.estimate.total / USABLE_SHARE)
    card = smallest_card(plan.estimate.total)
    return {
        "fits": plan.estimate.total <= (CARDS[-1] if memory is None else memory) * USABLE_SHARE,
        "pair_tokens": plan.tokens,
        "needed_bytes": needed,
        "smallest_gpu_bytes": card,
        "options": plan.options(lora_r),
    }
