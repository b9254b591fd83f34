"""Run: the attributes of a trainer that the memory estimate, the summary, the model card and the dry save read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from fastdpo.data.prepare import Report
from fastdpo.modeling import PackingCheck
from fastdpo.references import Reference
from fastdpo.training.inputs.collator import PackingCollator
from fastdpo.training.settings.engine import EngineConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase, TrainerState


class Run(Protocol):
    """A trainer that has been built. Every PackedTrainer is one."""

    method: str  # "dpo" or "sft"
    model: nn.Module
    args: EngineConfig
    processing_class: PreTrainedTokenizerBase
    accelerator: Accelerator
    state: TrainerState
    hub_model_id: str | None
    train_dataset: Any
    eval_dataset: Any  # one, or several by name
    data_reports: dict[str, Report]  # by "train", "eval" or "eval_<name>"
    collator: PackingCollator
    is_packed: bool
    packing_check: PackingCheck
    reference: Reference | None
    reference_reason: str  # how the reference was chosen, in words
    warnings_given: dict[str, str]  # name -> message of each training warning
    dataset_name: str | None  # for the model card

    def create_model_card(self) -> None:
        """Writes README.md into the output directory."""
