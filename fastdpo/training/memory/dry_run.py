"""One training step on tensors without storage, which measures its peak memory without a formula per architecture.

In: a model made by `shape_only`, and the shape of a packed row. Out: the bytes beyond the weights at the peak of
forward and backward, by part. Layers, autocast, adapters and checkpointing run the model's own code; attention and the
LM head, whose code reads values, are replaced by functions with the same allocations. Nothing is computed and no weight
is read. Of layers that are alike, a few may stand for all (`folding`).
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fastdpo.data.batches.varlen import varlen_layout
from fastdpo.modeling.attention import Prefix
from fastdpo.modeling.attention.call import PackedLayout
from fastdpo.modeling.backbone import backbone, bare_model
from fastdpo.modeling.embedding import EmbeddingGradient
from fastdpo.modeling.head import lm_head
from fastdpo.modeling.mixers import MixerRows, mixers_of
from fastdpo.modeling.prepared import is_prepared, unprepare_model
from fastdpo.modeling.prompt_once import Continued
from fastdpo.modeling.tiles import find_tiles, install_tiles, only_first_tiles
from fastdpo.training.memory.dry_ops import DryExperts, DryGroup, dry_attention, head_loss
from fastdpo.training.memory.folding import Fold, Marks, decoder_layers, only_folded, peak_of, unfolded_peak
from fastdpo.training.memory.quantized import dry_quantized, is_quantized

PARTS = ("casts", "gradients", "head", "activations")
# For models with recurrent states: rows that measure the operations per token, and the largest number of operations to
# run, a few seconds. Longer rows are extrapolated linearly from shorter ones.
TRIED_TOKENS, MOST_OPS = ((16, 32), (256, 512)), 10_000
_DRY_ATTENTION = "fastdpo_dry_run"


@dataclass(frozen=True)
class RowShape:
    """The shape of one micro-batch, as far as it affects memory."""

    segments: tuple[tuple[int, int, int, int], ...]  # as in PackedBatch
    num_rows: int  # hidden states that go through the LM head, of this process
    sequences: tuple[int, int] | None = None  # (S, L) of a padded batch, which has no segments
    num_processes: int = 1  # that compute the row together
    num_prompt: int = 0  # tokens of a prompt that runs once, if this is a part of a row; segments count them

    @property
    def num_tokens(self) -> int:
        return self.sequences[0] * self.sequences[1] if self.sequences else self.segments[-1][1]

    @property
    def largest_group(self) -> int:
        """About how many hidden states for the LM head one group has at most: in proportion to its tokens."""
        starts = [start for start, _, _, prefix_end in self.segments if prefix_end == 0]
        if len(starts) < 2:
            return self.num_rows
        longest = max(end - start for start, end in pairwise([*starts, self.num_tokens]))
        return math.ceil(self.num_rows * longest / self.num_tokens)

    def shortened(self, share: float) -> RowShape:
        """The same number of sequences and branches, each with a share of its tokens, at least one."""

        def part(length: int) -> int:
            return max(round(length * share), min(length, 1))

        if self.sequences:
            return RowShape((), part(self.num_rows), (self.sequences[0], part(self.sequences[1])))
        segments: list[tuple[int, int, int, int]] = []
        starts: dict[int, int] = {}  # of a branch, where it starts when all are shorter
        for start, end, prefix_start, prefix_end in self.segments:
            at = starts[start] = segments[-1][1] if segments else 0
            prefix, first = part(prefix_end - prefix_start), starts[prefix_start] if prefix_end else 0
            segments.append((at, at + part(end - start), first, first + prefix))
        return RowShape(tuple(segments), part(self.num_rows))


@dataclass(frozen=True)
class StepPeak:
    """Bytes beyond the weights at the peak; the parts add up to the total."""

    casts: int  # copies of weights in autocast's dtype
    gradients: int  # of the weights, as far as they are there
    head: int  # the head op's workspace, dH, and dW until it becomes the weight's gradient
    activations: int  # everything else

    @property
    def total(self) -> int:
        return self.casts + self.gradients + self.head + self.activations


def fake_mode() -> Any:
    """The fake-tensor mode for making and running a shape-only model."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def shape_only(model: nn.Module, mode: Any, fold: Fold | None = None) -> nn.Module:
    """A copy of the model whose weights have shapes and dtypes but no memory. Quantized layers become stand-ins, see
    `fastdpo.training.memory.quantized`. With a fold, the copy has only the layers that run.
    """
    with mode, only_folded(model, fold):
        memo: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            empty: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_weight = isinstance(tensor, nn.Parameter) and tensor.dtype.is_floating_point
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_weight else empty
        memo |= {id(module): dry_quantized(module) for module in model.modules() if is_quantized(module)}
        dry: nn.Module = copy.deepcopy(model, memo)
        bare = bare_model(dry)
        if is_prepared(bare):
            unprepare_model(bare)
    return dry


