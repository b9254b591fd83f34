"""The mark of tests with a real model, SmolLM2-135M-Instruct, which its package holds as a GGUF file."""

import importlib.util

import pytest

from fastdpo.evidence.smollm2 import INSTALL, PACKAGES


def needs_smollm2(test):
    """Slow, marked pretrained, and skipped where the packages are missing."""
    is_there = all(importlib.util.find_spec(name) for name in PACKAGES)  # without importing them
    skip = pytest.mark.skipif(not is_there, reason=f"SmolLM2 is not installed: {INSTALL}")
    return pytest.mark.slow(pytest.mark.pretrained(skip(test)))
