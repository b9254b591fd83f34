"""SavedModel: saves models so that they load wherever the original loads, and loads checkpoints completely.

transformers saves weights under the names of the original checkpoint, which can differ from the module's names (experts
one by one, towers under other prefixes). Trainer loads by the module's names and silently skips weights that it does
not find. SavedModel loads a checkpoint with the class that saved it instead.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from fastdpo.modeling.backbone import bare_model, is_composite
from fastdpo.references.adapters import is_peft_model
from fastdpo.training.run import Run
from fastdpo.training.setup.checkpoint_keys import check_all_loaded
from fastdpo.training.setup.models import model_name, where_from
from fastdpo.training.setup.source_files import OtherParts, add_other_parts, copy_processor_files, other_parts


class SavedModel:
    """Adds files to a run's checkpoints that transformers does not save, and loads weights from checkpoints.

    Args:
        processor: the processor that the user gave instead of a tokenizer, or None.
    """

    def __init__(self, run: Run, processor: Any) -> None:
        self.run, self.processor = run, processor

    def add_to(self, folder: str) -> None:
        """Completes the saved weights in `folder`: adds processor files, and the parts of the original checkpoint that
        were not loaded."""
        self.save_processor(folder)
        if self._other_parts is not None and not is_peft_model(self.run.model):
            add_other_parts(bare_model(self.run.model), self._other_parts, folder)

    def save_processor(self, folder: str) -> None:
        """Saves the processor (for images and sound) unchanged, next to the tokenizer."""
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        bare = bare_model(self.run.model)
        if is_composite(bare) or self._other_parts is not None:
            copy_processor_files(model_name(bare), folder, where_from(self.run.args.init_kwargs()))

    @cached_property
    def _other_parts(self) -> OtherParts | None:
        bare = bare_model(self.run.model)
        return other_parts(bare, model_name(bare), where_from(self.run.args.init_kwargs()))

    def load(self, folder: str | None) -> bool:
        """Loads full weights into the model, which must not be sharded. False if the run saves an adapter instead.

        Raises:
            ValueError: the folder lacks a weight of the model, or has a weight that the model lacks.
        """
        bare = bare_model(self.run.model)
        if folder is None or is_peft_model(self.run.model) or not hasattr(type(bare), "from_pretrained"):
            return False
        widest = max((p.dtype for p in bare.parameters()), key=lambda dtype: dtype.itemsize)
        loaded, info = type(bare).from_pretrained(folder, dtype=widest, output_loading_info=True)
        check_all_loaded(folder, info)
        with torch.no_grad():
            bare.load_state_dict(loaded.state_dict())
        return True