def assume_tiles(model: nn.Module, mode: Any, tile_rows: int, autocast: torch.dtype | None = None) -> bool:
    """Makes a model without numbers run in tiles, as far as its shapes show which modules can; False if none can.

    Recurrent layers do not show it, so that models with them are left as they are.
    """
    bare = bare_model(model)
    if getattr(bare, "_is_stateful", False):
        return False
    length = 41
    while 2 * length in {size for parameter in bare.parameters() for size in parameter.shape}:
        length += 1
    row = RowShape(((0, length, 0, 0), (length, 2 * length, 0, 1)), length)
    bare.train()
    with mode, DryExperts(), nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
        found, _ = find_tiles(bare, lambda: _hidden_states(bare, row, "varlen"), (1, 2 * length), by_numbers=False)
    if not any(p.dim() > 1 for name in found for p in bare.get_submodule(name).parameters()):
        return False
    install_tiles(bare, found, tile_rows)
    return True


def dry_step(
    model: nn.Module,
    row: RowShape,
    mode: Any,
    *,
    impl: str,
    varlen: bool,
    masked: bool = False,
    autocast: torch.dtype | None = None,
    accumulates: bool = False,
    with_grad: bool = True,
    workspace_bytes: int | None = None,
    update_bytes: Callable[[nn.Parameter], int] | None = None,
    fold: Fold | None = None,
) -> StepPeak:
    """The peak memory of forward and backward of one micro-batch, or of a forward alone.

    Args:
        model: from `shape_only`, or made under `mode`.
        impl: "triton" or "tiled"; determines the workspace of the head.
        varlen: whether attention is one call over gathered keys, or calls per branch.
        masked: whether the calls of branches have masks, as on a GPU.
        autocast: dtype of autocast; None for off.
        accumulates: whether gradients of an earlier micro-batch already exist.
        with_grad: False for a forward that saves nothing, as in evaluation and for a reference.
        update_bytes: of a weight that is updated in backward, where its gradient ends; None if none is.
        fold: the one that `shape_only` was given; the peak is that of the whole model. None for a part of a row whose
            prompt runs once.

    Raises:
        NotPeriodic: the model has to run without a fold.
    """
    settings: dict[str, Any] = {
        "impl": impl,
        "attention": "varlen" if varlen else "masked" if masked else "sdpa",
        "autocast": autocast,
        "accumulates": accumulates,
        "with_grad": with_grad,
        "workspace_bytes": workspace_bytes,
        "update_bytes": update_bytes,
        "fold": fold,
    }
    bare = bare_model(model)
    if not getattr(bare, "_is_stateful", False) and not getattr(mixers_of(bare), "names", ()):
        return _step(model, row, mode, **settings)[0]

    def step(tokens: int) -> tuple[int, StepPeak, int]:
        shorter = row.shortened(min(tokens / row.num_tokens, 1.0))
        return shorter.num_tokens, *_step(model, shorter, mode, **settings)

    # recurrent layers process tokens one by one, or in small chunks
    for few, more in TRIED_TOKENS:
        below, above = step(few), step(more)
        if above[0] == row.num_tokens:
            return above[1]
        if above[2] > 1.3 * below[2]:
            break
    ops_per_token = max(above[2] - below[2], 0) / (above[0] - below[0])
    if above[2] + ops_per_token * (row.num_tokens - above[0]) <= MOST_OPS:
        return _step(model, row, mode, **settings)[0]
    num_tokens = int(above[0] + (MOST_OPS - above[2]) / max(ops_per_token, 1e-9))
    if num_tokens > 2 * above[0]:
        below, above = step(num_tokens // 2), step(num_tokens)
    times = (row.num_tokens - below[0]) / (above[0] - below[0])
    parts = {name: (getattr(below[1], name), getattr(above[1], name)) for name in PARTS}
    return StepPeak(**{name: int(first + (second - first) * times) for name, (first, second) in parts.items()})


def _step(
    model: nn.Module,
    row: RowShape,
    mode: Any,
    *,
    impl: str,
    attention: str,
    autocast: torch.dtype | None,
    accumulates: bool,
    with_grad: bool,
    workspace_bytes: int | None,
    update_bytes: Callable[[nn.Parameter], int] | None,
    fold: Fold | None,
) -> tuple[StepPeak, int]:
    """Runs the step; also returns its number of operations."""
    bare = bare_model(model)
    model.train(with_grad)
    trained = [p for p in model.parameters() if p.requires_grad]
    with mode, _few_tiles():
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if accumulates else None
        live = _LiveBytes([*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)])
        context = nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
        hooks = [] if update_bytes is None else [live.update_in_backward(p, update_bytes(p)) for p in trained]
        marks = Marks()

        def loss_of_row(prefix: Prefix | None) -> Tensor:
            with context, torch.set_grad_enabled(with_grad):
                embedded = EmbeddingGradient(bare)
                with embedded.of_embedding():
                    hidden_states = _hidden_states(bare, row, attention, prefix=prefix).flatten(0, 1)
                # alive while the head runs, as in a forward of the model
                continued = hidden_states if prefix is None else prefix.with_last(hidden_states)
                rows = continued.index_select(0, torch.zeros(row.num_rows, dtype=torch.int64))
                with live.tagged("head"):
                    rows, weight, adapter_weight = lm_head(bare).operands(rows, split=with_grad)
                    weight, dtype = embedded.of_head(weight), autocast or weight.dtype
                    return head_loss(rows, weight, adapter_weight, dtype, impl, workspace_bytes, row.largest_group)

        with live, marks.kept(decoder_layers(bare) if fold is not None else (), live):
            if row.num_prompt:
                assert fold is None
                with context:
                    loss: Any = _loss_after_prompt(bare, row.num_prompt, attention, loss_of_row)
            else:
                loss = loss_of_row(None)
            forward_end = len(live.events)
            if loss.requires_grad:
                loss.backward()
        changes = live.changes([p.grad for p in trained if p.grad is not None and not accumulates])
        for hook in hooks:
            hook.remove()
        own = sum(p.numel() * p.element_size() for p in trained)
        for parameter in trained:
            parameter.grad = None
    num_ops = live.num_ops
    if fold is None:
        peak = peak_of(changes.cumsum(0))
    else:
        keeps_gradients = with_grad and not accumulates and update_bytes is None
        peak, more_ops = unfolded_peak(changes, fold, marks, forward_end, keeps_gradients)
        num_ops, own = num_ops + more_ops, own + fold.times * fold.trained_bytes
    parts = dict(zip(PARTS, map(int, peak), strict=True))
    return StepPeak(**{**parts, "gradients": parts["gradients"] + (own if accumulates else 0)}), num_ops


