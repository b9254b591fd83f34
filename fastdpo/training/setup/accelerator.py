"""The accelerator of a trainer, which keeps working after another config is made.

accelerate has one state per process. TrainingArguments clears it when a config is made, and only the next trainer fills
it again: until then every earlier trainer failed with "`AcceleratorState` object has no attribute `distributed_type`".
"""

from __future__ import annotations

from typing import Any


class KeptAccelerator:
    """An attribute of a class of trainers: the accelerator, whose state is filled again if it was cleared."""

    def __set__(self, trainer: Any, accelerator: Any) -> None:
        vars(trainer)["accelerator"] = accelerator
        vars(trainer)["_state_of_accelerate"] = dict(_state(accelerator))

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        try:
            accelerator = vars(trainer)["accelerator"]
        except KeyError:
            raise AttributeError("accelerator") from None
        state = _state(accelerator)
        if "distributed_type" not in state:
            state.update(vars(trainer)["_state_of_accelerate"])
        return accelerator


def _state(accelerator: Any) -> dict[str, Any]:
    """The state of the process; nothing for an object that stands in for an accelerator."""
    return vars(accelerator.state) if hasattr(accelerator, "state") else {}
