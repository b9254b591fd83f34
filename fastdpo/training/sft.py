"""SFTTrainer: supervised fine-tuning on the same packed forward and head op.

It takes prompt/completion rows, conversations, plain text or preference rows. From preference rows it trains on the
chosen responses: the Preferred-FT stage of the DPO paper (arXiv 2305.18290, sec. 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from fastdpo.data.prepare import Report, prepare_sft_dataset
from fastdpo.metrics import SumAndWeight
from fastdpo.modeling import packed_loss
from fastdpo.training.base import PackedTrainer
from fastdpo.training.evaluation import StepResult
from fastdpo.training.inputs.before_weights import check_before_weights
from fastdpo.training.settings.config import SFTConfig
from fastdpo.training.settings.trl_names import SFT_NAMES, tokenizer_given_as
from fastdpo.training.setup.adapters import with_adapter
from fastdpo.training.setup.experts import with_load_balancing
from fastdpo.training.setup.models import resolve_model
from fastdpo.types import PackedBatch


class SFTTrainer(PackedTrainer):
    """Next-token training on responses. Prompt tokens are context only and have no loss.

    The loss is the mean negative log-prob per response token, in nats, over the whole optimizer step. Mixtures of
    experts add their load-balancing loss, see `router_aux_loss_coef`. The arguments are those of DPOTrainer.
    """

    method = "sft"
    args: SFTConfig

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | None = None,
        data_collator: Callable[..., dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        **renamed: Any,
    ) -> None:
        args = args if args is not None else SFTConfig("sft_output")
        if not isinstance(args, SFTConfig):
            raise ValueError(f"args must be an SFTConfig, got {type(args).__name__}")
        if renamed:
            processing_class = tokenizer_given_as(renamed, processing_class, SFTConfig, SFT_NAMES)
        check_before_weights(args, train_dataset, eval_dataset, is_sft=True)
        policy, tokenizer = resolve_model(model, processing_class, args, quantization_config)
        policy = with_adapter(policy, peft_config, args, trains=train_dataset is not None)
        super().__init__(
            policy,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            tokenizer,
            processing_class if isinstance(processing_class, ProcessorMixin) else None,
            callbacks,
            optimizers=optimizers,
        )

    def _prepare_dataset(self, dataset: Any) -> tuple[Any, Report]:
        return prepare_sft_dataset(
            dataset, self.processing_class, self.args.tokenization_settings(), num_proc=self.args.dataset_num_proc
        )

    def _num_items(self, inputs: dict[str, Any]) -> int:
        return inputs["token_rows"].shape[0]

    def _first_rows(self, inputs: dict[str, Any], num_rows: int) -> dict[str, Any]:
        keep, lengths = inputs["example_ids"] < num_rows, inputs["cu_seqlens"].diff()
        cu_seqlens = torch.nn.functional.pad(lengths[keep].cumsum(0), (1, 0))
        token_rows = inputs["token_rows"][keep.repeat_interleave(lengths)]
        return {**inputs, "cu_seqlens": cu_seqlens, "token_rows": token_rows}

    def _loss_sum(self, model: nn.Module, batch: PackedBatch) -> StepResult:
        def loss_of(sums: Tensor, lengths: Tensor, sequences: slice, pairs: slice) -> Tensor:
            return -sums.sum()

        settings: dict[str, Any] = {
            "impl": self.args.impl,
            "outputs": ("entropy", "is_top1"),
            "grad_in_forward": not self.args.torch_compile,
            "router_aux_loss": self.router_aux_loss_coef > 0,
        }
        loss, logps = packed_loss(model, batch, loss_of, **settings)
        sequences = logps.sequences
        entropy, is_top1 = sequences.tokens.entropy, sequences.tokens.is_top1
        assert entropy is not None
        assert is_top1 is not None
        rows = batch.token_rows
        metrics: dict[str, SumAndWeight] = {
            "entropy": (entropy[rows].sum(), float(rows.numel())),
            "mean_token_accuracy": (is_top1[rows].float().sum(), float(rows.numel())),
        }
        if logps.aux_loss is not None:
            loss, balance = with_load_balancing(loss, logps.aux_loss, self.router_aux_loss_coef, rows.numel())
            metrics.update(balance)
        return StepResult(loss, metrics, sums={"policy": sequences.sums.detach()})
