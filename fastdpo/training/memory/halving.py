"""Runs micro-batches, and runs those that do not fit into memory again in halves.

In: the micro-batches of a batch, the rows that they were made of, and a function that runs one of them. Out: their
losses. Gradients and metrics are those of the whole batch: what a failed attempt has left behind is removed.
`out_of_memory.py` decides what is halved, or run in parts of a row, and refuses what cannot be.

Processes with a copy of the model each (DDP) halve by themselves. They meet in the backward that reduces gradients, the
last one of a step, which cannot be repeated. So a micro-batch of a size that has not fitted before runs without
reducing, and so does a row in parts whose prompt runs once, because its backward has others inside. A small one that
counts for nothing then follows, and its backward reduces the gradients of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.allocation import is_out_of_memory
from fastdpo.modeling.attention import PrefixRefused
from fastdpo.training.inputs.collator import Example
from fastdpo.training.memory.out_of_memory import OutOfMemory, OwnItems, Piece
from fastdpo.training.memory.row_parts import FirstPass, KnownWeights, RowPart

# forward and backward of a micro-batch: the model, the micro-batch, and the items of its optimizer step give the loss
Step = Callable[[nn.Module, dict[str, Any], Any], Tensor]
FOR_NOTHING = "for_nothing"  # key of a micro-batch that runs only to keep this process in step with the others


class Halving:
    """Runs the micro-batches of one trainer.

    Args:
        out_of_memory: what has not fitted so far.
        first_pass: the forward of a row in parts, which gives each part its weights and records the row's metrics.
        steps_in_backward: whether the optimizer steps in backward, which cannot be repeated then.
    """

    def __init__(self, out_of_memory: OutOfMemory, first_pass: FirstPass, *, steps_in_backward: bool) -> None:
        self.out_of_memory, self.steps_in_backward = out_of_memory, steps_in_backward
        self.first_pass = first_pass
        self._done: list[tuple[dict[str, Any], Any]] = []  # micro-batches of this optimizer step, and its items
        self._held: list[Callable[[], None]] | None = None  # what to record once the backward under way has ended
        self._was_in_backward = False  # when memory ran out
        self._most = 0  # tokens of the largest micro-batch that has fitted
        self._smallest: Piece | None = None  # that has fitted

    def train(
        self,
        step: Step,
        model: nn.Module,
        parts: Sequence[dict[str, Any]],
        rows: Sequence[tuple[Example, ...] | None],
        *,
        num_items: Tensor | int,
        dataset: Any,
        without_step: Callable[[nn.Module], AbstractContextManager[Any]],
        own_items: OwnItems | None = None,
        reduces: bool = False,
    ) -> list[Tensor]:
        """The losses of a batch's micro-batches after their backward.

        Args:
            parts: the micro-batches.
            rows: the rows of each; None if they are not known.
            dataset: the prepared dataset, for the number of a row that does not fit.
            without_step: the context of all micro-batches but the last, in which no weight changes.
            own_items: for a batch in which accelerate has repeated rows.
            reduces: whether the last backward reduces gradients over processes with copies of the model.
        Raises:
            ValueError: memory has run out, and a micro-batch cannot be halved.
        """
        whole = [Piece(*pair, own_items=own_items) for pair in zip(parts, rows, strict=True)]
        pieces = [piece for one in whole for piece in self.out_of_memory.fitting(one)]
        losses: list[Tensor] = []
        first, is_reduced = pieces[0], not reduces
        while pieces:
            piece, pieces = pieces[0], pieces[1:]
            if row_parts := self.out_of_memory.parts(piece):
                pieces = [*self._weighed(model, piece, row_parts, dataset, "train")[0], *pieces]
                continue
            fits = piece.num_tokens <= self._most and not piece.pieces  # with a backward inside its backward
            is_last = not pieces and (not reduces or fits)
            with nullcontext() if is_last else without_step(model):
                loss = self._tried(step, model, piece, num_items)
            if isinstance(loss, str):
                if is_last and reduces and self._was_in_backward:
                    self._refuse_reduced(piece, loss)
                pieces = [*self.out_of_memory.after(piece, loss, dataset, "train"), *pieces]
                with without_step(model):
                    self._repeat(step, model)
            else:
                losses.append(loss)
                is_reduced |= is_last
        if not is_reduced:
            self._reduce(step, model, first, num_items)
        return losses

    def _reduce(self, step: Step, model: nn.Module, piece: Piece, num_items: Tensor | int) -> None:
        """Reduces the gradients of the step over the processes, in the backward of a micro-batch that counts for
        nothing: the smallest that has fitted, or a row of this step's if that is smaller."""
        smallest = min(
            (found for found in (self._smallest, self.out_of_memory.smallest(piece)) if found is not None),
            key=lambda found: found.num_tokens,
        )
        device = smallest.inputs["input_ids"].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # a resumed run does this anew
            loss = self._tried(step, model, Piece({**smallest.inputs, FOR_NOTHING: True}, None), num_items)
        if isinstance(loss, str):
            self._refuse_reduced(smallest, loss)

    def _refuse_reduced(self, piece: Piece, reason: str) -> None:
        raise ValueError(
            f"max_tokens_per_microbatch must be smaller: a micro-batch of {piece.num_tokens:,} tokens has run out of"
            " memory while processes were reducing gradients, which cannot be repeated, although this size has fitted"
            f" before ({reason})"
        )

    def evaluate(
        self,
        model: nn.Module,
        loss_of: Callable[[dict[str, Any]], Tensor],
        part: dict[str, Any],
        rows: tuple[Example, ...] | None,
        dataset: Any,
        own_items: OwnItems | None = None,
    ) -> list[Tensor]:
        """The losses of the pieces of one micro-batch, without a backward."""
        pieces = self.out_of_memory.fitting(Piece(part, rows, own_items=own_items))
        losses: list[Tensor] = []
        while pieces:
            piece, pieces = pieces[0], pieces[1:]
            if row_parts := self.out_of_memory.parts(piece):
                _, known = self._weighed(model, piece, row_parts, dataset, "evaluation")
                losses.extend(weights.loss for weights in known)
                continue
            try:
                losses.append(loss_of(piece.inputs))
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            pieces = [*self.out_of_memory.after(piece, reason, dataset, "evaluation"), *pieces]
        return losses

    def _weighed(
        self, model: nn.Module, piece: Piece, parts: list[RowPart], dataset: Any, name: str
    ) -> tuple[list[Piece], list[KnownWeights]]:
        """The micro-batches of a row, after the first pass, and the weights of its parts; in smaller parts if that does
        not fit."""
        while True:
            num_prompt = self.out_of_memory.shared_prompt(parts)
            try:
                known = self.first_pass(model, piece.inputs, parts, num_prompt)
                pieces = [Piece.of_part(*pair) for pair in zip(parts, known, strict=True)]
                return [Piece.of_parts(pieces)] if num_prompt else pieces, known
            except RuntimeError as error:
                if not _cannot_run(error):
                    raise
                reason = str(error).partition("\n")[0]
            if num_prompt:
                self.out_of_memory.repeat_prompt(num_prompt, reason)
                continue
            largest = max((Piece.of_part(part, None) for part in parts), key=lambda part: part.num_tokens)
            self.out_of_memory.after(largest, reason, dataset, name)
            parts = self.out_of_memory.parts(piece)

    def record(self, record: Callable[[], None]) -> None:
        """Calls `record`, which adds the results of a forward to the metrics, once its backward has ended too."""
        if self._held is None:
            record()
        else:
            self._held.append(record)

    def end_step(self) -> None:
        """Call this when the gradients of an optimizer step are complete, and before the first one."""
        self._done.clear()

    def _tried(self, step: Step, model: nn.Module, piece: Piece, num_items: Tensor | int) -> Tensor | str:
        """The loss of a micro-batch after its backward, or why it does not fit into memory. Only a micro-batch that has
        come to its end leaves metrics behind."""
        self._held = None if self.steps_in_backward else []
        try:
            loss = step(model, piece.inputs, num_items)
        except RuntimeError as error:  # not kept: its frames hold the activations
            if not _cannot_run(error):
                raise
            self._was_in_backward = bool(self._held) or piece.part is not None or FOR_NOTHING in piece.inputs
            _keep_buffers(model)
            return str(error).partition("\n")[0]
        else:
            for record in self._held or ():
                record()
            self._most = max(self._most, piece.num_tokens)
            is_whole = piece.part is None and not piece.pieces
            if is_whole and (self._smallest is None or piece.num_tokens < self._smallest.num_tokens):
                self._smallest = piece
            if not self.out_of_memory.cannot_split:
                self._done.append((piece.inputs, num_items))
            return loss
        finally:
            self._held = None

    def _repeat(self, step: Step, model: nn.Module) -> None:
        """Computes the gradient of this step so far again: a backward that ran out of memory has added a part of its
        own."""
        model.zero_grad(set_to_none=True)
        for inputs, num_items in self._done:
            self._held = []
            step(model, inputs, num_items)
        self._held = None


def _cannot_run(error: RuntimeError) -> bool:
    """Whether a micro-batch can run in smaller ones instead."""
    return is_out_of_memory(error) or isinstance(error, PrefixRefused)


def _keep_buffers(model: nn.Module) -> None:
    """DDP sends the first process's buffers at the beginning of a step's first forward: not again when it is repeated,
    since the others do not wait for them."""
    ddp = getattr(model, "_orig_mod", model)  # of a compiled one
    if hasattr(ddp, "require_forward_param_sync"):
        ddp.require_forward_param_sync = False
