"""The check of a QLoRA step; the rest of the steps' benchmark is in fastdpo/evidence/bench/steps."""
