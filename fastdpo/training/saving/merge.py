"""Merges a saved adapter into its base model: one plain model that computes the same logits.

In: an adapter's folder. Out: a folder that transformers and vLLM load without PEFT, with tokenizer and processor files.
The merged logits are compared with the adapter's twice: before saving, and after loading the saved model. If they
differ, no output stays behind. If the adapter changes only one of embedding and head, and both share a weight, each
gets its own copy first.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from fastdpo.modeling.backbone import bare_model
from fastdpo.training.saving.saved import SavedModel
from fastdpo.training.settings.engine import EngineConfig
from fastdpo.training.setup.models import adapter_base, load_model, load_tokenizer

logger = logging.get_logger(__name__)

LARGEST_SHARE = 0.05  # largest error of the merged logits, as a share of the adapter's effect on the logits
_PROBES, _PROBE_LENGTH = 4, 24  # random token ids


@dataclass(frozen=True)
class Merged:
    """The merged model, and its error."""

    folder: Path
    error: float  # largest difference of a logit between the saved merged model and the adapter on its base
    effect: float  # largest change of a logit by the adapter
    untied: bool  # whether a weight that embedding and head shared was split in two


def merge_adapter(
    adapter: str, output: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False
) -> Merged:
    """Writes the merged model.

    Args:
        adapter: folder of a PEFT adapter, for example from `fastdpo train --use_peft`.
        output: a new folder.
        dtype: dtype of the saved weights. The adapter's products are rounded to it.
    Raises:
        ValueError: `adapter` is no adapter or cannot be merged, `output` is not empty, or the logits differ.
    """
    if adapter_base(adapter) is None:
        raise ValueError(f"adapter must be a folder with an adapter_config.json and no config.json, got {adapter!r}")
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output must be a new or an empty folder, got {target}")
    args = EngineConfig(
        "not_used", model_init_kwargs={"dtype": dtype}, trust_remote_code=trust_remote_code, use_cpu=True
    )
    model: Any = load_model(adapter, args.init_kwargs()).eval()
    ids = _probe(bare_model(model))
    expected = _logits(model, ids)
    with model.disable_adapter():
        effect = (_logits(model, ids) - expected).abs().max().item()
    untied = _part_tied(model)
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError, TypeError) as refusal:
        raise ValueError(f"adapter must be one that PEFT can merge, got {adapter}: {refusal}") from refusal
    _check(_logits(merged, ids), expected, effect, "the merged model")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        merged.save_pretrained(partial)
        load_tokenizer(adapter, args.init_kwargs()).save_pretrained(partial)
        run: Any = SimpleNamespace(model=merged, args=args)
        SavedModel(run, None).add_to(str(partial))
        again = _logits(load_model(str(partial), args.init_kwargs()).eval(), ids)
        error = _check(again, expected, effect, "the saved model")
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Merged(target, error, effect, untied)


def _probe(model: Any) -> Tensor:
    """(_PROBES, _PROBE_LENGTH) token ids over the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.get_input_embeddings().weight.shape[0], (_PROBES, _PROBE_LENGTH), generator=generator)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _check(logits: Tensor, expected: Tensor, effect: float, what: str) -> float:
    """The largest error of a logit.

    Raises:
        ValueError: it is more than rounding and a small share of the adapter's effect.
    """
    error = (logits - expected).abs().max().item()
    rounding = 1e-4 * expected.abs().max().item()
    if not error <= max(LARGEST_SHARE * effect, rounding):
        raise ValueError(
            f"{what} must have the adapter's logits, got a difference of {error:.2g}, while the adapter itself changes"
            f" them by {effect:.2g}; try a wider dtype (--dtype float32)"
        )
    return error


def _part_tied(model: Any) -> bool:
    """Gives the head its own weight if it shares the embedding's and the adapter wraps one of the two.

    PEFT adds an adapter's product to the wrapped weight. If two modules share this weight, both would change.
    """
    bare: Any = bare_model(model)
    ends = bare.get_input_embeddings(), bare.get_output_embeddings()
    embedding, head = map(_wrapped, ends)
    if embedding.weight is not head.weight or not any(map(_is_adapted, ends)):
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (bare.config, bare.config.get_text_config()):
        config.tie_word_embeddings = False
    return True


def _wrapped(module: Any) -> Any:
    """The module inside PEFT's layers."""
    while True:
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if inner is None:
            return module
        module = inner


def _is_adapted(module: Any) -> bool:
    return _wrapped(module) is not module
