"""Splits a collated batch into micro-batches: groups in, layouts in micro-batches of at most `max_tokens` out.

Groups that repeat a prompt become one group if this saves enough tokens: six pairs of a prompt with seven ranked
answers compute the prompt and each answer once. Groups are then packed whole, by first-fit decreasing, which needs at
most 11/9 of the minimal number of micro-batches, plus one (Dosa 2007). A group above the limit gets its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdpo.data.batches.layout import GroupLayout, lay_out
from fastdpo.types import TokenizedGroup

# Smallest share of tokens that merging groups must save: the rows of a group go through the head together, twice if
# they do not fit, and its branches copy keys. Without it, prompts of only a BOS would merge all rows into one group.
MIN_SAVED_SHARE = 1 / 50


def lay_out_batch(
    groups: Sequence[TokenizedGroup], *, prefix_sharing: bool = True, max_tokens: int | None = None
) -> list[GroupLayout]:
    """Merges groups that repeat a prompt; the order is that of the prompts' first appearance.

    Args:
        prefix_sharing: False merges no groups.
        max_tokens: the largest size of a merged group.
    """
    if not prefix_sharing:
        return [_of_one(groups, i, prefix_sharing=False) for i in range(len(groups))]
    examples_of: dict[tuple[int, ...] | int, list[int]] = {}
    for i, group in enumerate(groups):
        # without a common prompt each response begins with its own prompt, so nothing can be shared
        key = tuple(group.prompt_ids) if len(group.prompt_ids) else i
        examples_of.setdefault(key, []).append(i)
    layouts: list[GroupLayout] = []
    for examples in examples_of.values():
        layouts.extend(_merged(groups, examples, max_tokens))
    return layouts


def _of_one(groups: Sequence[TokenizedGroup], example: int, *, prefix_sharing: bool = True) -> GroupLayout:
    return lay_out(groups[example], (example,) * len(groups[example].responses), prefix_sharing=prefix_sharing)


def _merged(groups: Sequence[TokenizedGroup], examples: list[int], max_tokens: int | None) -> list[GroupLayout]:
    """Merges the examples of one prompt wherever this saves tokens and stays below the limit."""
    separate = [_of_one(groups, i) for i in examples]
    if len(examples) == 1:
        return separate
    all_in_one = _joined(separate)
    if _saves(all_in_one, separate, max_tokens):
        return [all_in_one]
    layouts = separate[:1]
    for layout in separate[1:]:
        both = _joined([layouts[-1], layout])
        if _saves(both, [layouts[-1], layout], max_tokens):
            layouts[-1] = both
        else:
            layouts.append(layout)
    return layouts


def _saves(merged: GroupLayout, separate: Sequence[GroupLayout], max_tokens: int | None) -> bool:
    """Responses of one pair may have more in common with each other than with those of another pair."""
    if max_tokens is not None and merged.num_tokens > max_tokens:
        return False
    num_separate = sum(layout.num_tokens for layout in separate)
    return num_separate - merged.num_tokens >= MIN_SAVED_SHARE * num_separate


def _joined(layouts: Sequence[GroupLayout]) -> GroupLayout:
    groups = [layout.group for layout in layouts]
    preferences: list[tuple[int, int]] = []
    first = 0
    for group in groups:
        preferences.extend((first + chosen, first + rejected) for chosen, rejected in group.preferences)
        first += len(group.responses)
    masks = None
    if any(group.loss_masks is not None for group in groups):
        masks = [mask for g in groups for mask in (g.loss_masks if g.loss_masks is not None else _whole(g.responses))]
    ref_logps: list[float] | None = []
    for group in groups:
        ref_logps = None if ref_logps is None or group.ref_logps is None else [*ref_logps, *group.ref_logps]
    responses = [response for group in groups for response in group.responses]
    merged = TokenizedGroup(groups[0].prompt_ids, responses, masks, ref_logps, preferences)
    return lay_out(merged, tuple(i for layout in layouts for i in layout.example_ids))


def _whole(responses: Sequence[Sequence[int]]) -> list[list[bool]]:
    return [[True] * len(response) for response in responses]


def first_fit_decreasing(
    sizes: Sequence[int], capacity: int, size_beside: Callable[[int, int], int] | None = None
) -> list[list[int]]:
    """Packs items into bins: largest item first, each into the first bin with enough space.

    Args:
        sizes: size of each item, in tokens.
        capacity: capacity of a bin. A larger item gets its own bin.
        size_beside: `(first, item)` -> the item's size in a bin whose first, largest item is `first`; by default its
            own size.
    Returns:
        The items of each bin, ascending.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for index, items in enumerate(bins):
            size = sizes[item] if size_beside is None else size_beside(items[0], item)
            if size <= room[index]:
                items.append(item)
                room[index] -= size
                break
        else:
            bins.append([item])
            room.append(capacity - (sizes[item] if size_beside is None else size_beside(item, item)))
    return [sorted(items) for items in bins]


def packed_microbatches(layouts: Sequence[GroupLayout], max_tokens: int) -> list[list[GroupLayout]]:
    """Layouts in rows of at most `max_tokens`, each in the given order."""
    bins = first_fit_decreasing([layout.num_tokens for layout in layouts], max_tokens)
    return [[layouts[i] for i in items] for items in bins]


def num_padded_rows(group: TokenizedGroup) -> int:
    """Number of rows that the group takes in a padded batch: equal responses share one row."""
    return len({tuple(response) for response in group.responses})


def padded_microbatches(groups: Sequence[TokenizedGroup], max_tokens: int) -> list[list[int]]:
    """Indices of groups in right-padded batches of at most `max_tokens`, padding included."""
    widths = [len(group.prompt_ids) + max(map(len, group.responses)) for group in groups]
    return first_fit_decreasing(widths, max_tokens, lambda first, item: widths[first] * num_padded_rows(groups[item]))
