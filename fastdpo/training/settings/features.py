"""The settings of what DPOTrainer does beside the loss: a reference that follows, samples, warnings.

Part of DPOConfig. Names and defaults are TRL's where TRL has the setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastdpo.training.settings.checks import check_count, check_number, help_text


@dataclass
class FeatureSettings:
    """Fields of DPOConfig; `check_features` raises ValueError where one of these fields cannot work."""

    sync_ref_model: bool = field(
        default=False,
        metadata=help_text("Move the reference towards the policy every ref_model_sync_steps steps: TR-DPO."),
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata=help_text("Share of the policy in the new reference, in (0, 1], under sync_ref_model.")
    )
    ref_model_sync_steps: int = field(
        default=512, metadata=help_text("Optimizer steps between two moves of the reference, under sync_ref_model.")
    )
    num_eval_samples: int = field(
        default=0,
        metadata=help_text("Prompts of the evaluation data that policy and reference answer at every evaluation."),
    )
    eval_sample_tokens: int = field(default=128, metadata=help_text("Most tokens of such an answer."))
    eval_sample_temperature: float = field(
        default=0.0, metadata=help_text("Temperature at which they are sampled; 0 takes the likeliest token.")
    )
    training_warnings: bool = field(
        default=True,
        metadata=help_text(
            "Say once, with the number, when training shows a known way of going wrong: chosen responses becoming less"
            " likely, margins collapsing, log-ratios running away, and others."
        ),
    )

    def check_features(self) -> None:
        check_number("ref_model_mixup_alpha", self.ref_model_mixup_alpha, least=0.0)
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}")
        check_count("ref_model_sync_steps", self.ref_model_sync_steps)
        check_count("num_eval_samples", self.num_eval_samples, least=0)
        check_count("eval_sample_tokens", self.eval_sample_tokens)
        check_number("eval_sample_temperature", self.eval_sample_temperature, least=0.0)
