"""Decoder layers that are alike, of which a dry run runs a few and counts the others.

In: a model without storage, and the allocations of a step of its first layers. Out: the bytes by part at the peak of
the whole model. A layer more repeats the allocations of the layers before it, once in forward and once in backward, so
that every moment's bytes are linear in the number of layers, and the peak is at the first or the last repetition. This
is checked on the layers that run: a model whose layers do not repeat their allocations is refused by `NotPeriodic`,
and one whose layers show no pattern has no Fold; both run whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor, nn

from fastdpo.modeling.backbone import backbone, bare_model, text_config

# Layers that run: the first and the last differ from the others. With checkpoints in host memory, the first two and the
# last two do.
LEAST_LAYERS, LEAST_LAYERS_OFFLOADED = 4, 6
_PLACES = ("layer_idx", "layer_index", "layer_id")  # attributes that only say where a layer stands


class NotPeriodic(Exception):
    """The layers that ran do not repeat their allocations."""


@dataclass(frozen=True)
class Fold:
    """Which layers stand for the whole model: the first `num_layers`; `times` periods after them are only counted."""

    num_layers: int
    period: int
    times: int
    trained_bytes: int  # of the weights in one period that are trained


def find_fold(model: nn.Module, offload: bool = False, every_n_layers: int = 1) -> Fold | None:
    """None if the model has too few layers, or its layers show no pattern.

    Args:
        offload: whether checkpoints are in host memory.
        every_n_layers: one layer of so many is checkpointed, the first one of all.
    """
    least = LEAST_LAYERS_OFFLOADED if offload else LEAST_LAYERS
    layers = decoder_layers(model)
    kinds: Any = getattr(text_config(bare_model(model)), "layer_types", None)
    kinds = kinds if isinstance(kinds, Sequence) and len(kinds) == len(layers) else [None] * len(layers)
    alike = [
        (kind, number % every_n_layers, _likeness(layer))
        for number, (kind, layer) in enumerate(zip(kinds, layers, strict=True))
    ]
    folds = []
    for period in range(1, len(alike) // 2):
        start = len(alike) - period  # where the pattern begins: some models have other layers first
        while start > 0 and alike[start - 1] == alike[start - 1 + period]:
            start -= 1
        # one period stays below the two that are compared: its backward frees what layers of one kind share
        times = (len(alike) - start - max(3 * period + 1, least)) // period
        if times > 0:
            folds.append((len(alike) - times * period, period, times))
    if not folds:
        return None
    num_layers, period, times = min(folds)
    trained = [p for layer in layers[len(layers) - period :] for p in layer.parameters() if p.requires_grad]
    return Fold(num_layers, period, times, sum(p.numel() * p.element_size() for p in trained))


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The layers that the decoder runs one after the other; none if it keeps them elsewhere."""
    layers = getattr(backbone(bare_model(model)), "layers", None)
    return list(layers) if isinstance(layers, nn.ModuleList) else []


@contextmanager
def only_folded(model: nn.Module, fold: Fold | None) -> Iterator[None]:
    """Context manager: the model has only the layers that run."""
    if fold is None:
        yield
        return
    decoder: Any = backbone(bare_model(model))
    whole = decoder.layers
    decoder.layers = whole[: fold.num_layers]
    try:
        yield
    finally:
        decoder.layers = whole


def _likeness(layer: nn.Module) -> Any:
    """Equal for layers that compute the same with other weights."""
    modules = [
        (
            name,
            type(module).__qualname__,
            [
                (key, value)
                for key, value in sorted(vars(module).items())
                if key not in _PLACES and isinstance(value, int | float | str | tuple | type(None))
            ],
        )
        for name, module in layer.named_modules()
    ]
    weights = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
    return modules, weights


