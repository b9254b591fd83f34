"""Runs one position-wise module over tiles of rows, forward and backward, so that the wide tensors inside it exist for
one tile only.

In: a module's own forward, its arguments, and where they hold rows. Out: its output over all rows. Backward runs the
forward of each tile again, with a graph, and adds up the gradients of the weights tile by tile, in a fixed order, fp32
for 16-bit weights. Between forward and backward only the arguments are kept.

Two nodes of autograd do this. `_Start` saves the arguments and comes first in forward, `_Outputs` runs the tiles and
saves nothing:

    arguments, weights -> _Start -> token () -> _Outputs -> outputs

Inside a checkpointed layer, recomputation ends with the last saved tensor. If the module is the last of its layer, as
MLPs are, it ends before the tiles run, so each tile runs forward twice in total, as without tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastdpo.modeling.autocast import autocast_of
from fastdpo.ops.eager import even_chunks

# The number of tiles that run, for tensors without storage: all tiles allocate the same.
only_first_tiles: ContextVar[int | None] = ContextVar("fastdpo_only_first_tiles", default=None)
MULTIPLE = 64  # of the rows of a tile, if tile_rows is one: matrix units take that many at a time


@dataclass(frozen=True)
class RowLeaves:
    """Where a module's arguments and outputs hold rows: numbers of leaves, and how many first dimensions are rows."""

    inputs: dict[int, int]
    num_inputs: int
    outputs: dict[int, int]


def run_in_tiles(
    module: nn.Module, forward: Callable[..., Any], rows: RowLeaves, tile_rows: int, args: Any, kwargs: Any
) -> Any:
    """The module's output; one plain call for at most `tile_rows` rows, and for arguments of another form than those of
    the trial, such as the last token alone in generation."""
    leaves, spec = tree_flatten((args, kwargs))
    shape = _shape_of_rows(leaves, rows)
    if shape is None or math.prod(shape) <= tile_rows:
        return forward(*args, **kwargs)
    num_rows = math.prod(shape)
    call = _Call(module, forward, rows, spec, shape, list(even_chunks(slice(0, num_rows), tile_rows, MULTIPLE)))
    for number, depth in rows.inputs.items():
        leaves[number] = leaves[number].reshape(*call.lead(depth), *leaves[number].shape[depth:])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    trained = [p for p in module.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *trained)):
        call.autocast = autocast_of(tensors[0].device.type)
        call.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        call.places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        token = _Start.apply(call, len(tensors), *tensors, *trained)
        outputs = _Outputs.apply(token, call, [x.detach() if isinstance(x, Tensor) else x for x in leaves])
    else:
        outputs = call.outputs(leaves)
    assert call.out_leaves is not None
    assert call.out_spec is not None
    found = list(call.out_leaves)
    for (number, depth), output in zip(rows.outputs.items(), outputs, strict=True):
        lead = shape if depth == len(shape) else (num_rows,)
        found[number] = output.reshape(*lead, *output.shape[depth:])
    return tree_unflatten(found, call.out_spec)


def _shape_of_rows(leaves: Sequence[Any], rows: RowLeaves) -> tuple[int, ...] | None:
    """(T,), or (S, L) for rows in two dimensions; None if the arguments do not all have these rows."""
    if len(leaves) != rows.num_inputs or not all(isinstance(leaves[number], Tensor) for number in rows.inputs):
        return None
    shapes = {tuple(leaves[number].shape[:depth]) for number, depth in rows.inputs.items()}
    shape = max(shapes, key=len)
    return shape if all(math.prod(other) == math.prod(shape) for other in shapes) else None


class _Call:
    """One call of a module over tiles, without its tensors."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        rows: RowLeaves,
        spec: TreeSpec,
        shape: tuple[int, ...],
        tiles: list[slice],
    ) -> None:
        self.module, self.forward, self.rows, self.spec, self.shape = module, forward, rows, spec, shape
        limit = only_first_tiles.get()
        self.num_rows, self.tiles = math.prod(shape), tiles if limit is None else tiles[:limit]
        self.autocast: dict[str, Any] = {}
        self.others: list[Any] = []  # arguments that are no tensors; None where a tensor belongs
        self.places: list[int] = []  # numbers of the tensors among the arguments
        self.out_leaves: list[Any] | None = None
        self.out_spec: TreeSpec | None = None
        self.grads: tuple[Tensor | None, ...] = ()  # of the outputs, from `_Outputs` to `_Start`

    def lead(self, depth: int) -> tuple[int, ...]:
        """The first dimensions of all rows in one row of a batch."""
        return (1, self.num_rows) if depth == 2 else (self.num_rows,)

    def run(self, leaves: Sequence[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(leaves, self.spec)
        found, spec = tree_flatten(self.forward(*args, **kwargs))
        if self.out_leaves is None:
            self.out_leaves = [None if n in self.rows.outputs else leaf for n, leaf in enumerate(found)]
            self.out_spec = spec
        return [found[number] for number in self.rows.outputs]

    def tile(self, leaves: Sequence[Any], tile: slice) -> list[Any]:
        return [
            _part(leaf, self.rows.inputs[number], tile) if number in self.rows.inputs else leaf
            for number, leaf in enumerate(leaves)
        ]

    def outputs(self, leaves: Sequence[Any]) -> tuple[Tensor, ...]:
        """The outputs over all rows, without a graph. No tile's output is kept beside the whole one."""
        whole: list[Tensor] = []
        for tile in self.tiles:
            parts = self.run(self.tile(leaves, tile))
            if not whole:
                depths = self.rows.outputs.values()
                whole = [
                    part.new_empty(*self.lead(depth), *part.shape[depth:])
                    for part, depth in zip(parts, depths, strict=True)
                ]
            for output, part, depth in zip(whole, parts, self.rows.outputs.values(), strict=True):
                _part(output, depth, tile).copy_(part)
        return tuple(whole)


