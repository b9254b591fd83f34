"""A dataset of prepared rows, and where its log-probs are kept."""

import pytest
from tiny import make_rows, make_tokenizer

from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings


@pytest.fixture
def dataset():
    """40 pairs of uneven lengths."""
    return prepare_preference_dataset(make_rows(40), make_tokenizer(), TokenizationSettings())[0]


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path, monkeypatch):
    """No test writes to the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