@dataclass
class Marks:
    """How many allocations and operations came before each layer: before its forward, and before its backward."""

    forward: dict[int, tuple[int, int]] = field(default_factory=dict)
    backward: dict[int, tuple[int, int]] = field(default_factory=dict)

    @contextmanager
    def kept(self, layers: Sequence[nn.Module], live: Any) -> Iterator[None]:
        """Context manager: the layers mark their places. With checkpointing a layer runs twice: the first one counts.

        Args:
            live: has `events` and `num_ops` so far.
        """

        def mark(places: dict[int, tuple[int, int]], layer: int) -> None:
            places.setdefault(layer, (len(live.events), live.num_ops))

        def after(layer: int, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            if first.requires_grad:
                first.register_hook(lambda _: mark(self.backward, layer))

        hooks = []
        for number, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: mark(self.forward, number)))
            hooks.append(layer.register_forward_hook(lambda _, __, output, number=number: after(number, output)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def unfolded_peak(changes: Any, fold: Fold, marks: Marks, forward_end: int, keeps_gradients: bool) -> tuple[Any, int]:
    """Bytes by part at the peak of the whole model, and how many operations the layers that did not run have.

    Args:
        changes: (E, parts) bytes that each event of the layers that ran adds, freed ones below 0.
        forward_end: number of events in the forward, with the head; after it, autocast's copies of weights are freed.
        keeps_gradients: whether weights' gradients stay until the end, and count in their part.

    Raises:
        NotPeriodic: the layers do not repeat their allocations.
    """
    layers = range(fold.num_layers)
    gradients = np.zeros(changes.shape[1], dtype=np.int64)
    gradients[1] = fold.trained_bytes if keeps_gradients else 0
    forwards = _repeated(changes, [marks.forward.get(layer) for layer in layers], fold.period)
    backwards = [(len(changes), len(changes), 0)]
    if marks.backward:
        backwards = _repeated(changes, [marks.backward.get(layer) for layer in reversed(layers)], fold.period)
    found = None
    for forward, backward in product(forwards, backwards):
        of_forward, of_backward = (changes[begin:end].sum(0) for begin, end, _ in (forward, backward))
        freed = of_forward + of_backward - gradients  # between forward and backward: only autocast's copies are
        if freed[0] >= 0 and not freed[1:].any():
            found = forward, backward
            break
    if found is None:
        raise NotPeriodic
    (below, above, ops), (down, up, more_ops) = found
    bytes_then = changes.cumsum(0)
    stretches = [
        bytes_then[:above],
        bytes_then[below:above] + fold.times * of_forward,  # the last repetition
        bytes_then[above:forward_end] + fold.times * of_forward,
        bytes_then[forward_end:down] + fold.times * (gradients - of_backward),
        bytes_then[down:up] + fold.times * (gradients - of_backward),
        bytes_then[down:up] + fold.times * gradients,
        bytes_then[up:] + fold.times * gradients,
    ]
    return peak_of(np.concatenate(stretches)), (ops + more_ops) * fold.times


def peak_of(bytes_then: Any) -> Any:
    """The first row with the largest sum."""
    return bytes_then[bytes_then.sum(1).argmax()]


def _repeated(changes: Any, places: Sequence[tuple[int, int] | None], period: int) -> list[tuple[int, int, int]]:
    """Where the second of two equal periods begins and ends, and its operations; the last two come first."""
    known = [place for place in places if place is not None]
    if len(known) < len(places):
        raise NotPeriodic
    return [
        (second[0], third[0], third[1] - second[1])
        for first, second, third in reversed(list(zip(known, known[period:], known[2 * period :], strict=False)))
        if np.array_equal(_in_order(changes[first[0] : second[0]]), _in_order(changes[second[0] : third[0]]))
    ]


def _in_order(changes: Any) -> Any:
    """Releases without an allocation between them as one: their order is arbitrary and no peak lies among them."""
    is_new = changes.sum(1) > 0
    starts = is_new | np.concatenate([[True], is_new[:-1]])
    return np.add.reduceat(changes, np.flatnonzero(starts), axis=0)
