"""The embedding's part in backward, without the tensors that autograd would keep for it.

In: a bare causal LM. Out: its embedding's rows and its head's weight, differentiable as before.

- A weight that embedding and LM head share has one gradient of its size, instead of two that are added. The head's
  waits for the backward of the embedding, which adds the rows of its tokens in blocks of the vocabulary. Every element
  is the sum of the same two numbers as in autograd. Weights that are sharded or offloaded are left alone.
- Rows of a frozen embedding that a hook makes require a gradient, as transformers does for checkpointing, are no leaf
  of the graph: autograd would keep them, and their gradient, until backward ends.

torch.compile gets the embedding as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdpo.modeling.head import shards_weights

BLOCK_ELEMENTS = 2**24  # of the embedding's gradient at once: 64 MiB of fp32


class EmbeddingGradient:
    """The embedding in one forward, and the head's gradient until the embedding's backward."""

    def __init__(self, model: Any) -> None:
        self.embedding: Any = model.get_input_embeddings()
        self.is_tied = _is_tied(model)
        self.is_embedded = False  # whether the embedding's backward will take the head's gradient
        self.gradient: Tensor | None = None

    @contextmanager
    def of_embedding(self) -> Iterator[None]:
        """Context manager for the embedding's call."""
        if not _is_recorded():
            yield
            return
        handle = self.embedding.register_forward_hook(_without_leaf)  # after those that are there
        try:
            with self._adding() if self.is_tied else nullcontext():
                yield
        finally:
            handle.remove()

    @contextmanager
    def _adding(self) -> Iterator[None]:
        """Context manager: the embedding adds to the head's gradient."""
        own, before = self.embedding.forward, vars(self.embedding).get("forward")

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Lookups(self):
                return own(*args, **kwargs)

        self.embedding.forward = forward
        try:
            yield
        finally:
            if before is None:
                del self.embedding.forward
            else:
                self.embedding.forward = before

    def of_head(self, weight: Tensor) -> Tensor:
        """The weight, whose gradient waits for the embedding's if they are the same."""
        if not self.is_embedded or weight is not self.embedding.weight:
            return weight
        given: Tensor = _Waiting.apply(weight, self)
        return given

    def take(self) -> Tensor | None:
        self.is_embedded, gradient, self.gradient = False, self.gradient, None
        return gradient


def _is_tied(model: Any) -> bool:
    """Whether the head trains the embedding's weight too, a plain one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or embedding.weight is not getattr(head, "weight", None):
        return False
    weight = embedding.weight
    is_plain = type(weight) is nn.Parameter and type(weight.data) is Tensor and not hasattr(embedding, "_hf_hook")
    is_usual = not embedding.sparse and not embedding.scale_grad_by_freq and embedding.max_norm is None
    return is_plain and is_usual and _is_recorded() and weight.requires_grad and not shards_weights(model)


def _without_leaf(module: nn.Module, args: Any, rows: Any) -> Any:
    """A forward hook: rows of which an earlier hook has made a leaf are none."""
    if not (isinstance(rows, Tensor) and rows.is_leaf and rows.requires_grad):
        return rows
    return _Anchored.apply(rows.detach(), torch.empty(0, requires_grad=True))


def _is_recorded() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Lookups(TorchFunctionMode):
    """Replaces the lookup in a shared weight by `_Lookup`."""

    def __init__(self, tied: EmbeddingGradient) -> None:
        super().__init__()
        self.tied = tied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding and len(args) > 1 and args[1] is self.tied.embedding.weight:
            return _Lookup.apply(*args[:2], self.tied)
        return func(*args, **(kwargs or {}))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids, weight, tied):  # type: ignore[override]
        ctx.save_for_backward(ids)
        ctx.shape, ctx.tied, tied.is_embedded = weight.shape, tied, True
        return F.embedding(ids, weight, tied.embedding.padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        gradient = ctx.tied.take()
        if gradient is None:
            gradient = grad.new_zeros(ctx.shape)
        _add_rows(gradient, ids, grad, ctx.tied.embedding.padding_idx)
        return None, gradient, None


class _Anchored(torch.autograd.Function):
    """The rows as they are, with a graph that ends here."""

    @staticmethod
    def forward(ctx: Any, rows, anchor):  # type: ignore[override]
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None


class _Waiting(torch.autograd.Function):
    """The weight itself; its gradient goes to the embedding's backward if that is still to come."""

    @staticmethod
    def forward(ctx: Any, weight, tied):  # type: ignore[override]
        ctx.tied = tied
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        if not ctx.tied.is_embedded:
            return grad, None
        ctx.tied.gradient = grad
        return None, None


def _add_rows(gradient: Tensor, ids: Tensor, grad: Tensor, padding_idx: int | None) -> None:
    """Adds the gradient of an embedding, (V, H), in blocks of rows; the row of `padding_idx` gets none."""
    V, H = gradient.shape
    block = max(1, BLOCK_ELEMENTS // H)
    for first in range(0, V, block):
        size = min(block, V - first)
        is_here = (ids >= first) & (ids < first + size)
        if padding_idx is not None:
            is_here &= ids != padding_idx
        places = (ids - first).where(is_here, size)  # the row after the block takes what lies elsewhere: nothing
        rows = torch.ops.aten.embedding_dense_backward(grad, places, size + 1, size, False)
        gradient[first : first + size] += rows[:size]
