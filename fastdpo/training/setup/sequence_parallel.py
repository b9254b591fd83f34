"""Groups of processes that compute packed rows together (`sequence_parallel_size`): settings in, the group of this
process out.

Processes 0 to N - 1 are the first group, N to 2N - 1 the next. All processes of a group read the same rows. Refused:
numbers of processes that N does not divide, and models whose rotary frequencies follow the longest position of a row,
of which every process sees another.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.sequence_group import SequenceGroup
from fastdpo.training.settings.engine import EngineConfig
from fastdpo.training.setup.rotary import length_dependent_rope


def check_number_of_processes(args: EngineConfig) -> None:
    """Raises:
    ValueError: the processes cannot form groups of `sequence_parallel_size`.
    """
    size = args.sequence_parallel_size
    if args.world_size % size:
        remedy = f"start {size} processes or a multiple, as with torchrun --nproc_per_node {size}"
        raise ValueError(
            f"sequence_parallel_size must divide the number of processes, {args.world_size}, got {size}: {remedy}"
        )


def check_engine_of_groups(args: EngineConfig, *, is_deepspeed: bool) -> None:
    """
    Args:
        is_deepspeed: whether DeepSpeed trains the model, which accelerate's own settings may have chosen.
    Raises:
        ValueError: processes are to work in groups under an engine that does not know them.
    """
    for name in ("sequence_parallel_size", "tensor_parallel_size"):
        if is_deepspeed and (size := getattr(args, name)) > 1:
            raise ValueError(
                f"{name} must be 1 with DeepSpeed, got {size}: this is untested; start with --accelerate_config"
                f" {'sp' if name == 'sequence_parallel_size' else 'tp'}"
            )


def sequence_group(args: EngineConfig) -> SequenceGroup | None:
    """The group of this process; None if each process computes rows by itself. All processes must call this."""
    if args.sequence_parallel_size == 1:
        return None
    check_number_of_processes(args)
    # groups of their own, even for all processes: exchanges must not wait behind DDP's and FSDP's
    return SequenceGroup(dist.new_subgroups(group_size=args.sequence_parallel_size)[0], args.device)


def check_rotary(args: EngineConfig, model: nn.Module) -> None:
    """Raises:
    ValueError: rows of this run may be long enough to change the model's rotary frequencies.
    """
    found = length_dependent_rope(bare_model(model).config.get_text_config())
    if args.sequence_parallel_size == 1 or found is None:
        return
    rope_type, limit = found
    if args.max_length is None or args.max_length > limit:
        raise ValueError(
            f"max_length must be at most {limit} for rope type {rope_type!r} with"
            f" sequence_parallel_size={args.sequence_parallel_size}, got {args.max_length}: beyond, its frequencies"
            " follow the longest position, of which each process sees another"
        )


def read_same_rows(loader: Any, args: EngineConfig) -> Any:
    """The prepared data loader, which gives the processes of a group the same rows."""
    if args.sequence_parallel_size == 1:
        return loader
    parts: list[Any] = [getattr(loader, name, None) for name in ("batch_sampler", "dataset")]
    for part in parts:
        if hasattr(part, "num_processes") and hasattr(part, "process_index"):  # accelerate's, of datasets and streams
            part.num_processes, part.process_index = args.data_parallel_size, args.data_parallel_index
            if args.data_parallel_size == 1:
                part.even_batches = False  # a last step of fewer rows repeats none to fill other groups' batches
    return loader