def _part(rows: Tensor, depth: int, tile: slice) -> Tensor:
    return rows[:, tile] if depth == 2 else rows[tile]


class _Start(torch.autograd.Function):
    """Keeps the arguments; its backward is that of the tiles."""

    @staticmethod
    def forward(ctx: Any, call: _Call, num_tensors: int, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.call, ctx.num_tensors = call, num_tensors
        ctx.save_for_backward(*tensors[:num_tensors])
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:  # type: ignore[override]
        call, saved, needed = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[2:]
        of_arguments, of_weights = _backward(call, saved, needed[: ctx.num_tensors])
        weights = iter(of_weights)
        of_trained = [next(weights) if wanted else None for wanted in needed[ctx.num_tensors :]]
        return (None, None, *of_arguments, *of_trained)


class _Outputs(torch.autograd.Function):
    """Runs the tiles without a graph."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, call: _Call, leaves: list[Any]) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.call = call
        ctx.set_materialize_grads(False)
        outputs = call.outputs(leaves)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        ctx.call.grads = grads
        device = next(grad.device for grad in grads if grad is not None)
        return torch.zeros((), device=device), None, None


def _backward(call: _Call, saved: Sequence[Tensor], needed: Sequence[bool]) -> tuple[list[Any], list[Tensor]]:
    """Gradients of the arguments that need one, and of all trained weights of the module."""
    grads, call.grads = call.grads, ()
    leaves = list(call.others)
    found: list[Tensor | None] = []
    shared: dict[int, Tensor] = {}  # arguments without rows that get a gradient
    for place, tensor, wanted in zip(call.places, saved, needed, strict=True):
        leaves[place] = tensor
        is_row = place in call.rows.inputs
        found.append(torch.empty_like(tensor) if wanted and is_row else None)
        if wanted and not is_row:
            leaves[place] = shared[place] = tensor.detach().requires_grad_()
    depths = call.rows.outputs.values()
    with _own_weights(call.module) as weights, _Sums([*weights, *shared.values()]) as sums:
        for tile in call.tiles:
            parts = call.tile(leaves, tile)
            filled = [(place, whole) for place, whole in zip(call.places, found, strict=True) if whole is not None]
            for place, _ in filled:
                parts[place] = parts[place].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(**call.autocast):
                outputs = call.run(parts)
            pairs = [
                (output, _part(grad, depth, tile))
                for output, grad, depth in zip(outputs, grads, depths, strict=True)
                if grad is not None and output.requires_grad
            ]
            del outputs
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
            del pairs
            for place, whole in filled:
                own = parts[place].grad
                part = _part(whole, call.rows.inputs[place], tile)
                part.zero_() if own is None else part.copy_(own)
        totals = sums.totals()
        of_shared = dict(zip(shared, totals[len(weights) :], strict=True))
        of_weights = totals[: len(weights)]
    return [of_shared.get(place, whole) for place, whole in zip(call.places, found, strict=True)], of_weights


class _Sums:
    """Sums of the gradients of leaves over several backward passes: fp32 for 16-bit ones."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.sums: dict[int, Tensor] = {}

    def __enter__(self) -> _Sums:
        self.handles = [
            tensor.register_post_accumulate_grad_hook(self._add) for tensor in self.tensors if tensor.itemsize < 4
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _add(self, tensor: Tensor) -> None:
        assert tensor.grad is not None
        if id(tensor) in self.sums:
            self.sums[id(tensor)].add_(tensor.grad)
        else:
            self.sums[id(tensor)] = tensor.grad.float()
        tensor.grad = None

    def totals(self) -> list[Tensor]:
        """In the dtype of each leaf; zeros where no gradient came."""
        found = (self.sums.get(id(tensor), tensor.grad) for tensor in self.tensors)
        return [
            torch.zeros_like(tensor) if total is None else total.to(tensor.dtype)
            for tensor, total in zip(self.tensors, found, strict=True)
        ]


@contextmanager
def _own_weights(module: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager: the module's trained weights are leaves of their own, so that hooks on the weights (DDP's,
    FSDP's, an optimizer's) run once, with the sum over all tiles. In the order of `module.parameters()`."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                places.setdefault(parameter, []).append((owner, name))
    leaves = {parameter: parameter.detach().requires_grad_() for parameter in places}
    try:
        for parameter, owners in places.items():
            for owner, name in owners:
                owner._parameters[name] = leaves[parameter]  # type: ignore[assignment]
        yield list(leaves.values())
    finally:
        for parameter, owners in places.items():
            for owner, name in owners:
                owner._parameters[name] = parameter
