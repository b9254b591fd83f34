"""A row that is too large for one micro-batch, in parts: some of its sequences each, with their prompt.

In: a row, and how many tokens a part may have. Out: micro-batches of its sequences. A loss that is a function of the
summed log-probs of the row's sequences has the gradient `sum_s weight_s * d logp_s`, with `weight_s = d loss / d
logp_s`. A first pass without a graph gives all log-probs, and so the loss and the weights; each part then runs with the
known weights of its sequences. This is exact and costs one more forward. The longest sequence has to fit into memory,
not the pair or the ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastdpo.modeling import packed_loss
from fastdpo.training.inputs.collator import Example, PackingCollator
from fastdpo.training.inputs.transfer import OneBuffer
from fastdpo.types import PackedBatch, TokenizedGroup

KNOWN = "known_weights"  # key of a part's inputs, after the first pass


@dataclass(frozen=True)
class KnownWeights:
    """What the first pass tells about a part."""

    weights: Tensor  # (s,) gradient of the row's loss in the log-probs of the part's sequences
    loss: Tensor  # (), the part's share of the row's loss, which is logged

    def of(self, places: Sequence[int], *, first: bool) -> KnownWeights:
        """Of some sequences of the part; the loss goes to the first of its halves."""
        return KnownWeights(self.weights[list(places)], self.loss if first else self.loss * 0)


@dataclass(frozen=True)
class RowPart:
    """Some sequences of a row, as a micro-batch on the device."""

    row: Example
    sequences: tuple[int, ...]  # their numbers in the row
    group: TokenizedGroup  # of these sequences, which compares none of them
    inputs: dict[str, Any]


# (model, inputs of the row, its parts) -> the known weights of each part
FirstPass = Callable[[nn.Module, dict[str, Any], Sequence[RowPart]], list[KnownWeights]]


def parts_of_row(row: Example, collator: PackingCollator, capacity: int, like: Tensor) -> list[RowPart]:
    """The row's sequences in micro-batches of at most `capacity` tokens; a longer sequence runs by itself.

    The longest sequences come first, and each goes into the first part that has space.

    Args:
        like: a tensor on the device of the parts.
    """
    group = row[1]
    sizes = [collator.num_tokens(_subgroup(group, (i,))) for i in range(len(group.responses))]
    parts: list[tuple[int, ...]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for place, part in enumerate(parts):
            if collator.num_tokens(_subgroup(group, (*part, i))) <= capacity:
                parts[place] = (*part, i)
                break
        else:
            parts.append((i,))
    return [_part(row, tuple(sorted(part)), collator, like) for part in parts]


def halves_of_part(part: RowPart, collator: PackingCollator) -> list[tuple[RowPart, tuple[int, ...]]]:
    """Two parts with about half of its response tokens each, and the places of their sequences in it."""
    lengths = [len(response) for response in part.group.responses]
    halves: tuple[list[int], list[int]] = ([], [])
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        min(halves, key=lambda half: sum(lengths[j] for j in half)).append(i)
    found = []
    for half in halves:
        places = tuple(sorted(half))
        sequences = tuple(part.sequences[i] for i in places)
        found.append((_part(part.row, sequences, collator, part.inputs["input_ids"]), places))
    return found


def loss_of_part(model: nn.Module, inputs: dict[str, Any], **settings: Any) -> Tensor:
    """The part's share of the row's loss, (). Its gradient is that of the row's loss through the part's sequences.

    Args:
        inputs: of a part, with its known weights.
        settings: of `packed_loss`.
    """
    known: KnownWeights = inputs[KNOWN]
    batch = PackedBatch(**{key: value for key, value in inputs.items() if key != KNOWN})

    def weighted(sums: Tensor, lengths: Tensor, sequences: slice, pairs: slice) -> Tensor:
        return (known.weights[sequences] * sums).sum()

    loss, _ = packed_loss(model, batch, weighted, **settings)
    return loss - loss.detach() + known.loss


def _part(row: Example, sequences: tuple[int, ...], collator: PackingCollator, like: Tensor) -> RowPart:
    number, group = row
    own = _subgroup(group, sequences)
    inputs = replace(collator, shared_parts=False).batch_of([(number, own)]).asdict()
    return RowPart(row, sequences, own, dict(OneBuffer(inputs).to(like.device)))


def _subgroup(group: TokenizedGroup, sequences: Sequence[int]) -> TokenizedGroup:
    masks, ref_logps = group.loss_masks, group.ref_logps
    return TokenizedGroup(
        group.prompt_ids,
        [group.responses[i] for i in sequences],
        None if masks is None else [masks[i] for i in sequences],
        None if ref_logps is None else [ref_logps[i] for i in sequences],
        preferences=(),
    )