@contextmanager
def _few_tiles() -> Iterator[None]:
    """Context manager: two tiles of each module run, because the later ones allocate what the second does."""
    token = only_first_tiles.set(2)
    try:
        yield
    finally:
        only_first_tiles.reset(token)


def _loss_after_prompt(bare: Any, num_prompt: int, attention: str, loss_of_part: Callable[[Prefix], Tensor]) -> Tensor:
    """As `loss_after_prompt` of `modeling/prompt_once.py`, for two parts: the second one's backward meets the gradients
    that the first one's has left."""
    prefix, prompt = Prefix(num_prompt), RowShape(((0, num_prompt, 0, 0),), 0)
    with EmbeddingGradient(bare).of_embedding():
        prefix.last_hidden_state = _hidden_states(bare, prompt, attention, record=prefix)[0, -1:].clone()
    tensors = prefix.tensors()
    empty = prefix.of([torch.empty(0)] * len(tensors))

    def backward(leaves: Sequence[Tensor], grad: Tensor) -> None:
        for _ in range(2):
            loss_of_part(empty.of(leaves)).backward()

    loss: Tensor = Continued.apply(torch.zeros((), requires_grad=True), backward, *tensors)
    return loss


def _hidden_states(
    bare: Any, row: RowShape, attention: str, *, prefix: Prefix | None = None, record: Prefix | None = None
) -> Tensor:
    from transformers import AttentionInterface

    AttentionInterface.register(_DRY_ATTENTION, dry_attention)
    shape = row.sequences or (1, (row.num_tokens - row.num_prompt) // row.num_processes)
    ids = torch.zeros(shape, dtype=torch.int64)
    layout: dict[str, Any] = {}
    if not row.sequences:
        group = None if row.num_processes == 1 else DryGroup(row.num_processes)
        about: dict[str, Any] = {"group": group, "prefix": prefix, "record": record}
        packed = PackedLayout(row.segments, varlen_layout(row.segments), attention, **about)
        layout = {"position_ids": ids, "packed_layout": packed}
    mixers = mixers_of(bare)
    if mixers is not None:  # found on the model that this one has the shapes of
        mixers.install(bare)
        mixers.rows = None if row.sequences else MixerRows(row.segments, layout["packed_layout"].varlen)
    configs = {id(m.config): m.config for m in bare.modules() if hasattr(getattr(m, "config", None), "model_type")}
    for config in configs.values():
        config._attn_implementation_internal = _DRY_ATTENTION
    hidden_states: Tensor = backbone(bare)(input_ids=ids, use_cache=False, **layout).last_hidden_state
    if record is not None:
        packed.record = None
    return hidden_states


class _LiveBytes(DryExperts):
    """Records when each storage is created and released."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.events: list[tuple[int, int, str]] = []  # (number of the storage, bytes, tag); the end has bytes < 0
        self.numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.weights = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.count, self.tag, self.num_ops = 0, "", 0
        self.passing: set[int] = set()  # storages of gradients that end in backward

    def tagged(self, tag: str) -> Any:
        return _Tag(self, tag)

    def update_in_backward(self, parameter: nn.Parameter, num_bytes: int) -> Any:
        """Ends the parameter's gradient when it is whole, after an allocation of `num_bytes`; returns the hook."""

        def update(whole: Tensor) -> None:
            assert whole.grad is not None
            self.passing.add(self.numbers.get(whole.grad.untyped_storage(), -1))
            with self.tagged("gradients"):
                torch.empty(num_bytes, dtype=torch.uint8)
            whole.grad = None

        return parameter.register_post_accumulate_grad_hook(update)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_ops += 1
        result = super().__torch_dispatch__(func, types, args, kwargs)
        tag = self.tag
        if not tag and func is torch.ops.aten._to_copy.default and args[0].untyped_storage() in self.weights:
            tag = "casts"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage(), tag or "activations")
        return result

    def _see(self, storage: Any, tag: str) -> None:
        if storage in self.numbers or storage in self.weights:
            return
        number, size = self.count, storage.nbytes()
        self.count += 1
        self.numbers[storage] = number
        self.events.append((number, size, tag))
        weakref.finalize(storage, self.events.append, (number, -size, tag)).atexit = False

    def changes(self, gradients: Sequence[Tensor]) -> Any:
        """(E, parts) bytes that each event adds to a part, those of a release below 0.

        Storages that become gradients of weights count as gradients.
        """
        final = {self.numbers.get(gradient.untyped_storage()) for gradient in gradients} | self.passing
        changes = np.zeros((len(self.events), len(PARTS)), dtype=np.int64)
        for place, (number, size, tag) in enumerate(self.events):
            changes[place, PARTS.index("gradients" if number in final else tag)] = size
        return changes


class _Tag:
    def __init__(self, live: _LiveBytes, tag: str) -> None:
        self.live, self.tag = live, tag

    def __enter__(self) -> None:
        self.live.tag = self.tag

    def __exit__(self, *_: Any) -> None:
        self.live.tag = ""
