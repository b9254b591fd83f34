"""Can several processes compute a packed row of this model together? Asked once before training, on all of them.

In: a prepared model that runs packed rows, the group, and the result of the self-check. Out: nothing. Refused with the
reason: models that mix tokens outside the attention interface or with masks of their own, and models whose log-probs of
a few short pairs, each process with its part, are not those of the whole rows. The trial assumes nothing from a model's
name.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fastdpo.data.batches.layout import lay_out
from fastdpo.data.batches.packing import pack_layouts
from fastdpo.data.batches.shares import with_shares
from fastdpo.modeling.backbone import bare_model, text_ids
from fastdpo.modeling.head import execution_device
from fastdpo.modeling.mixers import mixers_of
from fastdpo.modeling.packed import packed_logps
from fastdpo.modeling.prepared import prepare_model, prepared_state
from fastdpo.modeling.self_check import PackingCheck, in_fp32_where_it_fits, whole_fp32_products
from fastdpo.modeling.sequence_group import SequenceGroup
from fastdpo.types import PackedBatch, TokenizedPair

# Largest difference of a summed log-prob, relative to 1 + its size, that rounding explains
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_LENGTHS = ((5, 7, 3), (9, 2, 6), (1, 4, 8))  # of prompt, chosen and rejected; parts end inside each of them


def check_sequence_parallel(model: nn.Module, group: SequenceGroup, check: PackingCheck, *, impl: str = "auto") -> None:
    """Raises:
    ValueError: the processes of the group cannot compute rows of this model together; the same on all of them.
    """
    state, mixers = prepared_state(model), mixers_of(bare_model(model))
    why = ""
    if not check.ok:
        why = f"it cannot run packed rows ({check.reason})"
    elif mixers is not None and mixers.names:
        why = f"{mixers.describe(bare_model(model))} mix tokens outside attention"
    elif state.masks not in ("none", "token"):
        why = "its layers add masks to their own logits"
    if why:
        raise ValueError(
            f"sequence_parallel_size must be 1 for {type(bare_model(model)).__name__}, got {group.size}: {why}; to fit"
            " longer pairs, use gradient_checkpointing, FSDP2 or LoRA"
        )
    prepare_model(model, sequence_group=group)
    has_numbers = all(not p.is_meta and type(p.data) is Tensor for p in model.parameters())
    device = execution_device(bare_model(model))
    if not bool(group.gathered(torch.tensor([has_numbers], device=device)).all()):
        return  # weights that one process loads for all, or in parts: nothing to look at yet
    error, dtype = _error(in_fp32_where_it_fits(model), group, impl, device)
    worst = float(group.gathered(torch.tensor([error], device=device)).max())
    if not worst <= _TOLERANCE[dtype]:
        raise ValueError(
            f"sequence_parallel_size must be 1 for {type(bare_model(model)).__name__}, got {group.size}: log-probs"
            f" differ by {worst:.1e} from those of one process (rounding explains {_TOLERANCE[dtype]:.0e}); tokens"
            " affect each other outside attention, or the processes hold different weights"
        )


def _error(model: nn.Module, group: SequenceGroup, impl: str, device: torch.device) -> tuple[float, torch.dtype]:
    """The largest relative difference between rows in parts and whole, and the dtype of the weights."""
    batch = _batch(model, group.size).to(device)
    was_training, dtype = model.training, next(model.parameters()).dtype
    model.eval()
    try:
        with torch.no_grad(), whole_fp32_products():
            found = packed_logps(model, batch, impl=impl).sequences.sums.double()
            expected = packed_logps(model, replace(batch, shares=None), impl=impl).sequences.sums.double()
    finally:
        model.train(was_training)
    return ((found - expected).abs() / (1 + expected.abs())).max().item(), dtype


def _batch(model: nn.Module, num_processes: int) -> PackedBatch:
    ids, generator = text_ids(bare_model(model)), torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return ids[torch.randint(len(ids), (length,), generator=generator)].tolist()

    pairs = [TokenizedPair(*map(draw, lengths)) for lengths in _LENGTHS]
    layouts = [lay_out(pair, (number,) * 2) for number, pair in enumerate(pairs)]
    return with_shares(pack_layouts(layouts, multiple_of=num_processes), num_processes)
