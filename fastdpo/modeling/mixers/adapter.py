"""Runs a token mixer over a packed row: rows are gathered into whole sequences, the module's own forward runs on them,
and the outputs are scattered back to the packed row.

The module runs the prefix again for each further branch; the prefix's gradient is the sum over all runs, in fp32.
Outside packed batches the module's forward is unchanged. Refuses calls on rows other than those of the packed batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.attention.gather import gather_keys
from fastdpo.modeling.mixers.arguments import has_rows, is_mask, is_table, leaves, mapped
from fastdpo.modeling.mixers.rows import MixerRows

_MIXERS = "_fastdpo_mixers"  # attribute of a model whose mixers are known
_ADAPTER = "_fastdpo_mixer"  # attribute of a module that is one
# arguments with the sequence boundaries; the module gets those of the gathered row, or whole sequences
_LAYOUT_ARGUMENTS = frozenset(
    {"packed_layout", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
)


@dataclass
class OwnAttention:
    """One config that a model's layers read, with its attention outside packed batches."""

    config: Any
    original: str

    @property
    def with_masks(self) -> str:
        """The model's own attention, or one that takes masks."""
        return self.original if self.original in ("eager", "sdpa") else "eager"


class Mixers:
    """The token mixers of one model, with the rows of its last packed batch.

    The rows are kept because gradient checkpointing runs layers again in backward, outside the model's forward.

    Names are those of `named_modules`.
    """

    def __init__(self, bare: nn.Module, attentions: Sequence[OwnAttention] = ()) -> None:
        self.attentions = list(attentions)  # that mixers use, where layers with attention are among them
        self.names: tuple[str, ...] = ()
        self.by_boundaries: set[str] = set()  # those that take a row of sequences in one call
        self.leaks: tuple[str, ...] = ()  # modules that mix tokens of one sequence into another and cannot be helped
        self.rows: MixerRows | None = None
        bare.__dict__[_MIXERS] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Mixers:
        """For a copy of the model: the same mixers without rows."""
        twin = memo[id(self)] = object.__new__(type(self))
        twin.names, twin.by_boundaries, twin.leaks, twin.rows = self.names, set(self.by_boundaries), self.leaks, None
        twin.attentions = copy.deepcopy(self.attentions, memo)
        return twin

    def add(self, bare: nn.Module, *names: str) -> None:
        self.names += tuple(name for name in names if name not in self.names)
        self.install(bare)

    def drop(self, bare: nn.Module, *names: str) -> None:
        self.remove(bare)
        self.names = tuple(name for name in self.names if name not in names)
        self.install(bare)

    def describe(self, bare: nn.Module) -> str:
        """'6 x Qwen3_5GatedDeltaNet over prefix and branch', with what runs once over the whole row."""
        kinds: dict[str, int] = {}
        for name in self.names:
            kind = type(bare.get_submodule(name)).__name__ + (", in one call" if name in self.by_boundaries else "")
            kinds[kind] = kinds.get(kind, 0) + 1
        return "; ".join(f"{count} x {kind}, over prefix and branch" for kind, count in kinds.items())

    def forget(self, bare: nn.Module) -> None:
        """Resets the state to before the search for mixers."""
        self.remove(bare)
        bare.__dict__.pop(_MIXERS, None)

    def install(self, bare: nn.Module) -> None:
        """Installs the adapters that are not installed."""
        modules = dict(bare.named_modules()) if self.names else {}
        if any(name not in modules for name in self.names):  # other modules have taken their places
            self.forget(bare)
            return
        for name in self.names:
            if _ADAPTER not in modules[name].__dict__:
                _wrap(modules[name], self, name)

    def remove(self, bare: nn.Module) -> None:
        """Removes the adapters; the names of their modules are kept for the next `install`."""
        self.rows = None
        for module in bare.modules():
            adapter: _Adapter | None = module.__dict__.get(_ADAPTER)
            if adapter is not None:
                del module.__dict__[_ADAPTER]
                module.__dict__.pop("forward", None)
                if adapter.is_own:  # an instance attribute already
                    module.__dict__["forward"] = adapter.forward

    @contextmanager
    def running(self, rows: MixerRows | None) -> Iterator[None]:
        """Context manager: mixers run on these rows, or with their own forward for None."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """Context manager: the layers of the model use its own attention, if any of them is a mixer."""
        before = [attention.config._attn_implementation for attention in self.attentions]
        for attention in self.attentions:
            attention.config._attn_implementation_internal = attention.with_masks
        try:
            yield
        finally:
            for attention, name in zip(self.attentions, before, strict=True):
                attention.config._attn_implementation_internal = name

    def keep_rows_for_backward(self, bare: nn.Module) -> None:
        """Keeps the rows of a forward for layers that run again in backward, even if other batches ran in between."""
        for module in bare.modules() if self.names else ():
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            if checkpoint is not None and not isinstance(checkpoint, _CheckpointWithRows):
                module.__dict__["_gradient_checkpointing_func"] = _CheckpointWithRows(checkpoint, self)


def mixers_of(bare: nn.Module) -> Mixers | None:
    """The mixers of a bare model that was searched for them."""
    found: Mixers | None = bare.__dict__.get(_MIXERS)
    return found


def own_forward(module: nn.Module) -> Callable[..., Any]:
    """The original forward of a mixer."""
    adapter: _Adapter = module.__dict__[_ADAPTER]
    return adapter.forward


class _CheckpointWithRows:
    def __init__(self, checkpoint: Callable[..., Any], mixers: Mixers) -> None:
        self.checkpoint, self.mixers = checkpoint, mixers

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows = self.mixers.rows

        def run(*inputs: Any, **named: Any) -> Any:
            with self.mixers.running(rows):
                return function(*inputs, **named)

        return self.checkpoint(run, *args, **kwargs)


class _Adapter:
    def __init__(self, name: str, mixers: Mixers, forward: Callable[..., Any], is_own: bool) -> None:
        self.name, self.mixers, self.forward, self.is_own = name, mixers, forward, is_own


def _wrap(module: nn.Module, mixers: Mixers, name: str) -> None:
    module.__dict__[_ADAPTER] = _Adapter(name, mixers, module.forward, "forward" in module.__dict__)
    module.__dict__["forward"] = MethodType(_forward, module)  # a bound method, so that a copy gets one of its own


@torch.compiler.disable  # which rows go together differs from batch to batch
def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    adapter: _Adapter = module.__dict__[_ADAPTER]
    rows = adapter.mixers.rows
    if rows is None:
        return adapter.forward(*args, **kwargs)
    if not any(has_rows(value, rows.num_rows) for value in leaves((args, kwargs))):
        raise ValueError(
            f"{adapter.name} must run on the {rows.num_rows} rows of the packed batch, got other rows: the model's own"
            " forward was bypassed"
        )
    kwargs = {name: value for name, value in kwargs.items() if name not in _LAYOUT_ARGUMENTS}
    if adapter.name in adapter.mixers.by_boundaries:
        return run_with_boundaries(adapter.forward, rows, args, kwargs)
    with adapter.mixers.own_attention():
        return run_sequences(adapter.forward, rows, args, kwargs)


def run_sequences(forward: Callable[..., Any], rows: MixerRows, args: Any, kwargs: Any) -> Any:
    """Runs one call per set of sequences of similar length, which are the rows of its batch."""
    gathered = mapped((args, kwargs), lambda tensor: _gather(tensor, rows))
    outputs = []
    for call in rows.calls:
        own_args, own_kwargs = mapped(gathered, methodcaller("of_call", call), _Gathered)
        outputs.append(forward(*own_args, **own_kwargs))
    return _scattered(outputs, [tuple(call.shape) for call in rows.calls], rows.kept)


def run_with_boundaries(forward: Callable[..., Any], rows: MixerRows, args: Any, kwargs: Any) -> Any:
    """Runs one call over all sequences in one row; the module's kernels respect the boundaries."""
    gathered = mapped((args, kwargs), lambda tensor: _gather(tensor, rows))
    own_args, own_kwargs = mapped(gathered, methodcaller("whole"), _Gathered)
    parameters = inspect.signature(forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    boundaries = {name: value for name, value in rows.boundaries.items() if takes_all or name in parameters}
    output = forward(*own_args, **own_kwargs, **boundaries)
    return _scattered([output], [(1, rows.varlen.key_rows.shape[0])], rows.kept_keys)


class _Gathered:
    """One argument with rows in the order of `VarlenLayout.key_rows`."""

    def __init__(self, rows: Tensor) -> None:
        self.tensor = rows  # (K, ...)

    def of_call(self, call: Tensor) -> Tensor:
        """The argument of a call (S, L): indices into the gathered rows."""
        return self.tensor.index_select(0, call.flatten()).unflatten(0, tuple(call.shape))

    def whole(self) -> Tensor:
        return self.tensor[None]


class _GatheredMask(_Gathered):
    """A mask (heads, K, K)."""

    def of_call(self, call: Tensor) -> Tensor:
        mask = self.tensor[:, call[:, :, None], call[:, None, :]].transpose(0, 1)  # (S, heads, L, L)
        # a last token that is repeated must not see its copies
        later = torch.ones(mask.shape[2:], dtype=torch.bool, device=mask.device).triu(1)
        return mask.masked_fill(later, torch.finfo(mask.dtype).min if mask.is_floating_point() else False)


class _Table(_Gathered):
    """Numbers (T, T) for pairs of rows; a sequence of L tokens gets those of the first L rows."""

    def of_call(self, call: Tensor) -> Tensor:
        return self.tensor[: call.shape[1], : call.shape[1]]

    def whole(self) -> Tensor:
        return self.tensor


def _gather(tensor: Tensor, rows: MixerRows) -> Any:
    if is_mask(tensor, rows.num_rows):
        return _GatheredMask(tensor[0][:, rows.varlen.key_rows[:, None], rows.varlen.key_rows])
    if is_table(tensor, rows.num_rows):
        return _Table(tensor)
    if not has_rows(tensor, rows.num_rows):
        return tensor
    if tensor.is_floating_point():
        return _Gathered(gather_keys(tensor[0], rows.varlen))
    return _Gathered(tensor[0].index_select(0, rows.varlen.key_rows))


def _scattered(outputs: list[Any], shapes: list[tuple[int, ...]], kept: Tensor) -> Any:
    """The calls' outputs as one output over the packed row; outputs without rows are taken from the last call."""
    first = outputs[0]
    if isinstance(first, Tensor) and all(x.shape[:2] == shape for x, shape in zip(outputs, shapes, strict=True)):
        return torch.cat([output.flatten(0, 1) for output in outputs]).index_select(0, kept)[None]
    if isinstance(first, tuple | list):
        parts = [_scattered(list(part), shapes, kept) for part in zip(*outputs, strict=True)]
        return tuple(parts) if isinstance(first, tuple) else parts
    return outputs[-1]
