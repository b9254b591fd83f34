"""A row that is too large for one micro-batch, in parts: some of its sequences each, with their prompt.

In: a row, and how many tokens a part may have. Out: micro-batches of its sequences. A loss that is a function of the
summed log-probs of the row's sequences has the gradient `sum_s weight_s * d logp_s`, with `weight_s = d loss / d
logp_s`. A first pass without a graph gives all log-probs, and so the loss and the weights; each part then runs with the
known weights of its sequences. This is exact and costs one more forward. The longest sequence has to fit into memory,
not the pair or the ranking. Where the model allows, all parts are one micro-batch, whose prompt runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling import packed_loss
from fastdpo.modeling.prompt_once import loss_after_prompt, why_prompt_repeats
from fastdpo.training.inputs.collator import Example, PackingCollator
from fastdpo.training.inputs.transfer import OneBuffer
from fastdpo.training.run import Run
from fastdpo.types import PackedBatch, TokenizedGroup

KNOWN = "known_weights"  # key of a part's inputs, after the first pass
IN_PARTS = "row_in_parts"  # the only key of the inputs of a row whose prompt runs once
LEAST_SHARE = 1 / 16  # of the tokens of a row's parts that must be copies of the prompt


@dataclass(frozen=True)
class KnownWeights:
    """What the first pass tells about a part."""

    weights: Tensor  # (s,) gradient of the row's loss in the log-probs of the part's sequences
    loss: Tensor  # (), the part's share of the row's loss, which is logged

    def of(self, places: Sequence[int], *, first: bool) -> KnownWeights:
        """Of some sequences of the part; the loss goes to the first of its halves."""
        return KnownWeights(self.weights[list(places)], self.loss if first else self.loss * 0)

    def weighted(self, sums: Tensor, lengths: Tensor, sequences: slice, pairs: slice) -> Tensor:
        """(), whose gradient in the log-probs `sums` of some sequences is that of the row's loss."""
        return (self.weights[sequences] * sums).sum()


@dataclass(frozen=True)
class RowPart:
    """Some sequences of a row, as a micro-batch on the device."""

    row: Example
    sequences: tuple[int, ...]  # their numbers in the row
    group: TokenizedGroup  # of these sequences, which compares none of them
    inputs: dict[str, Any]


@dataclass(frozen=True)
class RowInParts:
    """All parts of a row, for one micro-batch whose prompt runs once."""

    parts: Sequence[RowPart]
    known: Sequence[KnownWeights]  # of each part


# (model, inputs of the row, its parts, tokens of its prompt if it runs once) -> the known weights of each part
FirstPass = Callable[[nn.Module, dict[str, Any], Sequence[RowPart], int], list[KnownWeights]]


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
    loss, _ = packed_loss(model, batch, known.weighted, **settings)
    return loss - loss.detach() + known.loss


def loss_of_row(model: nn.Module, row: RowInParts, **settings: Any) -> Tensor:
    """The row's loss, (). Its prompt runs forward here, its parts run in backward.

    Args:
        settings: of `packed_loss`.
    Raises:
        PrefixRefused: the parts of this model's rows need the prompt.
    """
    batches = [PackedBatch(**part.inputs) for part in row.parts]
    num_prompt, losses = len(row.parts[0].group.prompt_ids), [known.weighted for known in row.known]
    zero = loss_after_prompt(model, batches, num_prompt, losses, **settings)
    return zero + torch.stack([known.loss for known in row.known]).sum()


def why_prompt_of_run_repeats(run: Run) -> str:
    """Why the prompt of a row in parts must run once for every part; empty if it need not."""
    if not (run.is_packed and run.args.prefix_sharing):
        return "rows do not share their prompts"
    return "the model is compiled" if run.args.torch_compile else why_prompt_repeats(run.model)


def repeats_much(parts: Sequence[RowPart]) -> bool:
    """Whether enough of the parts' tokens are copies of the prompt that it should run once for all of them."""
    num_prompt = len(parts[0].group.prompt_ids)
    num_tokens = sum(part.inputs["input_ids"].numel() for part in parts)
    return num_prompt > 0 and (len(parts) - 1) * num_prompt >= LEAST_SHARE * num_tokens


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
