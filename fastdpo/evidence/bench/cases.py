"""What `fastdpo bench` measures, from what a user names: a model, a vocabulary, and data or a length profile.

In: names and sizes. Out: a `Workload` for whole steps and a `Shape` for the head alone. Refuses unknown names, and
models that do not fit the memory with the state of AdamW and a frozen reference.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdpo.evidence.bench.heads.problem import Shape
from fastdpo.evidence.bench.measure import free_bytes
from fastdpo.evidence.bench.steps.workloads import Workload

# shapes of Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.1-8B; "tiny" is for machines without a GPU
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
             "vocab_size": 16000},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_layers": 24, "num_heads": 14, "num_kv_heads": 2,
             "vocab_size": 151936, "is_tied": True},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8,
           "vocab_size": 128256, "is_tied": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8,
           "vocab_size": 128256},
}  # fmt: skip
VOCABULARIES = {"llama3": 128256, "qwen3": 151936, "gemma3": 262144}


@dataclass(frozen=True)
class Profile:
    """Mean tokens of prompt and response, and the limit of a sequence."""

    prompt: int
    response: int
    max_length: int


PROFILES = {
    "hh": Profile(120, 50, 1024),
    "ultrafeedback": Profile(180, 300, 2048),
    "long": Profile(1000, 500, 4096),
}


def make_workload(
    model: str, vocab: str | None, dataset: str | None, profile: str, pairs: int, max_length: int | None, dtype: str
) -> Workload:
    """The workload of a run.

    Args:
        model: one of PRESETS, or a folder or name whose config has the shape.
        vocab: one of VOCABULARIES or a number; None keeps the model's.
        dataset: a preference dataset; None draws lengths from the profile.
    Raises:
        ValueError: an unknown name, or a size below its least.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    lengths = PROFILES[profile]
    max_length = lengths.max_length if max_length is None else max_length
    if max_length < 16:
        raise ValueError(f"max_length must be at least 16, got {max_length}")
    fields = PRESETS[model] if model in PRESETS else _fields_of(model)
    if vocab is not None:
        fields = {**fields, "vocab_size": _vocab_size(vocab)}
    data: dict[str, Any] = {"dataset": dataset} if dataset else {"mean_lengths": (lengths.prompt, lengths.response)}
    name = f"{model}, {dataset or profile}" + (f", vocabulary {vocab}" if vocab is not None else "")
    rate = 1e-4 if dtype == "float32" else 1e-5
    return Workload(
        name, **fields, pairs_per_step=pairs, max_length=max_length, dtype=dtype, learning_rate=rate, **data
    )


def make_shape(workload: Workload, num_rows: int) -> Shape:
    """The head of the workload's model on `num_rows` response rows, and as many prompt rows."""
    return Shape(2 * num_rows, num_rows, workload.hidden_size, workload.vocab_size, workload.dtype)


def check_fits(workload: Workload) -> None:
    """Refuses a model whose weights, gradients, AdamW moments and frozen reference need more than the free memory."""
    with torch.device("meta"):
        num_weights = sum(weight.numel() for weight in workload.make_model("meta").parameters())
    needed = 5 * num_weights * torch.empty((), dtype=getattr(torch, workload.dtype)).element_size()
    if needed > free_bytes():
        raise ValueError(
            f"model must fit the memory with gradients, AdamW and a reference, got {workload.name}, which needs"
            f" {needed / 1e9:.1f} GB of {free_bytes() / 1e9:.1f} GB; use a smaller model, or --only head"
        )


def slope(xs: list[float], ys: list[float]) -> float:
    """Slope of the least-squares line through (log x, log y): 1 where y is proportional to x.

    Raises:
        ValueError: fewer than two points, or one that has no logarithm.
    """
    if len(xs) < 2 or min(*xs, *ys) <= 0:
        raise ValueError(f"points must be at least two, all above 0, got x = {xs} and y = {ys}")
    return line_through([math.log(x) for x in xs], [math.log(y) for y in ys])[1]


def line_through(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """(intercept, slope) of the least-squares line; the mean of `ys` and 0 where all `xs` are equal."""
    if len(set(xs)) == 1:
        return statistics.fmean(ys), 0.0
    fit = statistics.linear_regression(xs, ys)
    return fit.intercept, fit.slope


def _vocab_size(text: str) -> int:
    size = VOCABULARIES.get(text) or (int(text) if text.isdecimal() else 0)
    if size < 8:
        raise ValueError(f"vocab must be one of {', '.join(VOCABULARIES)} or a number of at least 8, got {text!r}")
    return size


def _fields_of(model: str) -> dict[str, Any]:
    from fastdpo.training.setup.models import load_config

    try:
        config = load_config(str(Path(model).parent) if model.endswith("config.json") else model)
    except ValueError as error:
        raise ValueError(f"{error}; the shapes without a folder are {', '.join(PRESETS)}") from None
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    return {
        "hidden_size": text.hidden_size,
        "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "vocab_size": text.vocab_size,
        "model": config.name_or_path,
    }
