"""SavedModel: what is saved loads where the original loads, and is read back as it was saved.

transformers writes weights under the names of the checkpoint that they came from, which are not always the module's
(experts one by one, towers under other prefixes), and Trainer reads them back by the module's names: what it does not
find stays as it is. Here a checkpoint is read by the class that wrote it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from fastdpo.modeling.backbone import is_composite
from fastdpo.modeling.packed import bare_model
from fastdpo.references.adapters import is_peft_model
from fastdpo.training.run import Run
from fastdpo.training.setup.checkpoint_keys import check_all_loaded
from fastdpo.training.setup.models import model_name, where_from
from fastdpo.training.setup.source_files import OtherParts, add_other_parts, copy_processor_files, other_parts


class SavedModel:
    """The files of a run's checkpoints that are not transformers' own, and how weights come back from them.

    Args:
        processor: that brought the tokenizer, where one was given.
    """

    def __init__(self, run: Run, processor: Any) -> None:
        self.run, self.processor = run, processor

    def add_to(self, folder: str) -> None:
        """Writes what belongs beside the weights in `folder`: processor files, and what the original checkpoint holds
        that was not loaded."""
        self.save_processor(folder)
        if self._other_parts is not None and not is_peft_model(self.run.model):
            add_other_parts(bare_model(self.run.model), self._other_parts, folder)

    def save_processor(self, folder: str) -> None:
        """What turns images and sound into the model's inputs, as it came, beside the tokenizer."""
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
        """Reads whole weights into the model, which must not be sharded; False where an adapter is what was saved.

        Raises:
            ValueError: a weight is missing in the folder, or one is there that the model does not have.
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
