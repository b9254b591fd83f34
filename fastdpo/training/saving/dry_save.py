"""Saves everything but the weights before the first step, so that a later checkpoint does not fail for a known reason.

In: a run that is about to train. Out: nothing; the files are deleted again. Refused: a config, tokenizer, adapter or
card that cannot be saved, and weights that share memory although the model does not declare it. transformers refuses
to save a generation config with sampling flags but without `do_sample`; such a config gets `do_sample`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from fastdpo.modeling.backbone import bare_model
from fastdpo.references.adapters import REFERENCE_ADAPTER, is_peft_model
from fastdpo.training.run import Run
from fastdpo.training.saving.saved import SavedModel

logger = logging.get_logger(__name__)


def check_can_save(run: Run, saved: SavedModel, write_card: Callable[[str], None], *, is_sharded: bool = False) -> None:
    """Saves all parts of a checkpoint except weights and optimizer into a temporary folder.

    Args:
        is_sharded: whether the weights are sharded over processes. Sharded weights are not checked.
    Raises:
        ValueError: a part cannot be saved.
    """
    if not run.args.should_save:
        return
    _mend_generation_config(bare_model(run.model))
    with tempfile.TemporaryDirectory(prefix="fastdpo_dry_save_") as folder:
        for what, save in _parts(run, saved, write_card, folder, is_sharded=is_sharded):
            try:
                save()
            except Exception as error:  # libraries and models' own code raise many types
                raise ValueError(
                    f"{what} must be savable, or the first checkpoint would fail, got {type(error).__name__}: {error}"
                ) from error


def _parts(
    run: Run, saved: SavedModel, write_card: Callable[[str], None], folder: str, *, is_sharded: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    model: Any = bare_model(run.model)
    tokenizer = run.processing_class
    yield "the model's config", lambda: model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        yield "the model's generation_config", lambda: model.generation_config.save_pretrained(folder)
    yield "processing_class, the tokenizer,", lambda: tokenizer.save_pretrained(folder)
    yield "the processor", lambda: saved.save_processor(folder)
    yield "args, the settings,", lambda: torch.save(run.args, Path(folder) / "training_args.bin")
    yield "the model card", lambda: write_card(folder)
    if not is_peft_model(run.model):
        if not is_sharded:
            yield "the model's weights", lambda: _check_shared(model)
        return
    configs: Any = run.model.peft_config
    for name, config in configs.items():
        if name != REFERENCE_ADAPTER:
            yield f"the config of the adapter {name!r}", partial(config.save_pretrained, folder)


def _check_shared(model: Any) -> None:
    """Runs transformers' own check of weights that share memory. Copies nothing."""
    try:
        from transformers.modeling_utils import remove_tied_weights_from_state_dict
    except ImportError:  # in other releases of transformers, the first save runs the check
        return
    remove_tied_weights_from_state_dict(dict(model.state_dict()), model)


def _mend_generation_config(model: Any) -> None:
    """Sets `do_sample` if the config has sampling flags without it, as Vicuna's has: its author meant sampling."""
    config = getattr(model, "generation_config", None)
    if config is None or config.do_sample:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError:  # another error, which the save reports
            config.do_sample = False
            return
        logger.warning(
            "The model's generation_config has sampling flags without do_sample, which transformers refuses to save."
            " fastdpo sets do_sample."
        )
