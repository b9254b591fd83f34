"""Finds the token mixers of a model by trial: a model in, its Mixers out. There is no list of names.

The trial runs a short packed row of two sequences with one prefix and records the call of every module. If a module's
output in the second branch changes when the rows of the first branch are reordered, the module mixes tokens of one
sequence into another. If modules inside it cause this, these are the mixers; otherwise, and if it never calls the
attention interface, the module itself is a mixer. So the smallest possible module is wrapped: the convolution of an
attention layer, the delta net of a decoder layer.

Rows are reordered and values kept: each expert then gets as many tokens as before, so that "changes" can mean "in any
bit", however small the weights of a mixer are. A mixer that ignores the order is found by changed values.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.data.batches.varlen import varlen_layout
from fastdpo.modeling.attention import Observed, PackedLayout, masks_of, observed, stands_in
from fastdpo.modeling.attention.masks import copied
from fastdpo.modeling.backbone import backbone, text_ids
from fastdpo.modeling.head import execution_device
from fastdpo.modeling.mixers.adapter import Mixers, OwnAttention, own_forward, run_sequences
from fastdpo.modeling.mixers.arguments import has_rows, leaves, mapped
from fastdpo.modeling.mixers.rows import MixerRows
from fastdpo.modeling.positions import counting_modules, told_positions

# Tokens of the prefix, of two branches, and of another sequence. The long ones pass a chunk of 64 tokens.
_SHORT, _LONG = (6, 4, 5, 3), (37, 41, 45, 13)
_ROUNDING = 64  # units in the last place of the largest output
_MOST_FROM_ROUNDING = 0.05  # relative to a module's largest output: larger differences do not count as rounding
# Modules that compute each row independently. They are many, and hold most of the weights.
_ROW_BY_ROW = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity)


@dataclass
class _Call:
    """The first call of a module in a packed forward."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    children: list[_Call] = field(default_factory=list)
    num_attentions: int = 0  # calls of the attention interface in it; while it runs, those before it
    has_rows: bool = False  # in and out


@dataclass
class _Probe:
    """A packed row, and the rows of its first branch."""

    lengths: tuple[int, int, int, int]
    layout: PackedLayout
    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)

    @property
    def num_rows(self) -> int:
        return self.layout.segments[-1][1]

    def layout_arguments(self) -> dict[str, Any]:
        """The arguments of the backbone besides the tokens."""
        arguments: dict[str, Any] = {"position_ids": self.position_ids, "packed_layout": self.layout}
        if self.layout.backend == "mask":
            arguments["attention_mask"] = self.layout.row_mask(None)[None, None]
        return arguments

    @property
    def branch(self) -> slice:
        return slice(self.lengths[0], self.lengths[0] + self.lengths[1])

    @property
    def others(self) -> slice:
        return slice(self.branch.stop, None)

    def rows(self) -> MixerRows:
        return MixerRows(self.layout.segments, self.layout.varlen)


def find_mixers(
    bare: Any,
    backend: str = "sdpa",
    names: Sequence[str] | None = None,
    masks: str = "none",
    attentions: Sequence[OwnAttention] = (),
) -> Mixers | None:
    """Finds the token mixers of a bare model, and installs their adapters.

    Args:
        bare: a causal LM whose layers currently run packed attention.
        backend: attention backend, "sdpa" or "mask".
        names: names of the mixers, if they are known from a copy of the model.
        masks: kind of mask for models that ask for one.
        attentions: the model's own; given if layers with attention are to be mixers too.
    Returns:
        None if a packed forward raises; the packed batch itself then raises too.
    """
    mixers = Mixers(bare, attentions)
    modes = [(module, module.training) for module in bare.modules()]
    rotary = _rotary_states(bare)
    token = observed.set(Observed())  # whoever looks at the packed batch does not see the trial
    with torch.no_grad(), _deterministic():
        for module, _ in modes:
            module.training = False
        try:
            _search(bare, mixers, (backend, masks), names)
        except Exception:
            mixers.forget(bare)
            return None
        finally:
            observed.reset(token)
            for module, training in modes:
                module.training = training
            for module, state in rotary:
                for name, value in state.items():
                    setattr(module, name, value)
    return mixers


def _rotary_states(bare: Any) -> list[tuple[Any, dict[str, Any]]]:
    """The state of rotary embeddings that depends on the longest sequence; a trial must not change it."""
    names = ("max_seq_len_cached", "inv_freq", "attention_scaling")
    modules = [module for module in bare.modules() if hasattr(module, names[0])]
    return [(module, {name: getattr(module, name) for name in names if hasattr(module, name)}) for module in modules]


