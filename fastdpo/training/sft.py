"""SFTTrainer: supervised fine-tuning on the same packed forward and head op.

It takes prompt/completion rows, conversations, plain text, or preference rows, of which it trains on the chosen
response: the Preferred-FT stage of the DPO paper (arXiv 2305.18290, sec. 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from fastdpo.data.prepare import DataReport, prepare_sft_dataset
from fastdpo.metrics import SumAndWeight
from fastdpo.modeling import packed_logps
from fastdpo.training.base import PackedTrainer
from fastdpo.training.config import SFTConfig
from fastdpo.training.models import resolve_model
from fastdpo.types import PackedBatch


class SFTTrainer(PackedTrainer):
    """Next-token training on responses; prompts are read and not learned.

    The loss is the mean negative log-prob per response token, in nats, over the whole optimizer step. Arguments as in
    DPOTrainer.
    """

    args: SFTConfig

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | None = None,
        data_collator: Callable[..., dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = args if args is not None else SFTConfig("sft_output")
        policy, tokenizer = resolve_model(model, processing_class, args.model_init_kwargs)
        super().__init__(
            policy,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            tokenizer,
            callbacks,
            optimizers=optimizers,
        )

    def _prepare_dataset(self, dataset: Any) -> tuple[Any, DataReport]:
        return prepare_sft_dataset(
            dataset, self.processing_class, self.args.tokenization_settings(), num_proc=self.args.dataset_num_proc
        )

    def _num_items(self, inputs: dict[str, Any]) -> int:
        return inputs["token_rows"].shape[0]

    def _loss_sum(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, dict[str, SumAndWeight]]:
        tokens = packed_logps(model, batch, impl=self.args.impl, outputs=("entropy", "is_top1")).sequences.tokens
        assert tokens.entropy is not None
        assert tokens.is_top1 is not None
        num_tokens = float(batch.labels.numel())
        metrics: dict[str, SumAndWeight] = {
            "entropy": (tokens.entropy.sum(), num_tokens),
            "mean_token_accuracy": (tokens.is_top1.float().sum(), num_tokens),
        }
        return -tokens.logps.sum(), metrics
