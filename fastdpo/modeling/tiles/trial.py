"""Finds the modules of a model that compute each row from that row alone, by trial. There is no list of names.

In: a bare model, and a function that runs a few rows through it. Out: the largest such modules, and where their
arguments and outputs hold rows. A module is taken if

- its output over tiles of rows is its output over all rows, and does not change in one tile if the rows of another are
  reordered (values stay the same, so experts get as many tokens as before);
- two calls give the same numbers: a module that draws random numbers would draw others in backward;
- the gradients of a module of its kind, of arguments and weights, are the same over tiles, up to rounding;
- backward keeps more for it than its arguments, or makes more than their gradients: a plain linear layer gains nothing
  from tiles.

For tensors without storage there are no numbers: then a module without convolutions is taken if it gets neither
attention masks nor the layout of a packed row.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastdpo.modeling.backbone import backbone
from fastdpo.modeling.tiles.run import RowLeaves, run_in_tiles

_ROUNDING = 64  # units in the last place of the largest number
_MOST_FROM_ROUNDING = 0.05  # relative to the largest number: larger differences do not count as rounding
_MOST_COPIED = 10**9  # weights of a module that is tried as a fp32 copy
_LEAST_GAIN = 0.25  # bytes that backward takes beyond arguments and gradients, as a share of the arguments
_OF_ATTENTION = ("packed_layout", "attention_mask", "position_embeddings")  # arguments of modules that mix rows


@dataclass
class _Call:
    """The first call of a module, with copies of its arguments."""

    name: str
    module: nn.Module
    leaves: list[Any]
    spec: Any
    kwargs: frozenset[str]
    outputs: list[Any] = field(default_factory=list)
    children: list[_Call] = field(default_factory=list)

    def run(self, leaves: list[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(leaves, self.spec)
        return tree_flatten(self.module(*args, **kwargs))[0]


def find_tiles(
    bare: nn.Module, run: Callable[[], Any], shape: tuple[int, int], *, by_numbers: bool = True
) -> tuple[dict[str, RowLeaves], list[str]]:
    """The modules that can run in tiles, by name, and the kinds of the smallest modules that mix rows.

    Args:
        bare: without tiles, in the mode and precision of training.
        run: runs the backbone on a batch of `shape` (S, L). No weight may have a dimension of S * L.
        by_numbers: False for tensors without storage.
    """
    search = _Search(bare, shape, by_numbers)
    with torch.no_grad():
        calls, routed = _recorded(bare, run)
    found: dict[str, RowLeaves] = {}
    for call in calls:
        found.update(search.largest(call, routed))
    return found, sorted(search.mixing)


def _recorded(bare: Any, run: Callable[[], Any]) -> tuple[list[_Call], set[Any]]:
    """The calls of the backbone's direct submodules, each with the calls inside, and the storages of router logits."""
    decoder = backbone(bare)
    names = {module: name for name, module in bare.named_modules()}
    stack = [_Call("", decoder, [], None, frozenset())]
    known: set[nn.Module] = set()
    routed: set[Any] = set()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves, spec = tree_flatten((args, kwargs))
        copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        stack.append(_Call(names[module], module, copies, spec, frozenset(kwargs)))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = stack.pop()
        call.outputs = tree_flatten(output)[0]
        if module not in known:
            known.add(module)
            stack[-1].children.append(call)

    def at_end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for logits in getattr(output, "router_logits", None) or ():
            if isinstance(logits, Tensor):
                routed.add(logits.untyped_storage().data_ptr())

    modules = [module for module in decoder.modules() if module is not decoder]
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(after, with_kwargs=True) for module in modules]
    handles.append(decoder.register_forward_hook(at_end, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return stack[0].children, routed


class _Search:
    def __init__(self, bare: nn.Module, shape: tuple[int, int], by_numbers: bool) -> None:
        self.bare, self.shape, self.num_rows, self.by_numbers = bare, shape, shape[0] * shape[1], by_numbers
        self.mixing: set[str] = set()
        self.tried: dict[Any, tuple[bool, bool]] = {}  # kind of module -> gradients are the same, tiles gain something

    def largest(self, call: _Call, routed: set[Any]) -> Iterator[tuple[str, RowLeaves]]:
        """The largest modules in this call that can run in tiles and gain from it."""
        rows = self._rows(call)
        is_routed = bool(routed) and any(_is_routed(inner, routed) for inner in _flat(call))
        if rows is not None and not is_routed:
            is_exact, gains = self._tried(call, rows) if self._is_by_row(call, rows) else (False, False)
            if is_exact:
                if gains:
                    yield call.name, rows
                return
        for child in call.children:
            yield from self.largest(child, routed)
        if rows is not None and self.mixing.isdisjoint(type(inner.module).__name__ for inner in _flat(call)):
            self.mixing.add(type(call.module).__name__)

    def _rows(self, call: _Call) -> RowLeaves | None:
        """Where the call holds rows; None if it is no call from rows to rows."""
        if hasattr(call.module, "gradient_checkpointing"):  # a layer: its checkpoint goes around tiles, not inside
            return None
        inputs = {n: depth for n, leaf in enumerate(call.leaves) if (depth := self._depth(leaf))}
        outputs = {n: depth for n, leaf in enumerate(call.outputs) if (depth := self._depth(leaf))}
        tensors = sum(isinstance(leaf, Tensor) for leaf in call.outputs)
        if not outputs or len(outputs) < tensors:
            return None
        if not any(call.leaves[number].is_floating_point() for number in inputs):
            return None
        return RowLeaves(inputs, len(call.leaves), outputs)

    def _depth(self, leaf: Any) -> int:
        """How many first dimensions of a tensor are its rows; 0 without rows."""
        if not isinstance(leaf, Tensor):
            return 0
        if leaf.dim() >= 2 and tuple(leaf.shape[:2]) == self.shape:
            return 2
        return 1 if leaf.dim() >= 2 and leaf.shape[0] == self.num_rows else 0

    def _is_by_row(self, call: _Call, rows: RowLeaves) -> bool:
        if not self.by_numbers:
            return not call.kwargs.intersection(_OF_ATTENTION) and not any(
                "conv" in type(module).__name__.lower() for module in call.module.modules()
            )
        try:
            with torch.no_grad(), _in_fp32_where_it_fits(call) as in_fp32:
                return self._same_in_tiles(in_fp32, rows)
        except Exception:  # whatever a module raises on fewer rows
            return False

    def _same_in_tiles(self, call: _Call, rows: RowLeaves) -> bool:
        def run(leaves: list[Any]) -> list[Tensor]:
            outputs = call.run([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
            return [self._flat_rows(outputs[number], depth) for number, depth in rows.outputs.items()]

        whole = run(call.leaves)
        if not _close(run(call.leaves), whole, whole, share=1 / 8):
            return False
        cut = self.num_rows // 3
        for own, other in ((slice(0, cut), slice(cut, None)), (slice(cut, None), slice(0, cut))):
            part = run([self._in_call(leaf, rows.inputs.get(n), own) for n, leaf in enumerate(call.leaves)])
            expected = [output[own] for output in whole]
            if not _close(part, expected, whole):
                return False
            moved = run([self._reversed(leaf, rows.inputs.get(n), other) for n, leaf in enumerate(call.leaves)])
            if not _close([output[own] for output in moved], expected, whole, share=1 / 8):
                return False
        return True

    def _flat_rows(self, tensor: Tensor, depth: int) -> Tensor:
        return tensor.flatten(0, 1) if depth == 2 else tensor

    def _in_call(self, leaf: Any, depth: int | None, rows: slice) -> Any:
        if depth is None:
            return leaf
        some = self._flat_rows(leaf, depth)[rows]
        return some[None] if depth == 2 else some

    def _reversed(self, leaf: Any, depth: int | None, rows: slice) -> Any:
        if depth is None:
            return leaf
        order = torch.arange(self.num_rows, device=leaf.device)
        order[rows] = order[rows].flip(0)
        return self._flat_rows(leaf, depth)[order].reshape(leaf.shape)

    def _tried(self, call: _Call, rows: RowLeaves) -> tuple[bool, bool]:
        """Whether the gradients over tiles are the same, and whether tiles save anything."""
        weights = [(tuple(p.shape), p.dtype, p.requires_grad) for p in call.module.parameters()]
        kind = (type(call.module), tuple(weights), tuple(rows.inputs.items()), tuple(rows.outputs.items()))
        if kind not in self.tried:
            try:
                self.tried[kind] = self._gradients(call, rows)
            except Exception:  # a module without a backward
                self.tried[kind] = (False, False)
        return self.tried[kind]

    def _gradients(self, call: _Call, rows: RowLeaves) -> tuple[bool, bool]:
        _, beyond = self._gradient(call, rows, None)
        gains = beyond > _LEAST_GAIN * sum(_bytes(call.leaves[number]) for number in rows.inputs)
        if not (self.by_numbers and gains):
            return True, gains
        with _in_fp32_where_it_fits(call) as in_fp32:
            plain, _ = self._gradient(in_fp32, rows, None)
            tiled, _ = self._gradient(in_fp32, rows, max(self.num_rows // 3, 1))
        eps = torch.finfo(torch.float32 if in_fp32 is not call else torch.bfloat16).eps
        return all(_close([a], [b], [b], eps=eps) for a, b in zip(tiled, plain, strict=True)), gains

    def _gradient(self, call: _Call, rows: RowLeaves, tile_rows: int | None) -> tuple[list[Tensor], int]:
        """Gradients of arguments and weights, and the bytes that backward takes beyond those and the arguments, weights
        and outputs: what is kept for it, and the most that it makes at once."""
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        wanted = [leaves[n].requires_grad_() for n in rows.inputs if leaves[n].is_floating_point()]
        weights = [parameter for parameter in call.module.parameters() if parameter.requires_grad]
        kept: dict[Any, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        args, kwargs = tree_unflatten(leaves, call.spec)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if tile_rows is None:
                output = call.module(*args, **kwargs)
            else:
                output = run_in_tiles(call.module, call.module.forward, rows, tile_rows, args, kwargs)
        found = tree_flatten(output)[0]
        outputs = [x for n in rows.outputs if (x := found[n]).is_floating_point() and x.requires_grad]
        known = [*leaves, *call.module.parameters(), *call.module.buffers(), *found]
        for tensor in known:
            if isinstance(tensor, Tensor):
                kept.pop(tensor.untyped_storage()._cdata, None)
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
        with _Made() as made:
            results = torch.autograd.grad(outputs, [*wanted, *weights], upstream, allow_unused=True)
        grads = [torch.zeros(()) if grad is None else grad for grad in results]
        return grads, sum(kept.values()) + max(made.most - sum(map(_bytes, grads)), 0)


class _Made(TorchDispatchMode):
    """Counts the most bytes of new tensors that exist at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.now = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.known.update(leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._release, storage.nbytes()).atexit = False
        return result

    def _release(self, size: int) -> None:
        self.now -= size


@contextmanager
def _in_fp32_where_it_fits(call: _Call) -> Iterator[_Call]:
    """Context manager: the call in fp32, where mixing cannot hide in rounding; as it is for quantized weights."""
    tensors = [*call.module.parameters(), *(leaf for leaf in call.leaves if isinstance(leaf, Tensor))]
    dtypes = {tensor.dtype for tensor in call.module.parameters()}
    fits = sum(p.numel() for p in call.module.parameters()) <= _MOST_COPIED
    if not (fits and all(dtype.is_floating_point and dtype.itemsize >= 2 for dtype in dtypes)):
        yield call
        return
    module = call.module
    if any(dtype.itemsize == 2 for dtype in dtypes):
        module = copy.deepcopy(module).float()
    leaves = [
        x.float() if isinstance(x, Tensor) and x.dtype.itemsize == 2 and x.is_floating_point() else x
        for x in call.leaves
    ]
    with torch.autocast(tensors[0].device.type, enabled=False):
        yield replace(call, module=module, leaves=leaves)


def _is_routed(call: _Call, routed: set[Any]) -> bool:
    """Whether an output is a router's logits, which the model's load-balancing loss reads."""
    return any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in routed for x in call.outputs)


def _flat(call: _Call) -> Iterator[_Call]:
    yield call
    for child in call.children:
        yield from _flat(child)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _close(
    found: list[Tensor], expected: list[Tensor], whole: list[Tensor], *, share: float = 1.0, eps: float = 0.0
) -> bool:
    """Whether differences are a share of what rounding to `eps` explains, in numbers of the size of `whole`."""
    for a, b, of in zip(found, expected, whole, strict=True):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        size = of.float().abs().max() if of.numel() else 0.0
        unit = max(torch.finfo(a.dtype).eps, eps)
        most = max(share * min(_ROUNDING * unit, _MOST_FROM_ROUNDING), 2 * unit) * size
        if a.numel() and not (a.float() - b.float()).abs().max() <= most:
            return False
    return True
