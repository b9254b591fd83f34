"""The implicit reward of a DPO checkpoint as a function, so that it can serve as a reward model elsewhere.

`r(x, y) = beta * (log p_policy(y | x) - log p_reference(y | x))`, DPO, arXiv 2305.18290, eq. 5, without the term that
depends only on the prompt. That term does not affect comparisons of responses to one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fastdpo.data.tokens.tokenization import RowEncoder, truncate
from fastdpo.data.values import BadRow
from fastdpo.rewards.scorer import ModelScorer
from fastdpo.training.settings.config import DPOConfig
from fastdpo.training.setup.models import adapter_base, resolve_tokenizer
from fastdpo.types import PreferenceRow, TokenizedGroup

RewardFunction = Callable[..., list[float | None]]


def default_reference(model: str | nn.Module) -> str | None:
    """The base model of a saved adapter; None if `model` is not an adapter's folder."""
    return adapter_base(model) if isinstance(model, str) else None


def implicit_reward(
    model: str | nn.Module,
    reference: str | nn.Module | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    beta: float = 0.1,
    *,
    per_token: bool = False,
    args: DPOConfig | None = None,
) -> RewardFunction:
    """A function with the signature of TRL's `reward_funcs`: `(prompts, completions, **kwargs) -> rewards`.

    Prompts and completions are texts or lists of messages, one completion for each prompt. Consecutive completions of
    the same prompt share its computation. A completion without tokens gets None, which TRL leaves out.

    Args:
        model: the trained checkpoint: a name, a folder (also of an adapter) or a model.
        reference: the reference of its training. Default: for an adapter's folder its base model, otherwise none.
            Without a reference, the reward is `beta` times the log-prob.
        tokenizer: by default the one saved with the model.
        beta: beta of the training, > 0.
        per_token: whether rewards are means over the completion's tokens.
        args: max_length, precision, packing and impl. Default: DPOConfig's defaults, without a limit on length.
    Raises:
        ValueError: beta is not > 0, or a model cannot be loaded.
    """
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    args = DPOConfig("not_used", max_length=None) if args is None else args
    tokenizer = resolve_tokenizer(model, tokenizer, args)
    policy = ModelScorer(model, args, tokenizer)
    reference = default_reference(model) if reference is None else reference
    start = None if reference is None else ModelScorer(reference, args, tokenizer)

    def implicit_reward(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
        if len(prompts) != len(completions):
            raise ValueError(
                f"completions must have one entry per prompt ({len(prompts)}), got {len(completions)} completions"
            )
        groups, places = _groups(prompts, completions, tokenizer, args)
        rewards: list[float | None] = [None] * len(prompts)
        ours = [logps for group in policy.token_logps(groups) for logps in group]
        theirs = [logps for group in start.token_logps(groups) for logps in group] if start is not None else ()
        for index, place in enumerate(places):
            total = ours[index].double().sum() - (theirs[index].double().sum() if theirs else 0.0)
            rewards[place] = beta * float(total) / (len(ours[index]) if per_token else 1)
        return rewards

    return implicit_reward


def _groups(
    prompts: Sequence[Any], completions: Sequence[Any], tokenizer: Any, args: DPOConfig
) -> tuple[list[TokenizedGroup], list[int]]:
    """The completions as groups, and the index of each grouped response among the completions."""
    settings = args.tokenization_settings()
    encoder = RowEncoder(tokenizer, settings.chat_template, settings.chat_template_kwargs)
    rows = [PreferenceRow(prompt, (said,), ()) for prompt, said in zip(prompts, completions, strict=True)]
    groups: list[TokenizedGroup] = []
    places: list[int] = []
    for place, encoded in enumerate(encoder.encode([(row, {}) for row in rows])):
        if isinstance(encoded.error, BadRow):
            continue
        if encoded.error is not None:
            raise encoded.error
        assert encoded.group is not None
        try:
            group = truncate(encoded.group, settings)
        except BadRow:
            continue
        last = groups[-1] if groups else None
        if last is not None and len(group.prompt_ids) and list(last.prompt_ids) == list(group.prompt_ids):
            groups[-1] = _joined(last, group)
        else:
            groups.append(group)
        places.append(place)
    return groups, places


def _joined(group: TokenizedGroup, other: TokenizedGroup) -> TokenizedGroup:
    masks = None
    if group.loss_masks is not None or other.loss_masks is not None:
        masks = [*_masks(group), *_masks(other)]
    return TokenizedGroup(group.prompt_ids, [*group.responses, *other.responses], masks, None, ())


def _masks(group: TokenizedGroup) -> Sequence[Sequence[bool]]:
    return [[True] * len(response) for response in group.responses] if group.loss_masks is None else group.loss_masks
