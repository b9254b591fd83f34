"""How the tables and pictures of `fastdpo plan` name settings and sizes."""

from __future__ import annotations

from fastdpo.training.memory.plan import Settings

GB = 1e9


def training_name(settings: Settings) -> str:
    bf16 = " bf16" if settings.weight_rounding != "nearest" else ""
    return f"{settings.method}{bf16}{', in backward' if settings.in_backward else ''}"


def kept_activations(settings: Settings) -> str:
    """How activations are kept, in the column of checkpointing."""
    if not settings.checkpointing:
        return "off"
    return "on" + (", tiles" if settings.tiles else "") + (", on host" if settings.offload else "")


def gigabytes(size: int) -> str:
    return f"{size / GB:.1f}" if size < 100 * GB else f"{size / GB:.0f}"
