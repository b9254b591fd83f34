"""Replays the saved batch of a loss that was not finite: where the first bad number appears, and what the rows say.

In: the file that a run saved (`nonfinite_batch_rank0.pt`) and a model. Out: a `Replay`: the log-prob of every sequence
as the run had it, as the model gives it now in the run's precision, and in fp64 by the reference implementation; the
modules in the order in which they ran with the numbers that are not finite; the text of every sequence.
Refused with ValueError: a file that a run did not save, a batch whose token ids the model does not have. The file is
loaded without unpickling objects.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.packed import packed_logps
from fastdpo.modeling.prepared import run_mixers_packed
from fastdpo.types import PackedBatch


@dataclass(frozen=True)
class BadBatch:
    """What a run saved."""

    batch: PackedBatch
    sums: dict[str, Tensor]  # (S,) log-probs of "policy" and "reference" in the run, nats
    step: int
    loss: float
    settings: dict[str, Any]  # bf16, fp16, impl, attention_backend, loss_type, beta


@dataclass(frozen=True)
class ModuleOutput:
    """The output of one module in a forward."""

    name: str
    num_bad: int  # numbers that are not finite
    size: int
    largest: float  # of the finite numbers, in size
    rows: tuple[int, ...] = ()  # the first positions of the batch with a bad number


@dataclass(frozen=True)
class SequenceReplay:
    """One prompt with one response."""

    side: str  # "chosen of pair 0", or "sequence 0" if no pair holds it
    prompt: str
    response: str
    num_tokens: int  # counted ones
    of_run: float | None  # log-probs in nats; None if the run did not save it
    reference_of_run: float | None
    replayed: float
    exact: float | None  # in fp64; None if the weights cannot be fp64


@dataclass(frozen=True)
class Replay:
    """The result."""

    sequences: list[SequenceReplay]
    modules: list[ModuleOutput]
    bad_weights: list[str] = field(default_factory=list)  # parameters with a number that is not finite

    @property
    def first_bad(self) -> ModuleOutput | None:
        """The first module, in the order of the forward, whose output holds a number that is not finite."""
        return next((module for module in self.modules if module.num_bad), None)


def load_bad_batch(path: str | Path) -> BadBatch:
    """Reads the file.

    Raises:
        ValueError: it does not exist, or no run saved it.
    """
    wrong = f"file must be the nonfinite_batch_rank*.pt that a run saved, got {path}"
    if not Path(path).is_file():
        raise ValueError(f"{wrong}, which does not exist")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        bad = BadBatch(
            PackedBatch(**saved["inputs"]), saved.get("sums", {}), saved["step"], saved.get("loss", math.nan),
            saved.get("settings", {}),
        )  # fmt: skip
        _check(bad)
        return bad
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"{wrong} ({first or type(error).__name__})") from None


def _check(bad: BadBatch) -> None:
    """Raises TypeError or IndexError for a file that has the names of a batch, but not its kinds of values."""
    batch = bad.batch
    for name in ("pairs", "input_ids", "position_ids", "logit_rows", "labels", "token_rows", "cu_seqlens"):
        if not isinstance(getattr(batch, name), Tensor):
            raise TypeError(f"{name} is no tensor")
    if not (isinstance(bad.settings, dict) and isinstance(bad.sums, dict) and isinstance(batch.segments, tuple)):
        raise TypeError("settings, sums or segments are of another type")
    if not all(isinstance(sums, Tensor) for sums in bad.sums.values()):
        raise TypeError("sums hold no tensors")
    for name, size in (("logit_rows", batch.input_ids.numel()), ("token_rows", len(batch.labels))):
        rows = getattr(batch, name)
        if ((rows < 0) | (rows >= size)).any():
            raise IndexError(f"{name} must be in [0, {size})")


@torch.no_grad()
def replay(model: nn.Module, bad: BadBatch, tokenizer: Any, *, device: torch.device | str = "cpu") -> Replay:
    """Runs the batch again.

    Args:
        model: as loaded, in fp32; its weights become fp64, where they can.
    Raises:
        ValueError: the batch has token ids that the model does not have.
    """
    batch = bad.batch.to(device)
    model.eval()
    if batch.is_packed:
        run_mixers_packed(model)  # its probes are forwards too, which are not to be looked at
    settings = bad.settings
    dtype = torch.float16 if settings.get("fp16") else torch.bfloat16
    is_mixed = bool(settings.get("fp16") or settings.get("bf16"))
    with (
        torch.autocast(torch.device(device).type, dtype=dtype, enabled=is_mixed),
        _outputs_of(model, batch) as modules,
    ):
        replayed = packed_logps(model, batch, impl=settings.get("impl", "auto")).sequences.sums
    bad_weights = [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    exact = _exact_sums(model, batch)
    return Replay(_sequences(bad, replayed, exact, tokenizer), modules, bad_weights)


def _exact_sums(model: nn.Module, batch: PackedBatch) -> Tensor | None:
    if getattr(model, "is_quantized", False):
        return None
    return packed_logps(model.double(), batch, impl="reference").sequences.sums


@contextmanager
def _outputs_of(model: nn.Module, batch: PackedBatch) -> Iterator[list[ModuleOutput]]:
    """Collects the outputs of every module while the model runs, those inside another one before it."""
    found: list[ModuleOutput] = []
    num_positions = batch.input_ids.numel()

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            numbers = output[0] if isinstance(output, tuple) and output else output
            if isinstance(numbers, Tensor) and numbers.is_floating_point() and numbers.numel():
                found.append(_looked_at(name, numbers, num_positions))

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _looked_at(name: str, numbers: Tensor, num_positions: int) -> ModuleOutput:
    is_bad = ~numbers.isfinite()
    finite = numbers.where(~is_bad, torch.zeros_like(numbers))
    rows: tuple[int, ...] = ()
    if is_bad.any() and numbers.dim() > 1 and numbers.numel() % num_positions == 0:
        by_position = is_bad.reshape(num_positions, -1).any(1)
        rows = tuple(by_position.nonzero()[:8, 0].tolist())
    return ModuleOutput(name, int(is_bad.sum()), numbers.numel(), float(finite.abs().max()), rows)


def _sequences(bad: BadBatch, replayed: Tensor, exact: Tensor | None, tokenizer: Any) -> list[SequenceReplay]:
    batch = bad.batch
    sides: dict[int, str] = {}
    for number, (chosen, rejected) in enumerate(batch.pairs.tolist()):
        sides.setdefault(chosen, f"chosen of pair {number}")
        sides.setdefault(rejected, f"rejected of pair {number}")
    found = []
    for index in range(batch.num_sequences):
        prompt, response = sequence_ids(batch, index)
        found.append(
            SequenceReplay(
                side=sides.get(index, f"sequence {index}"),
                prompt=tokenizer.decode(prompt),
                response=tokenizer.decode(response),
                num_tokens=len(response),
                of_run=_at(bad.sums.get("policy"), index),
                reference_of_run=_at(bad.sums.get("reference"), index),
                replayed=float(replayed[index]),
                exact=None if exact is None else float(exact[index]),
            )
        )
    return found


def _at(values: Tensor | None, index: int) -> float | None:
    return None if values is None or index >= len(values) else float(values[index])


def sequence_ids(batch: PackedBatch, index: int) -> tuple[list[int], list[int]]:
    """The tokens before the first counted one of a sequence, and its counted tokens."""
    start, end = batch.cu_seqlens[index : index + 2].tolist()
    rows = batch.token_rows[start:end]
    if len(rows) == 0:
        return [], []
    return _tokens_up_to(batch, int(batch.logit_rows[rows[0]])), batch.labels[rows].tolist()


def _tokens_up_to(batch: PackedBatch, position: int) -> list[int]:
    """The tokens that the position sees, itself included."""
    ids: Sequence[int] = batch.input_ids.flatten().tolist()
    if not batch.is_packed:
        row = position // batch.input_ids.shape[1] * batch.input_ids.shape[1]
        return list(ids[row : position + 1])
    start, _, first, last = next(s for s in batch.segments if s[0] <= position < s[1])
    return [*ids[first:last], *ids[start : position + 1]]
