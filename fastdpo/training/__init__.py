"""Trainers on transformers.Trainer: preference pairs (DPO) and supervised fine-tuning (SFT) on one engine."""

from fastdpo.training.dpo import DPOTrainer
from fastdpo.training.saving.signals import StopOnSignal
from fastdpo.training.settings.config import DPOConfig, SFTConfig
from fastdpo.training.sft import SFTTrainer

__all__ = ["DPOConfig", "DPOTrainer", "SFTConfig", "SFTTrainer", "StopOnSignal"]
