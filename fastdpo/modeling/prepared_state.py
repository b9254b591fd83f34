"""What a prepared model has of its own, and the switch between packed batches and all other calls.

A packed batch sets its attention and does not reset it, because gradient checkpointing runs the layers again in
backward, outside the model's forward. Every other call, including generation, uses the model's original attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from fastdpo.modeling.attention import (
    PACKED_ATTENTION,
    PACKED_ATTENTION_WITH_MASKS,
    PACKED_ATTENTIONS,
    PackedLayout,
)
from fastdpo.modeling.mixers import MixerRows, OwnAttention, mixers_of
from fastdpo.modeling.sequence_group import SequenceGroup

STATE = "_fastdpo_state"  # attribute of a prepared model


@dataclass
class PreparedState:
    """The changes of `fastdpo.modeling.prepared.prepare_model`, its settings, and what undoes them."""

    attentions: list[OwnAttention]
    forward: Callable[..., Any]  # as the model had it
    generate: Callable[..., Any] | None
    own_methods: dict[str, Any]  # those of the two that were instance attributes
    backbone: str  # name of the decoder among the model's modules
    counting: list[str]  # names of its modules that count rows unless they get positions
    attention_backend: str = "auto"
    excluded_backends: dict[str, str] = field(default_factory=dict)  # that the self-check has found wrong here, and how
    masks: str = "none"  # kind of mask for the model, found by the self-check
    skip_tolerance: float = 0.0  # of the head op, as the next one
    workspace_bytes: int | None = None
    sequence_group: SequenceGroup | None = None  # that computes batches with shares


def set_attention(state: PreparedState, *, packed: bool) -> None:
    name = PACKED_ATTENTION if state.masks == "none" else PACKED_ATTENTION_WITH_MASKS
    for own in state.attentions:
        if own.config._attn_implementation not in PACKED_ATTENTIONS:  # the model's own, perhaps changed since
            own.original = own.config._attn_implementation
        own.config._attn_implementation_internal = name if packed else own.original


def set_mixers(model: Any, layout: PackedLayout | None) -> None:
    mixers = mixers_of(model)
    if mixers is None:
        return
    mixers.rows = None
    if layout is not None and mixers.names:
        mixers.rows = MixerRows(layout.segments, layout.varlen)
        mixers.keep_rows_for_backward(model)


@contextmanager
def as_it_came(model: Any) -> Iterator[None]:
    """Context manager that restores the model's original attention and mixers for one call."""
    mixers = mixers_of(model)
    with attention_as(getattr(model, STATE), packed=False), nullcontext() if mixers is None else mixers.running(None):
        yield


@contextmanager
def attention_as(state: PreparedState, *, packed: bool) -> Iterator[None]:
    """Context manager that sets packed or original attention for a while."""
    was_packed = any(own.config._attn_implementation in PACKED_ATTENTIONS for own in state.attentions)
    set_attention(state, packed=packed)
    try:
        yield
    finally:
        set_attention(state, packed=was_packed)
