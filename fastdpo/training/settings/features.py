"""Settings of DPOTrainer's features around the loss: a moving reference, samples, warnings.

Part of DPOConfig. Names and defaults are TRL's where TRL has the setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastdpo.training.settings.checks import check_count, check_number, help_text


@dataclass
class FeatureSettings:
    """Fields of DPOConfig. `check_features` raises ValueError for values that cannot work."""

    sync_ref_model: bool = field(
        default=False,
        metadata=help_text("TR-DPO: move the reference towards the policy every ref_model_sync_steps steps."),
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata=help_text("sync_ref_model: share of the policy in the new reference, in (0, 1].")
    )
    ref_model_sync_steps: int = field(
        default=512, metadata=help_text("sync_ref_model: optimizer steps between two moves of the reference.")
    )
    num_eval_samples: int = field(
        default=0,
        metadata=help_text("Number of evaluation prompts that policy and reference answer at every evaluation."),
    )
    eval_sample_tokens: int = field(default=128, metadata=help_text("num_eval_samples: maximum tokens per answer."))
    eval_sample_temperature: float = field(
        default=0.0, metadata=help_text("num_eval_samples: sampling temperature; 0 takes the likeliest token.")
    )
    training_warnings: bool = field(
        default=True,
        metadata=help_text(
            "Warn once, with the number, about known failures of training: chosen responses become less likely,"
            " margins collapse, log-ratios run away, and others."
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
