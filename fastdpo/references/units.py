"""The units of scoring while reference log-probs are cached: the missing responses to one prompt, each once.

In: the `RowInfo`s of the rows. Out: units, batches of units, and the groups to pack. Rows with the same prompt, such as
six pairs from its seven ranked answers, run the prompt and each answer once.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.references.rows import RowInfo, read_groups
from fastdpo.types import TokenizedGroup

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Unit:
    """Responses to one prompt."""

    members: tuple[tuple[int, int], ...]  # (row, which of its responses)
    num_prompt: int  # tokens
    lengths: tuple[int, ...]  # tokens of each response

    @property
    def num_packed(self) -> int:
        """Number of tokens, counting the prompt once."""
        return self.num_prompt + sum(self.lengths)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence, including the prompt."""
        return self.num_prompt + max(self.lengths)

    def halves(self) -> list[Unit]:
        """Two units with half of the responses each, or this unit alone if it has one response."""
        half = len(self.members) // 2
        parts = [slice(0, half), slice(half, None)] if half else [slice(None)]
        return [Unit(self.members[part], self.num_prompt, self.lengths[part]) for part in parts]


def make_units(infos: Sequence[RowInfo], rows: Sequence[int], known: Container[bytes], budget: int) -> list[Unit]:
    """Units of the unknown sequences of `rows`, each once, longest first; at most `budget` tokens per unit.

    Responses are divided into units before those that are known are left out. So a run that was killed goes on with the
    same units, and rounding gives it the same log-probs.
    """
    seen: set[bytes] = set()
    members_of: dict[bytes, list[tuple[int, int]]] = {}
    for row in rows:
        for index, key in enumerate(infos[row].keys):
            if key not in seen:
                seen.add(key)
                members_of.setdefault(infos[row].prompt, []).append((row, index))
    whole = (unit for members in members_of.values() for unit in _cut(infos, members, budget))
    units = [left for unit in whole if (left := _without_known(infos, unit, known)) is not None]
    return sorted(units, key=lambda unit: (-unit.longest, -unit.num_packed, unit.members))


def _without_known(infos: Sequence[RowInfo], unit: Unit, known: Container[bytes]) -> Unit | None:
    left = [i for i, (row, index) in enumerate(unit.members) if infos[row].keys[index] not in known]
    if len(left) == len(unit.members):
        return unit
    members, lengths = tuple(unit.members[i] for i in left), tuple(unit.lengths[i] for i in left)
    return Unit(members, unit.num_prompt, lengths) if left else None


def _cut(infos: Sequence[RowInfo], members: list[tuple[int, int]], budget: int) -> Iterator[Unit]:
    """Splits into runs of consecutive responses with as many tokens as fit, at least one response each."""
    num_prompt = infos[members[0][0]].num_prompt
    start = num_tokens = 0
    lengths = [infos[row].lengths[index] for row, index in members]
    for end, length in enumerate(lengths):
        if end > start and num_prompt + num_tokens + length > budget:
            yield Unit(tuple(members[start:end]), num_prompt, tuple(lengths[start:end]))
            start, num_tokens = end, 0
        num_tokens += length
    yield Unit(tuple(members[start:]), num_prompt, tuple(lengths[start:]))


def num_tokens(batch: Sequence[Unit], is_packed: bool) -> int:
    """Number of computed tokens: of one packed row, or of padded rows as long as the longest."""
    if is_packed:
        return sum(unit.num_packed for unit in batch)
    return max(unit.longest for unit in batch) * sum(len(unit.members) for unit in batch)


def next_batch(
    units: Sequence[Unit], start: int, budget: int, is_packed: bool, most_units: int | None = None
) -> list[Unit]:
    """The units from `start` on that fit into `budget` tokens, at least one. Units are sorted, longest first."""
    width = units[start].longest
    batch, total = [units[start]], num_tokens([units[start]], is_packed)
    end = len(units) if most_units is None else min(start + most_units, len(units))
    for position in range(start + 1, end):
        unit = units[position]
        total += unit.num_packed if is_packed else width * len(unit.members)
        if total > budget:
            break
        batch.append(unit)
    return batch


def read_units(dataset: Dataset, units: Sequence[Unit]) -> list[TokenizedGroup]:
    """One group without preferences per unit."""
    rows = sorted({row for unit in units for row, _ in unit.members})
    group_of = dict(zip(rows, read_groups(dataset, rows), strict=True))
    groups = []
    for unit in units:
        owners = [(group_of[row], index) for row, index in unit.members]
        responses = [group.responses[index] for group, index in owners]
        masks: list[Any] = [
            np.ones(len(group.responses[index]), bool) if group.loss_masks is None else group.loss_masks[index]
            for group, index in owners
        ]
        groups.append(TokenizedGroup(owners[0][0].prompt_ids, responses, masks, preferences=()))
    return groups
