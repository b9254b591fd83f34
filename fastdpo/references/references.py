"""Sources of reference log-probs with one interface: a batch and the policy in, summed log-probs of every sequence out.

No source builds an autograd graph or runs dropout: the model is in eval mode during the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.prompt_once import logps_of_parts
from fastdpo.references.adapters import as_reference
from fastdpo.types import PackedBatch

REFERENCE_MODES = ("auto", "frozen", "adapter", "cached", "none")


class Reference(Protocol):
    """A source of reference log-probs."""

    mode: str

    def sums(self, policy: nn.Module, batch: PackedBatch) -> Tensor:
        """(S,) summed log-probs of every sequence, nats, fp32, without gradient."""
        ...

    def sums_of_parts(self, policy: nn.Module, batches: Sequence[PackedBatch], num_prompt: int) -> list[Tensor]:
        """`sums` of each batch.

        Args:
            num_prompt: tokens of the prompt that all batches start with, which may run once for them; 0: it may not.
        """
        ...


@dataclass
class FrozenReference:
    """A separate model: a copy of the initial policy, or the user's reference model."""

    model: nn.Module
    impl: str = "auto"
    mode: str = "frozen"

    def sums(self, policy: nn.Module, batch: PackedBatch) -> Tensor:
        """(S,) summed log-probs of every sequence, nats, fp32, without gradient."""
        return self.sums_of_parts(policy, [batch], 0)[0]

    def sums_of_parts(self, policy: nn.Module, batches: Sequence[PackedBatch], num_prompt: int) -> list[Tensor]:
        return _sums(self.model, batches, num_prompt, self.impl)


@dataclass
class AdapterReference:
    """The policy without its PEFT adapter, or with the adapter `ref`: a frozen copy if training started from an
    adapter, or the model's own adapter `ref`.

    The reference's rows go through the LM head in a separate launch before the policy's. Gradients are made in forward,
    so in a joint launch the reference's rows would use workspace, and on a GPU also matrix products, that only the
    policy's rows need. Measured on a CPU core (V = 32,000, 240 to 960 rows each), one launch took 1.02 to 1.7 times as
    long as two.
    """

    peft_model: nn.Module
    impl: str = "auto"
    mode: str = "adapter"

    def sums(self, policy: nn.Module, batch: PackedBatch) -> Tensor:
        """(S,) summed log-probs of every sequence, nats, fp32, without gradient.

        Raises:
            ValueError: `policy` is not the model with the adapter any more.
        """
        return self.sums_of_parts(policy, [batch], 0)[0]

    def sums_of_parts(self, policy: nn.Module, batches: Sequence[PackedBatch], num_prompt: int) -> list[Tensor]:
        if bare_model(policy) is not bare_model(self.peft_model):
            raise ValueError(
                "the trainer's model must stay the PeftModel that is also the reference (reference 'adapter'), got"
                f" another {type(bare_model(policy)).__name__}; make a new trainer for it"
            )
        with as_reference(self.peft_model):
            return _sums(policy, batches, num_prompt, self.impl)


@dataclass
class DatasetReference:
    """Log-probs in the dataset's rows: the dataset's own, or filled in from the cache before training."""

    mode: str = "cached"

    def sums(self, policy: nn.Module, batch: PackedBatch) -> Tensor:
        if batch.ref_logps is None:
            raise ValueError(
                "reference 'cached' must have ref_chosen_logps and ref_rejected_logps in every row of the dataset, got"
                " rows without (rows truncated by max_length or max_prompt_length lose theirs); use 'frozen' or"
                " 'adapter', which compute them batch by batch"
            )
        return batch.ref_logps

    def sums_of_parts(self, policy: nn.Module, batches: Sequence[PackedBatch], num_prompt: int) -> list[Tensor]:
        return [self.sums(policy, batch) for batch in batches]


@dataclass
class NoReference:
    """Zero log-probs, for reference-free losses."""

    mode: str = "none"

    def sums(self, policy: nn.Module, batch: PackedBatch) -> Tensor:
        return torch.zeros(batch.num_sequences, dtype=torch.float32, device=batch.pairs.device)

    def sums_of_parts(self, policy: nn.Module, batches: Sequence[PackedBatch], num_prompt: int) -> list[Tensor]:
        return [self.sums(policy, batch) for batch in batches]


def _sums(model: nn.Module, batches: Sequence[PackedBatch], num_prompt: int, impl: str) -> list[Tensor]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return [logps.sequences.sums for logps in logps_of_parts(model, batches, num_prompt, impl=impl)]
    finally:
        model.train(was_training)