def _search(bare: Any, mixers: Mixers, attention: tuple[str, str], names: Sequence[str] | None) -> None:
    calls, trial = [], _Trial(bare, mixers, _probe(bare, _SHORT, *attention))
    if names is None:
        calls = trial.recorded()
        for call in calls:
            trial.wrap_mixers_in(call)
    else:
        mixers.add(bare, *names)
    if mixers.names:  # the kernels' boundaries and remaining leaks are tested on sequences longer than a chunk
        trial = _Trial(bare, mixers, _probe(bare, _LONG, *attention))
        calls = trial.recorded()
        for call in _flat(calls):
            if call.name in mixers.names and trial.keeps_boundaries(call):
                mixers.by_boundaries.add(call.name)
    mixers.leaks = tuple(trial.leaks(calls))


class _Trial:
    def __init__(self, bare: Any, mixers: Mixers, probe: _Probe) -> None:
        self.bare, self.mixers, self.probe = bare, mixers, probe

    def wrap_mixers_in(self, call: _Call) -> list[str]:
        """Installs adapters on the modules that mix sequences inside the module of `call`; returns their names."""
        if isinstance(call.module, _ROW_BY_ROW):
            return []
        found = [name for child in call.children for name in self.wrap_mixers_in(child)]
        if not call.has_rows:
            return found
        if call.num_attentions:
            # mixing outside attention in a layer with attention is a leak, unless the whole layer runs by sequence
            is_innermost = not any(child.num_attentions for child in call.children)
            return self.wrap(call, found) if self.mixers.attentions and is_innermost else found
        changes = self.changes(call, has_mixers=bool(found))
        if not (changes or (changes is None and found)):
            return found
        return self.wrap(call, found)

    def wrap(self, call: _Call, inside: list[str]) -> list[str]:
        """Installs the adapter of one module in place of those inside it."""
        self.mixers.drop(self.bare, *inside)
        self.mixers.add(self.bare, call.name)
        return [call.name]

    def leaks(self, calls: list[_Call]) -> Iterator[str]:
        """Mixers, and the largest modules around them, that still mix sequences with the adapters installed."""
        for call in calls:
            if not call.has_rows:
                yield from self.leaks(call.children)
                continue
            below = [inner for inner in _flat([call]) if inner.name in self.mixers.names]
            leaking = [mixer.name for mixer in below if self.changes(mixer)]
            has_mixers = bool(below) or call.num_attentions > 0
            yield from leaking or ([call.name] if self.changes(call, has_mixers=has_mixers) else [])

    def recorded(self) -> list[_Call]:
        """The calls of a packed forward of the backbone: those of its direct submodules, each with the calls inside."""
        decoder, num_rows, seen = backbone(self.bare), self.probe.num_rows, Observed()
        stack = [_Call("", decoder, (), {})]
        known: set[nn.Module] = set()
        names = {module: name for name, module in self.bare.named_modules()}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            stack.append(_Call(names[module], module, _copied(args), _copied(kwargs), num_attentions=seen.num_calls))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = stack.pop()
            call.num_attentions = seen.num_calls - call.num_attentions
            is_plain = isinstance(output, Tensor) or type(output) in (tuple, list)  # no output of a whole model
            takes_rows = any(has_rows(leaf, num_rows) for leaf in leaves((call.args, call.kwargs)))
            call.has_rows = is_plain and takes_rows and bool(_rows_of(output, num_rows))
            if module not in known:
                known.add(module)
                stack[-1].children.append(call)

        modules = [module for module in decoder.modules() if module is not decoder]
        handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
        handles += [module.register_forward_hook(after, with_kwargs=True) for module in modules]
        token = observed.set(seen)
        in_place = stands_in.set(bool(self.mixers.attentions) and not self.mixers.names)
        try:
            told = told_positions(decoder, counting_modules(decoder), self.probe.position_ids)
            with self.mixers.running(self.probe.rows()), masks_of(self.probe.layout), told:
                decoder(input_ids=self.probe.input_ids, use_cache=False, **self.probe.layout_arguments())
        finally:
            stands_in.reset(in_place)
            observed.reset(token)
            for handle in handles:
                handle.remove()
        return stack[0].children

    def changes(self, call: _Call, *, has_mixers: bool = False) -> bool | None:
        """Whether the second branch's rows of the module's output depend on the first branch's; None if the module
        cannot run by itself, for example because it requires the shape of an earlier call.

        Args:
            has_mixers: whether the module mixes tokens within a sequence. Later layers then get other values, and
                experts get other numbers of tokens, which changes all rounding.
        """
        if not call.has_rows:
            return False
        try:
            same = self._output(call, call.args, call.kwargs)
            size, difference = _largest(same), _difference(self._output(call, *self._moved(call)), same)
            most = min(_ROUNDING * torch.finfo(same[0].dtype).eps, _MOST_FROM_ROUNDING) * size
            rounding = most if has_mixers else most / 8  # the place of a row may affect its last bits, as in experts
            if difference > rounding:  # or is it a module that gives other bits each time?
                rounding = 4 * _difference(self._output(call, call.args, call.kwargs), same)
            if difference > rounding:
                return True
            return _difference(self._output(call, *self._redrawn(call)), same) > max(rounding, most)
        except Exception:
            return None

    def keeps_boundaries(self, call: _Call) -> bool:
        """Whether the module's own kernels separate the sequences of one row, in training and in evaluation."""
        forward = own_forward(call.module)
        parameters = inspect.signature(forward).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD or p.name in ("seq_idx", "cu_seq_lens_q") for p in parameters):
            return False
        rows = self.probe.rows()
        self.mixers.by_boundaries.add(call.name)
        try:
            for training in (False, True):
                call.module.train(training)
                if self.changes(call) is not False:
                    return False
                apart = _rows_of(run_sequences(forward, rows, *_without_layout(call)), rows.num_rows)
                with self.mixers.running(rows):
                    together = _rows_of(call.module(*call.args, **call.kwargs), rows.num_rows)
                eps = torch.finfo(apart[0].dtype).eps
                if not _difference(together, apart) <= _ROUNDING * eps * _largest(apart):
                    return False
            return True
        except Exception:  # kernels that do not know boundaries, or transformers' word for them
            return False
        finally:
            call.module.train(False)
            self.mixers.by_boundaries.discard(call.name)

    def _output(self, call: _Call, args: Any, kwargs: Any) -> list[Tensor]:
        """The module's output rows after the first branch."""
        rows = self.probe.rows()
        with self.mixers.running(rows):
            output = call.module(*_copied(args), **_copied(kwargs))
        return [tensor[:, self.probe.others] for tensor in _rows_of(output, rows.num_rows)]

    def _moved(self, call: _Call) -> tuple[Any, Any]:
        """The module's arguments with the first branch's rows in reverse order."""
        order = torch.arange(self.probe.num_rows)
        order[self.probe.branch] = order[self.probe.branch].flip(0)

        def move(tensor: Tensor) -> Tensor:
            return tensor[:, order.to(tensor.device)] if has_rows(tensor, len(order)) else tensor

        moved: tuple[Any, Any] = mapped((call.args, call.kwargs), move)
        return moved

    def _redrawn(self, call: _Call) -> tuple[Any, Any]:
        """The module's arguments with other numbers in the first branch's rows."""
        generator = torch.Generator().manual_seed(3)
        num_rows = self.probe.num_rows

        def redraw(tensor: Tensor) -> Tensor:
            if not (has_rows(tensor, num_rows) and tensor.is_floating_point()):
                return tensor
            tensor = tensor.clone()
            own = tensor[:, self.probe.branch]
            noise = torch.randn(own.shape, generator=generator).to(own)
            tensor[:, self.probe.branch] = noise * own.float().std().to(own)
            return tensor

        redrawn: tuple[Any, Any] = mapped((call.args, call.kwargs), redraw)
        return redrawn


