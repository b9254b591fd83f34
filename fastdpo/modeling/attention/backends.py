"""The attention backends by name, and the choice for a call: the first allowed backend that can run it.

auto    the fastest suitable backend: flash-attn, then torch's varlen_attn, then SDPA
flash   flash-attn, any installed and suitable generation
flash2, flash3, flash4, varlen, sdpa, mask    this backend, or ValueError with the missing feature
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdpo.modeling.attention.call import AttentionCall, UnsupportedAttention
from fastdpo.modeling.attention.sdpa import BranchSdpa, RowMask
from fastdpo.modeling.attention.varlen import FlashAttn, TorchVarlen


class Backend(Protocol):
    """One way to compute attention over a packed row."""

    @property
    def title(self) -> str: ...

    def refusal(self, call: AttentionCall) -> str | None:
        """The reason why this backend cannot run the call exactly; None if it can."""
        ...

    def attend(self, call: AttentionCall) -> Tensor:
        """(1, T, num_heads, E), differentiable in query, key and value."""
        ...


BACKENDS: dict[str, Backend] = {
    "flash3": FlashAttn(3, capabilities=(8, 9)),
    "flash4": FlashAttn(4, capabilities=(9, 99), max_head_dim=128),
    "flash2": FlashAttn(2, capabilities=(8, 99)),
    "varlen": TorchVarlen(),
    "sdpa": BranchSdpa(),
    "mask": RowMask(),
}
_FLASH = ("flash3", "flash4", "flash2")  # 3 before 4: on Hopper, where both run, it is the faster one
_CANDIDATES = {"auto": (*_FLASH, "varlen", "sdpa"), "flash": _FLASH, **{name: (name,) for name in BACKENDS}}
ATTENTION_BACKENDS = tuple(_CANDIDATES)


class CallShape(NamedTuple):
    """The properties of a layer that matter to a kernel; layers that share them are equal to it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype  # of the inputs
    device: torch.device
    scale: float
    window: int | None  # the model's argument, even if no branch of the row is longer
    softcap: float | None
    sinks: bool | None  # None: it has none; whether they want a gradient


@dataclass
class Observed:
    """The attention calls of a model, recorded for the self-check."""

    windows: set[Any] = field(default_factory=set)  # as handed over, None for layers without
    backends: dict[str, str] = field(default_factory=dict)  # name -> why it was chosen
    shapes: dict[CallShape, str] = field(default_factory=dict)  # and the backend that ran it
    num_calls: int = 0
    num_masks: int = 0  # calls that were handed a mask, which says all that limits them
    failed: str | None = None  # the backend that raised

    @contextmanager
    def running(self, name: str, reason: str, call: AttentionCall, window: int | None) -> Iterator[None]:
        """Context manager around a call of a backend; records the call, and the backend if it fails."""
        query, sinks = call.query, call.sinks
        shape = CallShape(
            num_heads=query.shape[1],
            num_kv_heads=call.key.shape[1],
            head_dim=query.shape[-1],
            value_dim=call.value.shape[-1],
            dtype=query.dtype,
            device=query.device,
            scale=call.scale,
            window=window,
            softcap=call.softcap,
            sinks=None if sinks is None else sinks.requires_grad,
        )
        self.backends[name], self.shapes[shape] = reason, name
        try:
            yield
        except Exception:
            self.failed = name
            raise


observed: ContextVar[Observed | None] = ContextVar("observed", default=None)


def choose(call: AttentionCall) -> tuple[str, str]:
    """Name of the backend that runs the call, and the reason.

    Raises:
        UnsupportedAttention: no backend allowed by the layout's setting can run the call.
    """
    asked = call.layout.backend
    refusals: dict[str, list[str]] = {}  # reason -> backends
    for name in _CANDIDATES[asked]:
        refusal = (name != asked and call.layout.excluded.get(name)) or BACKENDS[name].refusal(call)
        if refusal is None:
            return name, "asked for" if name == asked else _listed(refusals)
        refusals.setdefault(refusal, []).append(name)
    raise UnsupportedAttention(
        f"attention_backend {asked!r} cannot run this model here: {_listed(refusals)}; 'auto' selects one that can"
    )


def can_do_without(name: str, asked: str, excluded: Iterable[str]) -> bool:
    """Whether the setting `asked` allows another backend besides this one and the excluded ones."""
    return bool(set(_CANDIDATES[asked]) - {name, *excluded})


def _listed(refusals: dict[str, list[str]]) -> str:
    """'flash2 is not installed; varlen runs on cuda only', backends with one reason together."""
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in refusals.items()) or "the first choice"
