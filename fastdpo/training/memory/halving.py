"""Runs micro-batches, and runs those that do not fit into memory again in halves.

In: the micro-batches of a batch, the rows that they were made of, and a function that runs one of them. Out: their
losses. Gradients and metrics are those of the whole batch: what a failed attempt has left behind is removed.
`out_of_memory.py` decides what is halved, or run in parts of a row, and refuses what cannot be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from fastdpo.training.inputs.collator import Example
from fastdpo.training.memory.out_of_memory import OutOfMemory, Piece, is_out_of_memory
from fastdpo.training.memory.row_parts import FirstPass, KnownWeights, RowPart

# forward and backward of a micro-batch: the model, the micro-batch, and the items of its optimizer step give the loss
Step = Callable[[nn.Module, dict[str, Any], Any], Tensor]


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
    ) -> list[Tensor]:
        """The losses of a batch's micro-batches after their backward.

        Args:
            parts: the micro-batches.
            rows: the rows of each; None if they are not known.
            dataset: the prepared dataset, for the number of a row that does not fit.
            without_step: the context of all micro-batches but the last, in which no weight changes.
        """
        pieces = [piece for pair in zip(parts, rows, strict=True) for piece in self.out_of_memory.fitting(Piece(*pair))]
        losses: list[Tensor] = []
        while pieces:
            piece, pieces = pieces[0], pieces[1:]
            if row_parts := self.out_of_memory.parts(piece):
                pieces = [*self._weighed(model, piece, row_parts, dataset, "train")[0], *pieces]
                continue
            with without_step(model) if pieces else nullcontext():
                loss = self._tried(step, model, piece, num_items)
            if isinstance(loss, str):
                pieces = [*self.out_of_memory.after(piece, loss, dataset, "train"), *pieces]
                self._repeat(step, model)
            else:
                losses.append(loss)
        return losses

    def evaluate(
        self,
        model: nn.Module,
        loss_of: Callable[[dict[str, Any]], Tensor],
        part: dict[str, Any],
        rows: tuple[Example, ...] | None,
        dataset: Any,
    ) -> list[Tensor]:
        """The losses of the pieces of one micro-batch, without a backward."""
        pieces = self.out_of_memory.fitting(Piece(part, rows))
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
        """The parts of a row with their weights, after the first pass; in smaller parts if that does not fit."""
        while True:
            try:
                known = self.first_pass(model, piece.inputs, parts)
                return [Piece.of_part(*pair) for pair in zip(parts, known, strict=True)], known
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
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
            if not is_out_of_memory(error):
                raise
            return str(error).partition("\n")[0]
        else:
            for record in self._held or ():
                record()
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
