"""Computes reference log-probs before training: a model and datasets in, files in the cache out. A later run with the
same model, data and settings reads them from there.

Only the reference is loaded, offloaded if it exceeds `ref_max_memory`. Arguments that DPOTrainer refuses are refused
here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from fastdpo.data.prepare import Report, prepare_preference_dataset
from fastdpo.modeling import check_packing, prepare_model
from fastdpo.modeling.backbone import bare_model
from fastdpo.references.precompute import Filled, fill_ref_logps
from fastdpo.references.rows import with_ref_logps
from fastdpo.training.inputs.prepared_rows import check_rows
from fastdpo.training.inputs.streams import check_not_streamed
from fastdpo.training.settings.config import DPOConfig
from fastdpo.training.setup.models import resolve_tokenizer
from fastdpo.training.setup.reference import asked_once, autocast_of

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Precomputed:
    """The datasets whose log-probs are now in the cache, by name, and the cache's folder."""

    datasets: dict[str, Dataset]  # prepared, with the log-probs of every response in `ref_logps`
    counts: dict[str, Filled]
    reports: dict[str, Report]
    folder: Path
    model: str  # class and size


def precompute_ref_logps(
    model: str | torch.nn.Module,
    args: DPOConfig,
    datasets: Mapping[str, Any],
    *,
    ref_model: str | torch.nn.Module | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    quantization_config: Any = None,
    takes_brought: bool = True,
    what: str = "Reference log-probs",
) -> Precomputed:
    """Computes the log-probs of these datasets that the cache does not have yet.

    Args:
        model: the model to be trained. Without `ref_model` it is also the reference; with one, only its tokenizer is
            read.
        args: the settings of the later run: max_length and the other tokenization settings, bf16, fp16, impl and the
            ref_ settings matter.
        datasets: by name, in any form that DPOTrainer takes.
        takes_brought: use log-probs from the columns ref_chosen_logps and ref_rejected_logps instead of computing them.
        what: name of the progress bar.
    Raises:
        ValueError: the arguments cannot work together.
    """
    if args.reference_free or args.reference == "none":
        raise ValueError("reference must not be 'none' to precompute log-probs: there is no reference to compute with")
    check_not_streamed(datasets, args)
    tokenizer = resolve_tokenizer(model, processing_class, args)
    filled: dict[str, Dataset] = {}
    counts: dict[str, Filled] = {}
    reports: dict[str, Report] = {}
    is_given = ref_model is not None
    with asked_once(
        args, None, ref_model if is_given else model, tokenizer, None if is_given else quantization_config
    ) as asked:
        attention_backend = args.attention_backend if args.packing != "padded" else "auto"
        prepare_model(asked.model, attention_backend=attention_backend, workspace_bytes=args.workspace_bytes)
        check = check_packing(asked.model, autocast=lambda: autocast_of(args))
        is_packed = args.packing != "padded" and check.ok
        if not check.ok and args.packing == "packed":
            raise ValueError(f"packing must be 'auto' or 'padded' for this model, got 'packed': {check.reason}")
        if not check.ok and args.packing == "auto":
            logger.warning(f"Falling back to padded batches, which are slower: {check.reason}")
        cache, bare = asked.cache(args), bare_model(asked.model)
        scorer = replace(asked.scorer(args, is_packed=is_packed, tokenizer=tokenizer), what=what)
        for part, rows in datasets.items():
            with args.main_process_first(desc=f"tokenizing the {part} dataset"):
                prepared, reports[part] = prepare_preference_dataset(
                    rows, tokenizer, args.tokenization_settings(), num_proc=args.dataset_num_proc
                )
            check_rows(asked.model, prepared, part)
            if not takes_brought:
                prepared = with_ref_logps(prepared, [None] * len(prepared))
            filled[part], counts[part] = fill_ref_logps(prepared, cache, scorer, name=part)
        num_parameters = sum(p.numel() for p in bare.parameters())
        what = f"{type(bare).__name__}, {num_parameters:,} parameters"
        return Precomputed(filled, counts, reports, cache.folder, what + (", offloaded" if asked.is_offloaded else ""))
