"""The configs of the two trainers: DPOConfig and SFTConfig.

Names are TRL's wherever TRL has the setting. `__post_init__` checks the values before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.losses import is_listwise, looks_at_whole_batch, losses_where
from fastdpo.references import REFERENCE_MODES
from fastdpo.training.settings.checks import check_choice, check_count, help_text, parse_max_memory
from fastdpo.training.settings.engine import EngineConfig
from fastdpo.training.settings.features import FeatureSettings
from fastdpo.training.settings.losses import LossSettings
from fastdpo.training.settings.trl_names import takes_trl_names, takes_trls_sft_names


@takes_trl_names
@dataclass
class DPOConfig(FeatureSettings, LossSettings, EngineConfig):
    """Settings of DPOTrainer. Everything else is transformers.TrainingArguments.

    Raises:
        ValueError: a value that cannot work, with the argument, the rule and the value.
    """

    learning_rate: float = field(default=1e-6, metadata=help_text("Peak learning rate."))
    reference_free: bool = field(
        default=False, metadata=help_text("Compare with a uniform reference. The same as reference=none.")
    )
    reference: str = field(
        default="auto",
        metadata=help_text(
            "Source of the reference log-probs. frozen: a copy of the model at its start, or ref_model. adapter:"
            " the policy with its adapter off. cached: computed once before training and kept on disk, or columns"
            " of the dataset. none: no reference. auto: the cheapest exact source."
        ),
    )
    precompute_ref_log_probs: bool = field(default=False, metadata=help_text("TRL's name for reference=cached."))
    ref_cache_dir: str | None = field(
        default=None,
        metadata=help_text(
            "Folder of cached reference log-probs. Default: fastdpo/ref_logps in ~/.cache (or in XDG_CACHE_HOME)."
        ),
    )
    ref_max_memory: dict[str | int, Any] | str | None = field(
        default=None,
        metadata=help_text(
            "Maximum memory for the reference's weights, in the form of transformers' max_memory"
            ' (JSON: {"0": "20GiB", "cpu": "60GiB"}). A larger reference is cached; its'
            " weights are read from memory and disk layer by layer."
        ),
    )
    precompute_ref_batch_size: int | None = field(
        default=None,
        metadata=help_text(
            "Maximum prompts per batch while reference log-probs are cached. Default: as many as"
            " ref_tokens_per_batch holds."
        ),
    )
    ref_tokens_per_batch: int | None = field(
        default=None,
        metadata=help_text(
            "Tokens per packed batch while reference log-probs are cached. Default: 16384 on a GPU, else 4096; 8"
            " times as many if weights are offloaded."
        ),
    )
    token_metrics: bool = field(
        default=True,
        metadata=help_text("Log entropy, mean_token_accuracy and mean logits. Costs the head op a little time."),
    )

    def __post_init__(self) -> None:
        self.ref_max_memory = parse_max_memory(self.ref_max_memory)
        for name in ("ref_tokens_per_batch", "precompute_ref_batch_size"):
            check_count(name, getattr(self, name), optional=True)
        self.check_features()
        self.check()
        super().__post_init__()

    def check(self) -> None:
        """Checks that the settings of loss, reference and features can work together. Call it again after a change.

        Raises:
            ValueError: with the setting, the rule and the value.
        """
        self.check_losses()
        self.reference = self._reference_mode()
        has_none = self.reference_free or self.reference == "none"
        if has_none and self.f_divergence_type != "reverse_kl":
            raise ValueError(
                f"f_divergence_type must be 'reverse_kl' without a reference, got {self.f_divergence_type!r}"
            )
        if self.max_tokens_per_microbatch is not None and looks_at_whole_batch(self):
            raise ValueError(
                f"max_tokens_per_microbatch must be None for loss_type {self.loss_type}, got"
                f" {self.max_tokens_per_microbatch!r}: this loss is not a sum over pairs, so its batch cannot be split"
            )
        if self.on_oversized_row == "split" and looks_at_whole_batch(self):
            raise ValueError(
                f"on_oversized_row must be 'alone' or 'skip' for loss_type {self.loss_type}, got 'split': the loss"
                " depends on the whole batch, so a row has no loss of its own; lower max_length if a row does not fit"
            )
        if self.sync_ref_model and (has_none or self.reference == "cached"):
            mode = "none" if has_none else "cached"
            why = "there is no reference to move" if has_none else "cached log-probs do not follow a moving reference"
            raise ValueError(f"sync_ref_model must be off if reference is {mode!r}, got True: {why}")

    def _reference_mode(self) -> str:
        """The mode that follows from reference, reference_free, precompute_ref_log_probs and the losses."""
        check_choice("reference", self.reference, REFERENCE_MODES)
        free = losses_where(lambda loss: not loss.reference, self.loss_type)
        if free and self.reference not in ("auto", "none"):
            raise ValueError(
                f"reference must be 'auto' or 'none' for loss_type {free[0]!r}, which uses no reference, got"
                f" {self.reference!r}"
            )
        if free and self.precompute_ref_log_probs:
            raise ValueError(
                f"precompute_ref_log_probs must be off for loss_type {free[0]!r}, which uses no reference, got True"
            )
        if self.precompute_ref_log_probs and (self.reference not in ("auto", "cached") or self.reference_free):
            asked = "reference_free" if self.reference_free else f"reference={self.reference!r}"
            raise ValueError(f"precompute_ref_log_probs must be off with {asked}, got True: it sets reference='cached'")
        if self.reference_free and self.reference not in ("auto", "none"):
            raise ValueError(f"reference must be 'none' or 'auto' if reference_free is set, got {self.reference!r}")
        return "none" if free else "cached" if self.precompute_ref_log_probs else self.reference

    def tokenization_settings(self) -> TokenizationSettings:
        is_cut = self.ld_alpha is not None
        return replace(super().tokenization_settings(), rankings=is_listwise(self), shared_parts=is_cut)


@takes_trls_sft_names
@dataclass
class SFTConfig(EngineConfig):
    """Settings of SFTTrainer. Everything else is transformers.TrainingArguments.

    Raises:
        ValueError: a value that cannot work, with the argument, the rule and the value.
    """

    learning_rate: float = field(default=2e-5, metadata=help_text("Peak learning rate."))

    def __post_init__(self) -> None:
        if str(self.packing).lower() in ("true", "false"):  # as TRL's SFTConfig has it
            self.packing = "packed" if str(self.packing).lower() == "true" else "auto"
        if self.on_oversized_row == "split":
            raise ValueError(
                "on_oversized_row must be 'alone', 'raise' or 'skip' in supervised fine-tuning, got 'split': a row is"
                " one response, which cannot be split; lower max_length if it does not fit"
            )
        super().__post_init__()
