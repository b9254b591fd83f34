"""A model for many dry runs: of layers that are alike a few run, and all of them only if that is not enough.

In: a model without storage. Out: the peaks of its steps, to the byte those that `dry_step` measures on all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastdpo.training.memory.dry_run import RowShape, StepPeak, dry_step, shape_only
from fastdpo.training.memory.folding import NotPeriodic, find_fold


class DryModel:
    """Copies of the model without memory, made when they are first needed.

    Args:
        mode: from `fake_mode`.
        prepare: what to do with a copy before its first step: checkpointing, tiles.
        offload: whether `prepare` moves checkpoints to the host.
        every_n_layers: one layer of so many that `prepare` checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: Any,
        prepare: Callable[[nn.Module], Any] | None = None,
        *,
        offload: bool = False,
        every_n_layers: int = 1,
    ) -> None:
        self._model, self._mode, self._prepare = model, mode, prepare
        self._fold = find_fold(model, offload, every_n_layers)
        self._dry = self._copy()

    def step(self, row: RowShape, **settings: Any) -> StepPeak:
        """As `dry_step`."""
        if self._fold is not None:
            try:
                return dry_step(self._dry, row, self._mode, fold=self._fold, **settings)
            except NotPeriodic:
                self._fold = None
                self._dry = self._copy()
        return dry_step(self._dry, row, self._mode, **settings)

    def _copy(self) -> nn.Module:
        dry = shape_only(self._model, self._mode, self._fold)
        if self._prepare is not None:
            self._prepare(dry)
        return dry
