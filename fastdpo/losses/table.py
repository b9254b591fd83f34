"""Generates the table of losses in docs/losses.md from their declared facts: `python -m fastdpo.losses.table`."""

from __future__ import annotations

from fastdpo.losses import LOSSES
from fastdpo.losses.registry import UNITS


def losses_table() -> str:
    """Markdown: name, formula and source, what the loss is a mean over, whether it has a reference, settings."""
    rows = ["| `loss_type` | what it computes | mean over | reference | settings |", "|---|---|---|---|---|"]
    for name, loss in LOSSES.items():
        settings = ", ".join(f"`{setting}`" for setting in loss.settings)
        reference = "yes" if loss.reference and loss.unit != "token" else "no"
        about = loss.about.replace("|", r"\|")
        rows.append(f"| `{name}` | {about} | {UNITS[loss.unit]} | {reference} | {settings} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(losses_table())
