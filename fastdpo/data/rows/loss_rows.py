"""Adapts groups to losses: a tokenized group in, a group with other responses or preferences out.

With `ld_alpha` each pair also holds both responses cut to their shared length: the same tokens, with a loss mask that
counts fewer of them. Equal tokens are computed once, and everything that identifies sequences by tokens and loss masks,
such as the cache of reference log-probs, also works for these parts.

For a listwise loss the preferences of a row become the neighbouring pairs of one ranking, best first.

Refused with ValueError: reference log-probs from the dataset that would have to be split. Refused with BadRow:
preferences that do not form a ranking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from fastdpo.data.batches.layout import counted_sequences
from fastdpo.data.batches.packing import SHARED_PARTS_AFTER
from fastdpo.data.values import BadRow
from fastdpo.types import TokenizedGroup


def with_shared_parts(group: TokenizedGroup) -> TokenizedGroup:
    """The pairs of a group in order, each as chosen, rejected, and both up to their shared length.

    Responses [a b c] and [d] give four: [a b c], [d], [a b c] with only a counted, and [d]. A group that already has
    this form is unchanged.
    """
    num_prompt = len(group.prompt_ids)
    counted = [sequence.is_counted[num_prompt:] for sequence in counted_sequences(group)]
    responses: list[Sequence[int]] = []
    masks: list[list[bool]] = []
    for pair in group.preferences:
        num_shared = min(int(counted[side].sum()) for side in pair)
        responses += [group.responses[side] for side in pair] * 2
        masks += [counted[side].tolist() for side in pair]
        masks += [(counted[side] & (counted[side].cumsum() <= num_shared)).tolist() for side in pair]
    step = 2 * SHARED_PARTS_AFTER
    preferences = tuple((first, first + 1) for first in range(0, len(responses), step))
    has_form = group.loss_masks is not None and [list(mask) for mask in group.loss_masks] == masks
    if has_form and [list(r) for r in group.responses] == [list(r) for r in responses]:
        return replace(group, preferences=preferences)
    if group.ref_logps is not None:
        raise ValueError(
            "ld_alpha must be None for a dataset with ref_chosen_logps and ref_rejected_logps, because these sums"
            " cannot be split at the shared length; remove these columns"
        )
    return TokenizedGroup(group.prompt_ids, responses, masks, None, preferences)


def as_ranking(group: TokenizedGroup) -> TokenizedGroup:
    """The group with the neighbouring pairs of its ranking as preferences.

    Raises:
        BadRow: its preferences do not form a ranking.
    """
    return replace(group, preferences=tuple(pairwise(ranking_of(group.preferences))))


def ranking_of(preferences: Sequence[Sequence[int]]) -> list[int]:
    """The compared responses, best first.

    Raises:
        BadRow: the preferences contradict each other, or two responses are not compared.
    """
    better_than: dict[int, set[int]] = {side: set() for pair in preferences for side in pair}
    for chosen, rejected in preferences:
        better_than[rejected].add(chosen)
    ranking: list[int] = []
    while better_than:
        best = [response for response, better in better_than.items() if better <= set(ranking)]
        if len(best) != 1:
            raise BadRow("no ranking: a tie" if best else "no ranking: preferences contradict each other")
        ranking.append(best[0])
        del better_than[best[0]]
    return ranking
