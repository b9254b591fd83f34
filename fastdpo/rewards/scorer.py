"""ModelScorer: log-probs of the tokens of responses under one model, one batch of groups at a time.

In: tokenized groups. Out: the log-prob of every counted token, nats. Batches are packed if the self-check finds that
exact for the model, otherwise padded. Results are not cached; `logps.py` caches whole datasets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from fastdpo.data.batches.packing import pack_pairs, pad_pairs
from fastdpo.data.tokens.tokenization import padding_id
from fastdpo.modeling import check_packing, packed_logps, prepare_model
from fastdpo.training.settings.config import DPOConfig
from fastdpo.training.setup.models import load_model
from fastdpo.training.setup.reference import autocast_of
from fastdpo.types import TokenizedGroup

logger = logging.get_logger(__name__)

TOKENS_PER_BATCH = {"cuda": 16384}
TOKENS_PER_BATCH_ELSEWHERE = 4096


class ModelScorer:
    """Computes log-probs with a model that is not trained.

    Args:
        model: a name, a folder (also of an adapter) or a model.
        args: only device, precision, packing and impl matter.
    """

    def __init__(self, model: str | nn.Module, args: DPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.args, self.pad_token_id = args, padding_id(tokenizer)
        loaded: Any = load_model(model, args.init_kwargs()) if isinstance(model, str) else model
        if getattr(loaded, "hf_device_map", None) is None and not getattr(loaded, "is_quantized", False):
            loaded.to(args.device)
        self.model: nn.Module = loaded
        backend = args.attention_backend if args.packing != "padded" else "auto"
        prepare_model(self.model, attention_backend=backend, workspace_bytes=args.workspace_bytes)
        check = check_packing(self.model, impl=args.impl, autocast=lambda: autocast_of(args))
        if not check.ok and args.packing == "packed":
            raise ValueError(f"packing must be 'auto' or 'padded' for this model, got 'packed': {check.reason}")
        self.is_packed = check.ok and args.packing != "padded"
        default = TOKENS_PER_BATCH.get(args.device.type, TOKENS_PER_BATCH_ELSEWHERE)
        self.tokens_per_batch = args.ref_tokens_per_batch or default

    def token_logps(
        self, groups: Sequence[TokenizedGroup], *, progress: Callable[[int], object] = lambda done: None
    ) -> Iterator[list[Tensor]]:
        """Yields, for each group, the log-probs of each response's counted tokens, (N,) fp32 on the CPU.

        Args:
            progress: called after each batch with the number of its groups.
        """
        for batch in _batches(groups, self.tokens_per_batch):
            found = list(self._of_batch(batch))
            progress(len(batch))
            yield from found

    @torch.no_grad()
    def _of_batch(self, groups: Sequence[TokenizedGroup]) -> Iterator[list[Tensor]]:
        if self.is_packed:
            batch = pack_pairs(groups, prefix_sharing=self.args.prefix_sharing)
        else:
            batch = pad_pairs(groups, pad_token_id=self.pad_token_id)
        batch = batch.to(self.args.device)
        was_training = self.model.training
        self.model.eval()
        try:
            with autocast_of(self.args):
                found = packed_logps(self.model, batch, impl=self.args.impl)
        finally:
            self.model.train(was_training)
        of_tokens = found.sequences.tokens.logps[batch.token_rows].float().cpu()
        of_sequences = list(of_tokens.split(batch.cu_seqlens.diff().tolist()))
        start = 0
        for group in groups:
            yield of_sequences[start : start + len(group.responses)]
            start += len(group.responses)


def _batches(groups: Sequence[TokenizedGroup], num_tokens: int) -> Iterator[list[TokenizedGroup]]:
    """Batches of consecutive groups with at most `num_tokens` tokens. A larger group is a batch by itself."""
    batch: list[TokenizedGroup] = []
    size = 0
    for group in groups:
        own = len(group.prompt_ids) + sum(map(len, group.responses))
        if batch and size + own > num_tokens:
            yield batch
            batch, size = [], 0
        batch.append(group)
        size += own
    if batch:
        yield batch
