"""Checkpoints: checked before training, written, and found again."""
