"""Keeps tokenized rows between runs, so that a second run with the same rows does not tokenize again.

In: everything that determines the tokens: rows, tokenizer, settings. Out: their fingerprint, and the matching Arrow
file in datasets' cache folder (HF_DATASETS_CACHE). `datasets.disable_caching()` turns the cache off.
"""

from __future__ import annotations

from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "fastdpo"  # in datasets' cache folder, for rows that datasets itself keeps in memory only


def tokens_fingerprint(dataset: Dataset, tokenizer: Any, **settings: Any) -> str:
    """16 hex digits that change with the rows, the tokenizer, the settings and fastdpo's tokenization code.

    The code is included because datasets' own fingerprint only uses the names of imported functions: after an update
    of fastdpo it would still return the tokens of the old version.
    """
    import tokenizers
    import transformers
    from datasets.fingerprint import Hasher

    versions = (transformers.__version__, tokenizers.__version__, _code_hash())
    return Hasher.hash((dataset._fingerprint, tokenizer_state(tokenizer), sorted(settings.items()), versions))


def cache_file(dataset: Dataset, fingerprint: str) -> str | None:
    """The cache file for the tokens of `dataset`; None if `Dataset.map` finds one itself, or if caching is off."""
    import datasets

    if not datasets.is_caching_enabled() or dataset.cache_files:
        return None
    folder = Path(datasets.config.HF_DATASETS_CACHE) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: tokenize in every run, as without a cache
        return None
    return str(folder / f"tokens-{fingerprint}.arrow")


def tokenizer_state(tokenizer: Any) -> tuple[Any, ...]:
    """The parts of a tokenizer that affect its tokens.

    The pickled object is not used: it changes after a warning about a long text, or after padding.
    """
    from datasets.fingerprint import Hasher

    template = str(getattr(tokenizer, "chat_template", None))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        Hasher.hash(tokenizer) if backend is None else backend.to_str(),
        sorted((name, str(token)) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()),
        getattr(tokenizer, "split_special_tokens", None),  # no part of the backend's text
        template,
        date.today().isoformat() if "strftime_now" in template else None,  # templates that print the day
    )


@cache
def _code_hash() -> str:
    from datasets.fingerprint import Hasher

    package = Path(__file__).parents[1]
    return Hasher.hash([file.read_text() for file in (package.parent / "types.py", *sorted(package.rglob("*.py")))])
