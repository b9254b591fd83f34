"""The value objects of the data flow, one per step, in order.

    dataset row -> PreferenceRow -> TokenizedGroup -> PackedBatch -> TokenLogps -> SequenceLogps -> PairLogps ->
    PairScores

These classes compute nothing except properties. Layouts are made in `fastdpo.data`, numbers in `fastdpo.ops`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a row that has no target; its log-prob is 0.0 and it gets no gradient
ELSEWHERE = -(2**40)  # inside the head op: label in another process's part of the vocabulary

Message = dict[str, Any]  # {"role": "user", "content": "..."}


@dataclass(frozen=True)
class PreferenceRow:
    """One prompt with its responses as text, before tokenization.

    Text rows hold strings, conversational rows hold lists of messages; all fields of one row have the same kind.
    """

    prompt: str | list[Message]
    responses: tuple[str | list[Message], ...]  # K of them; K = 1 for supervised fine-tuning
    preferences: tuple[tuple[int, int], ...] = ((0, 1),)  # (index of the chosen, index of the rejected)
    # ledger of the dataset's columns: "text", "JSON" (messages parsed from text) or "unread"
    columns: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def is_conversational(self) -> bool:
        return isinstance(self.prompt, list)


@dataclass(frozen=True)
class TokenizedGroup:
    """One prompt and K responses as token ids.

    `loss_masks` keeps (True) the response tokens that count; None keeps all. If truncation leaves the responses with
    different prompts, `prompt_ids` is empty and each response starts with its own prompt, masked out. Without any
    prompt nothing predicts the first token of a response, so that token does not count.
    """

    prompt_ids: Sequence[int]
    responses: Sequence[Sequence[int]]
    loss_masks: Sequence[Sequence[bool]] | None = None
    ref_logps: Sequence[float] | None = None  # (K,) summed reference log-probs, nats
    preferences: Sequence[tuple[int, int]] = ((0, 1),)  # (index of the chosen, index of the rejected)

    def __post_init__(self) -> None:
        _lengths("prompt_ids", (self.prompt_ids,))
        num_responses = len(_lengths("responses", self.responses))
        if num_responses == 0 or any(len(response) == 0 for response in self.responses):
            raise ValueError(
                f"responses must hold at least one response of at least one token each, got {self.responses!r}"
            )
        for chosen, rejected in _index_pairs(self.preferences):
            if not (0 <= chosen < num_responses and 0 <= rejected < num_responses) or chosen == rejected:
                raise ValueError(
                    f"preferences must pair two different indices in [0, {num_responses}), got ({chosen}, {rejected})"
                )
        if self.loss_masks is not None:
            num_masked = _lengths("loss_masks", self.loss_masks)
            if num_masked != [len(r) for r in self.responses]:
                raise ValueError(
                    "loss_masks must have one entry per response token, got lengths"
                    f" {num_masked} for responses of {[len(r) for r in self.responses]}"
                )
        if self.ref_logps is not None and _lengths("ref_logps", (self.ref_logps,)) != [num_responses]:
            raise ValueError(f"ref_logps must have one value per response ({num_responses}), got {len(self.ref_logps)}")


def _lengths(name: str, sequences: Any) -> list[int]:
    """The length of each sequence."""
    try:
        return [len(sequence) for sequence in sequences]
    except TypeError:
        raise ValueError(f"{name} must hold lists of one entry per token, got {sequences!r}") from None


def _index_pairs(preferences: Any) -> list[tuple[int, int]]:
    try:
        return [(operator.index(chosen), operator.index(rejected)) for chosen, rejected in preferences]
    except (TypeError, ValueError):
        raise ValueError(f"preferences must hold pairs of indices of responses, got {preferences!r}") from None


@dataclass(frozen=True, init=False)
class TokenizedPair(TokenizedGroup):
    """The group with K = 2: response 0 is the chosen one, response 1 the rejected one."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        chosen_ids: Sequence[int],
        rejected_ids: Sequence[int],
        *,
        loss_masks: Sequence[Sequence[bool]] | None = None,
        ref_logps: Sequence[float] | None = None,
    ) -> None:
        super().__init__(prompt_ids, (chosen_ids, rejected_ids), loss_masks, ref_logps)

    @property
    def chosen_ids(self) -> Sequence[int]:
        return self.responses[0]

    @property
    def rejected_ids(self) -> Sequence[int]:
        return self.responses[1]


