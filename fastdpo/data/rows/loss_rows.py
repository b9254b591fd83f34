"""Groups in the form that some losses need: a tokenized group in, one with other responses or preferences out.

With `ld_alpha` each pair also brings both responses cut to the length that they share: the same tokens, of which fewer
count. Tokens that are the same are computed once, and whatever knows sequences by their tokens and loss masks, such as
the cache of reference log-probs, knows the parts too.

For a listwise loss the preferences of a row become the neighbouring pairs of one ranking, best first.

Refuses reference log-probs that came with the dataset where they would have to be split, and preferences that are no
ranking, which make a bad row.
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
    """The pairs of a group one after the other, each as chosen, rejected, and both up to the length that they share.

    Responses [a b c] and [d]: the four are [a b c], [d], [a b c] of which only a counts, and [d]. A group that has
    that form already is left as it is.
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
            "ld_alpha must be None where the dataset brings ref_chosen_logps and ref_rejected_logps: a sum does not say"
            " what the tokens beyond the shared length have of it; leave these columns out"
        )
    return TokenizedGroup(group.prompt_ids, responses, masks, None, preferences)


def as_ranking(group: TokenizedGroup) -> TokenizedGroup:
    """The group with the neighbouring pairs of its ranking as preferences.

    Raises:
        BadRow: its preferences are no ranking.
    """
    return replace(group, preferences=tuple(pairwise(ranking_of(group.preferences))))


def ranking_of(preferences: Sequence[Sequence[int]]) -> list[int]:
    """The responses that are compared, best first.

    Raises:
        BadRow: some are better than each other, or it is not known which of two is.
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
