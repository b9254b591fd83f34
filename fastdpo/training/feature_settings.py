"""The settings of what DPOTrainer does beside the loss: a reference that follows, samples, warnings.

Part of DPOConfig. Names and defaults are TRL's where TRL has the setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastdpo.training.config_checks import check_number


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class FeatureSettings:
    """Fields of DPOConfig; `check_features` raises ValueError for what cannot work."""

    sync_ref_model: bool = field(
        default=False,
        metadata=_help("Move the reference towards the policy every ref_model_sync_steps steps: TR-DPO."),
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata=_help("Share of the policy in the new reference, in (0, 1], under sync_ref_model.")
    )
    ref_model_sync_steps: int = field(
        default=512, metadata=_help("Optimizer steps between two moves of the reference, under sync_ref_model.")
    )
    num_eval_samples: int = field(
        default=0,
        metadata=_help("Prompts of the evaluation data that policy and reference answer at every evaluation."),
    )
    eval_sample_tokens: int = field(default=128, metadata=_help("Most tokens of such an answer."))
    eval_sample_temperature: float = field(
        default=0.0, metadata=_help("Temperature at which they are sampled; 0 takes the likeliest token.")
    )
    training_warnings: bool = field(
        default=True,
        metadata=_help(
            "Say once, with the number, when training shows a known way of going wrong: chosen responses becoming less"
            " likely, margins collapsing, log-ratios running away, and others."
        ),
    )

    def check_features(self) -> None:
        check_number("ref_model_mixup_alpha", self.ref_model_mixup_alpha, least=0.0)
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}")
        _check_count("ref_model_sync_steps", self.ref_model_sync_steps, least=1)
        _check_count("num_eval_samples", self.num_eval_samples, least=0)
        _check_count("eval_sample_tokens", self.eval_sample_tokens, least=1)
        check_number("eval_sample_temperature", self.eval_sample_temperature, least=0.0)
        reference = "none" if getattr(self, "reference_free", False) else getattr(self, "reference", "auto")
        if self.sync_ref_model and reference in ("cached", "none"):
            why = (
                "log-probs computed once would be those of a reference that is gone"
                if reference == "cached"
                else "there is none to move"
            )
            raise ValueError(f"sync_ref_model must be off where the reference is {reference!r}: {why}")


def _check_count(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
