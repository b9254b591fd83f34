"""How the tables and pictures of `fastdpo plan` name settings and sizes."""

from __future__ import annotations

from fastdpo.training.memory.card.seconds import StepSeconds
from fastdpo.training.memory.card.settings import Settings

GB = 1e9
ON_GPUS = "No estimate has been compared with a GPU yet."


def training_name(settings: Settings) -> str:
    bf16 = " bf16" if settings.weight_rounding != "nearest" else ""
    return f"{settings.method}{bf16}{', in backward' if settings.in_backward else ''}"


def kept_activations(settings: Settings) -> str:
    """How activations are kept, in the column of checkpointing."""
    if not settings.checkpointing:
        return "off"
    if settings.every_n_layers > 1:
        return f"1 of {settings.every_n_layers} layers"
    more = ["tiles"] * settings.tiles + ["on host"] * settings.offload
    return ", ".join(more) or "on"


def gigabytes(size: int) -> str:
    return f"{size / GB:.1f}" if size < 100 * GB else f"{size / GB:.0f}"


def seconds_text(seconds: StepSeconds | None) -> str:
    return "" if seconds is None else f"{seconds.total:,.1f} s"
