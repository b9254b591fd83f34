"""Credits: the contribution of each token to the implicit reward of a response.

A token's credit is `beta * (log p_policy(token) - log p_reference(token))`. The credits of a response sum to its
reward. Rafailov et al., "From r to Q*", arXiv 2404.12358, interpret these log-ratios as a reward per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fastdpo.data.batches.layout import counted_sequences
from fastdpo.references.rows import read_groups
from fastdpo.rewards.scorer import ModelScorer
from fastdpo.training.settings.config import DPOConfig
from fastdpo.types import TokenizedGroup

_WINDOW = 8  # number of preceding tokens that the text of a token may depend on


@dataclass(frozen=True)
class Credits:
    """The credits of one response, token by token."""

    tokens: tuple[str, ...]  # text of the counted tokens, without prompt and other speakers
    values: tuple[float, ...]  # nats

    @property
    def reward(self) -> float:
        return sum(self.values)


def token_credits(
    model: str | nn.Module,
    reference: str | nn.Module | None,
    dataset: Any,
    tokenizer: Any,
    args: DPOConfig,
    *,
    beta: float = 0.1,
) -> Iterator[list[Credits]]:
    """Yields the credits of the responses, for each row of a prepared dataset.

    Args:
        reference: the reference model. With None, credits are `beta` times the log-probs.
    """
    groups = list(read_groups(dataset, range(len(dataset))))
    models = [model] if reference is None else [model, reference]
    with tqdm(total=len(models) * len(groups), desc="Log-probs by token", unit="row", disable=args.disable_tqdm) as bar:
        ours, *others = (
            list(ModelScorer(one, args, tokenizer).token_logps(groups, progress=bar.update)) for one in models
        )
    theirs = others[0] if others else None
    for index, group in enumerate(groups):
        found = []
        for k, ids in enumerate(_counted_ids(group)):
            ratios = ours[index][k] if theirs is None else ours[index][k] - theirs[index][k]
            found.append(Credits(_pieces(tokenizer, ids), tuple((beta * ratios).tolist())))
        yield found


def _pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds to the preceding text. A token decoded alone could lose its spaces."""
    pieces = []
    for place, token in enumerate(ids):
        before = ids[max(place - _WINDOW, 0) : place]
        start, whole = tokenizer.decode(before), tokenizer.decode([*before, token])
        pieces.append(whole[len(start) :] if whole.startswith(start) else tokenizer.decode([token]))
    return tuple(pieces)


def _counted_ids(group: TokenizedGroup) -> list[Sequence[int]]:
    """The counted token ids of each response."""
    return [sequence.tokens[sequence.is_counted].tolist() for sequence in counted_sequences(group)]