@dataclass(frozen=True)
class VarlenLayout:
    """N branches of a packed row of T tokens, in the form for variable-length attention; see `data/batches/varlen.py`.

    Queries are the rows in order; the keys of a branch are its prefix's rows, then its own.
    """

    key_rows: Tensor  # (K,) int64, the row that each key is
    row_keys: Tensor  # (K,) int64, the keys again, row by row
    row_ends: Tensor  # (T + 1,) int64, delimits the rows in row_keys
    cu_queries: Tensor  # (N + 1,) int32, delimits the branches in the rows
    cu_keys: Tensor  # (N + 1,) int32, delimits the branches in key_rows
    max_queries: int  # of a branch
    max_keys: int

    def to(self, device: torch.device | str) -> VarlenLayout:
        """The same layout with every tensor on `device`."""
        moved: VarlenLayout = _moved(self, device)
        return moved


@dataclass(frozen=True)
class RowShares:
    """How processes divide a packed row of T tokens and the R rows that reach the head; see `data/batches/shares.py`.

    Each process holds an equal part of the tokens, in order, and the head's rows whose hidden state is there.
    """

    order: Tensor  # (R,) int64, the head's rows, process by process
    ends: tuple[int, ...]  # delimits the processes in `order`; begins with 0
    places: Tensor  # (R,) int64, of each of the head's rows among those of all processes, padded to the longest part

    @property
    def num_processes(self) -> int:
        return len(self.ends) - 1

    @property
    def longest(self) -> int:
        """The largest number of the head's rows that one process has."""
        return max(end - start for start, end in pairwise(self.ends))

    def to(self, device: torch.device | str) -> RowShares:
        """The same shares with every tensor on `device`."""
        moved: RowShares = _moved(self, device)
        return moved


@dataclass(frozen=True)
class PackedBatch:
    """B pairs over S sequences, laid out for one forward of the model. Made by `fastdpo.data.batches.packing`.

    Packed (`attention_mask` is None): one row of T tokens, every group as `[shared prefix | branch | branch ...]`.
    Padded (`segments` is empty): one right-padded row per sequence (equal sequences share a row), for models that
    cannot run packed rows.
    Hidden states are viewed as (input_ids.numel(), H) in both cases, and `logit_rows` points into that view.
    """

    pairs: (
        Tensor  # (B, 2) int64: sequence index of chosen, of rejected. First, so that Trainer reads B as the batch size
    )
    input_ids: Tensor  # (1, T) int64 packed; (S, L) padded
    position_ids: Tensor  # like input_ids; restarts with each group, every branch continues from its prefix's end
    logit_rows: Tensor  # (R,) int64, row of the hidden states that predicts labels[r]
    labels: Tensor  # (R,) int64, response tokens only; a token shared by two responses is here once
    token_rows: Tensor  # (N,) int64, which r each counted token of each sequence uses
    cu_seqlens: Tensor  # (S + 1,) int64, delimits the sequences in token_rows
    num_tokens: int  # prompt and response tokens, the prompt once per response that is compared (TRL's num_tokens)
    attention_mask: Tensor | None = None  # (S, L) int64, padded only
    segments: tuple[tuple[int, int, int, int], ...] = ()  # per branch: query start, query end, prefix start, prefix end
    ref_logps: Tensor | None = None  # (S,) fp32, if the dataset has them
    group_ends: tuple[tuple[int, int, int, int], ...] = ()  # per group: rows r, counted tokens, sequences, pairs so far
    example_ids: Tensor | None = None  # (S,) int64, which of the collated examples brought the sequence
    varlen: VarlenLayout | None = None  # packed only
    uses: Tensor | None = None  # like input_ids: sides of pairs that the position is part of; 0 is padding
    shared_parts: Tensor | None = None  # (B, 2) int64, with ld_alpha: the sequences of a pair up to their shared length
    mean_chosen_length: Tensor | None = None  # (), over the optimizer step or evaluation; None: over this batch
    shares: RowShares | None = None  # packed only: of the processes that compute this batch together; None: it is one's

    def __post_init__(self) -> None:
        for name, kind in (("varlen", VarlenLayout), ("shares", RowShares)):
            if isinstance(getattr(self, name), dict):  # as `asdict` has it
                object.__setattr__(self, name, kind(**getattr(self, name)))

    @property
    def is_packed(self) -> bool:
        return self.attention_mask is None

    @property
    def num_pairs(self) -> int:
        return self.pairs.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def asdict(self) -> dict[str, Any]:
        """The fields as a dict, as Trainer moves only mappings to the device; `PackedBatch(**inputs)` reverses it."""
        nested = {"varlen": self.varlen, "shares": self.shares}
        return {**_shallow_dict(self), **{k: None if v is None else _shallow_dict(v) for k, v in nested.items()}}

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        moved: PackedBatch = _moved(self, device)
        return moved


