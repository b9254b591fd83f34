"""Tokens that ran before a row and that all of its branches continue: their keys and values in every layer.

A row that is recorded fills a `Prefix`. The layout of a row that continues it counts the prefix's tokens as rows before
its own, so that backends see keys of both. Refused: layers that run twice in a forward, and a forward without the graph
that was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class PrefixRefused(RuntimeError):
    """The model's keys and values cannot be recorded."""


@dataclass
class Prefix:
    """What P tokens leave behind for rows that continue them."""

    num_tokens: int  # P
    layers: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (1, num_kv_heads, P, D), (..., P, E)
    last_hidden_state: Tensor | None = None  # (1, H), it predicts the first token of each continuation
    has_graph: bool = field(default_factory=torch.is_grad_enabled)

    def add(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Records a layer.

        Raises:
            PrefixRefused: it has more than one set of keys, or none with a graph, as under reentrant checkpointing.
        """
        if module in self.layers:
            raise PrefixRefused(f"{type(module).__name__} attends more than once in a forward")
        if self.has_graph and not torch.is_grad_enabled():
            raise PrefixRefused(f"{type(module).__name__} runs without a graph, as reentrant checkpointing does it")
        self.layers[module] = key, value

    def before(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix and of the rows after it."""
        of_prefix = self.layers[module]
        return torch.cat([of_prefix[0], key], dim=2), torch.cat([of_prefix[1], value], dim=2)

    def with_last(self, hidden_states: Tensor) -> Tensor:
        """(1 + T, H): the hidden state that predicts the first token of the rows, and theirs (T, H)."""
        assert self.last_hidden_state is not None
        return torch.cat([self.last_hidden_state, hidden_states])

    def tensors(self) -> list[Tensor]:
        assert self.last_hidden_state is not None
        return [*(tensor for layer in self.layers.values() for tensor in layer), self.last_hidden_state]

    def of(self, tensors: Sequence[Tensor]) -> Prefix:
        """The prefix with other tensors, in the order of `tensors`."""
        layers = {module: (tensors[2 * i], tensors[2 * i + 1]) for i, module in enumerate(self.layers)}
        return Prefix(self.num_tokens, layers, tensors[-1])
