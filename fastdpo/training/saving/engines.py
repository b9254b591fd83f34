"""Resumes a run from a checkpoint that another engine, or another number of processes, has saved.

In: the folder of a checkpoint, and a trainer that is about to load it. Out: weights and optimizer state in the trainer.
There are four kinds of checkpoint: those of one process or DDP, FSDP's whole and divided ones, and DeepSpeed's. All but
the last hold the same state under different names, and load into any run. Refuses, before anything is loaded, what
could not go on exactly: DeepSpeed's files on another number of processes, and steps of another number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.backbone import bare_model
from fastdpo.references.adapters import is_peft_model
from fastdpo.training.saving.progress import load_progress
from fastdpo.training.setup.checkpoint_keys import check_all_loaded

PLAIN, WHOLE, DIVIDED, DEEPSPEED = "one process or DDP", "FSDP, whole", "FSDP, divided", "DeepSpeed"
_WEIGHTS = "pytorch_model_fsdp"


def kind_of(folder: str | Path) -> str:
    """Which engine has saved a checkpoint."""
    if next(Path(folder).glob("global_step*"), None) is not None:
        return DEEPSPEED
    if Path(folder, f"{_WEIGHTS}_0").is_dir():
        return DIVIDED
    return WHOLE if Path(folder, f"{_WEIGHTS}.bin").is_file() else PLAIN


def own_kind(trainer: Any) -> str:
    """Which kind of checkpoint a trainer saves."""
    if trainer.is_deepspeed_enabled:
        return DEEPSPEED
    if not trainer.is_fsdp_enabled:
        return PLAIN
    return WHOLE if "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type) else DIVIDED


def check_can_continue(folder: str, trainer: Any, rows_per_step: int) -> None:
    """Compares a checkpoint with the processes and the engine of this run.

    Raises:
        ValueError: the run could not go on exactly.
    """
    saved, own, num_processes = kind_of(folder), own_kind(trainer), trainer.args.world_size
    progress = load_progress(folder, 0, num_processes)
    others = num_processes if progress is None else progress.num_processes
    if saved != own and DEEPSPEED in (saved, own):
        raise ValueError(
            f"resume_from_checkpoint must come from a run with the same engine, got {folder} of {saved} for {own}:"
            f" resume it there, or start a new run from its weights (--model {folder})"
        )
    if saved != own and own != PLAIN and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            f"resume_from_checkpoint must come from a run with the same engine under FSDP 1, got {folder} of {saved}:"
            " set fsdp_version to 2"
        )
    if others == num_processes or progress is None:
        return
    if saved == DEEPSPEED:
        raise ValueError(
            f"resume_from_checkpoint must come from {num_processes} processes under DeepSpeed, whose files belong to"
            f" one process each, got {folder} of {others}: resume it on {others} processes, or start a new run from its"
            f" weights (--model {folder})"
        )
    if progress.rows_per_step not in (0, rows_per_step):
        raise ValueError(
            f"per_device_train_batch_size times gradient_accumulation_steps times processes must stay"
            f" {progress.rows_per_step} to resume {folder} on {num_processes} processes instead of {others}, got"
            f" {rows_per_step}: the order of the rows would change"
        )


def load_weights(folder: str, model: nn.Module, trainer: Any) -> None:
    """Loads the trained weights of a checkpoint of any kind but DeepSpeed's.

    Args:
        model: as the engine of the trainer has prepared it.
    Raises:
        ValueError: the checkpoint lacks a trained weight.
    """
    kind = kind_of(folder)
    if kind == DIVIDED:
        from accelerate.utils.fsdp_utils import load_fsdp_model

        load_fsdp_model(_plugin(), trainer.accelerator, trainer.model, folder, adapter_only=True)
        return
    if kind == WHOLE:
        found = torch.load(Path(folder, f"{_WEIGHTS}.bin"), map_location="cpu", weights_only=True)
        _copy(found, trainer.model, folder)
    elif is_peft_model(trainer.model):
        _copy_adapter(folder, trainer.model)
    else:
        bare = bare_model(model)
        widest = max((p.dtype for p in bare.parameters()), key=lambda dtype: dtype.itemsize)
        loaded, info = type(bare).from_pretrained(folder, dtype=widest, output_loading_info=True)
        check_all_loaded(folder, info)
        _copy(loaded.state_dict(), bare, folder)


def load_optimizer(folder: str, trainer: Any) -> None:
    """Loads optimizer and scheduler of a checkpoint of any kind but DeepSpeed's, if it has them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    kind, model, optimizer = kind_of(folder), trainer.model, trainer.optimizer
    names = {PLAIN: "optimizer.pt", WHOLE: "optimizer.bin", DIVIDED: "optimizer_0"}
    if not (Path(folder, names[kind]).exists() and Path(folder, "scheduler.pt").is_file()):
        return  # checkpoint_folder has warned
    if kind == DIVIDED:
        from accelerate.utils.fsdp_utils import load_fsdp_optimizer

        load_fsdp_optimizer(_plugin(), trainer.accelerator, optimizer, model, folder)
    else:
        found = torch.load(Path(folder, names[kind]), map_location="cpu", weights_only=True)
        by_name = _by_name(found, model, optimizer) if kind == PLAIN else found
        set_optimizer_state_dict(model, optimizer, by_name, options=StateDictOptions(full_state_dict=True))
    trainer.lr_scheduler.load_state_dict(torch.load(Path(folder, "scheduler.pt"), weights_only=True))


def _plugin() -> Any:
    """What accelerate must know to read a divided checkpoint, also into weights that are whole."""
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")


def _by_name(state: Mapping[str, Any], model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """An optimizer's state by the names of the weights instead of their numbers."""
    name_of = {id(weight): name for name, weight in model.named_parameters()}
    names = [name_of[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: values for number, values in state["state"].items()}, "param_groups": groups}


def _copy_adapter(folder: str, model: Any) -> None:
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    own = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    _fill(own, load_peft_weights(folder, device="cpu"), own.keys(), folder)


def _copy(found: Mapping[str, Tensor], model: nn.Module, folder: str) -> None:
    """Copies whole weights into weights that may be divided."""
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    _fill(model.state_dict(), found, trained, folder)


def _fill(weights: Mapping[str, Tensor], found: Mapping[str, Tensor], trained: Set[str], folder: str) -> None:
    if lost := sorted(trained - found.keys()):
        raise ValueError(f"resume_from_checkpoint must hold all trained weights, got {folder} without {lost[0]}")
    with torch.no_grad():
        for name, weight in weights.items():
            if name in found:
                weight.copy_(_like(found[name], weight))


def _like(whole: Tensor, weight: Tensor) -> Tensor:
    """A whole tensor, divided as the weight is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole.to(weight.device, weight.dtype), weight.device_mesh, weight.placements)