def _shallow_dict(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


_MOVABLE = (Tensor, VarlenLayout, RowShares)


def _moved(value: Any, device: torch.device | str) -> Any:
    """A copy of a dataclass with its tensors and its movable nested dataclasses on `device`."""
    moved = {k: v.to(device) for k, v in _shallow_dict(value).items() if isinstance(v, _MOVABLE)}
    return replace(value, **moved)


@dataclass(frozen=True)
class TokenLogps:
    """The head op's results per row. Statistics are None unless requested; lse and entropy can have a gradient.

    With labels (T, K), logps and is_top1 are (T, K).
    """

    logps: Tensor  # (T,) fp32 (fp64 for fp64 inputs), nats; 0.0 in ignored rows
    lse: Tensor | None = None  # (T,) log of the softmax denominator, nats
    entropy: Tensor | None = None  # (T,) nats
    mean_logits: Tensor | None = None  # (T,) mean over the vocabulary
    is_top1: Tensor | None = None  # (T,) bool: the label has the largest logit
    log_sum_sq_probs: Tensor | None = None  # (T,) log of sum_v p_v^2


TOKEN_OUTPUTS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
GRAD_OUTPUTS = ("lse", "entropy")  # of these, the ones that can have a gradient


@dataclass(frozen=True)
class SequenceLogps:
    """Log-probs summed over the counted tokens of each sequence."""

    sums: Tensor  # (S,) fp32, nats
    lengths: Tensor  # (S,) int64, counted tokens
    tokens: TokenLogps  # over the R rows that reached the head


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs of the two sides of each pair."""

    chosen: Tensor  # (B,) fp32, nats
    rejected: Tensor  # (B,)
    chosen_lengths: Tensor  # (B,) int64
    rejected_lengths: Tensor  # (B,)
    sequences: SequenceLogps
    aux_loss: Tensor | None = None  # (), the load-balancing loss of experts, if requested


@dataclass(frozen=True)
class PairScores:
    """The inputs of a loss: log-probs of policy and reference for both sides, in nats; lengths. (B,) but one."""

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor | None = None  # int64; needed by losses that average per token
    rejected_lengths: Tensor | None = None
    chosen_sums: Tensor | None = None  # log-probs of the chosen with every token whole, where ld_alpha weighs some less
    mean_chosen_length: Tensor | None = None  # (), over the optimizer step; None: over these pairs
    pair_weights: Tensor | None = None  # factor of each pair's loss, no gradient (WPO)
    rankings: Tensor | None = None  # int64, the ranking that each pair is a stage of; None: each pair is one of its own

    @property
    def chosen_logratios(self) -> Tensor:
        return self.policy_chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        return self.policy_rejected_logps - self.ref_rejected_logps

    @property
    def margins(self) -> Tensor:
        """`logratio(chosen) - logratio(rejected)`, before beta."""
        return self.chosen_logratios - self.rejected_logratios