def _probe(bare: Any, lengths: tuple[int, int, int, int], backend: str, masks: str) -> _Probe:
    """A probe row of `lengths`, with a last sequence so that the row's length differs from the width of any weight."""
    device = execution_device(bare)
    prefix, first, second, other = lengths
    sizes = {size for parameter in bare.parameters() for size in parameter.shape}
    while sum((prefix, first, second, other)) in sizes:
        other += 1
    lengths = (prefix, first, second, other)
    ends = [prefix + first, prefix + first + second, sum(lengths)]
    segments = ((0, ends[0], 0, 0), (ends[0], ends[1], 0, prefix), (ends[1], ends[2], 0, 0))
    positions = [*range(ends[0]), *range(prefix, prefix + second), *range(other)]
    generator = torch.Generator().manual_seed(0)
    ids = text_ids(bare)
    return _Probe(
        lengths,
        PackedLayout(segments, varlen_layout(segments).to(device), backend, masks=masks),
        ids[torch.randint(len(ids), (1, ends[2]), generator=generator)].to(device),
        torch.tensor([positions], device=device),
    )


def _rows_of(output: Any, num_rows: int) -> list[Tensor]:
    return [leaf for leaf in leaves(output) if has_rows(leaf, num_rows) and leaf.is_floating_point()]


def _largest(tensors: list[Tensor]) -> float:
    sizes = [tensor.float().abs().amax().item() for tensor in tensors if tensor.numel()]
    return max(sizes, default=0.0)


def _difference(outputs: list[Tensor], others: list[Tensor]) -> float:
    return _largest([a - b for a, b in zip(outputs, others, strict=True)])


def _copied(value: Any) -> Any:
    """The arguments with copied tensors, because a module may write into them."""
    return mapped(value, copied)


def _without_layout(call: _Call) -> tuple[Any, Any]:
    return call.args, {name: value for name, value in call.kwargs.items() if name != "packed_layout"}


def _flat(calls: list[_Call]) -> Iterator[_Call]:
    for call in calls:
        yield call
        yield from _flat(call.children)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Context manager that uses deterministic kernels if available."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was_on, warn_only=was_warning)
