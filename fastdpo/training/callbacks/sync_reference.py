"""A reference that follows the policy: TR-DPO, arXiv 2404.09656, with TRL's names and defaults.

In: the reference of a built trainer and its policy. Every `ref_model_sync_steps` optimizer steps the reference's
weights become `(1 - alpha) * reference + alpha * policy`, alpha = `ref_model_mixup_alpha`. Refuses references that have
no weights to mix (cached, none), or others than the policy's.

A LoRA run whose reference is an adapter mixes adapters: A and B each, so that the reference stays an adapter of the
same rank. Their product is the mixture of the products exactly at alpha = 1, and nearly so while A is close to its
start. A checkpoint holds the reference as well, because nothing else knows it once it has been mixed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from fastdpo.references import AdapterReference, FrozenReference, Reference
from fastdpo.references.adapters import reference_and_policy_weights

logger = logging.get_logger(__name__)

_OTHERWISE = (
    "sync_ref_model must be off where the reference is built otherwise than the policy: weights of equal names and"
    " shapes are mixed"
)
REFERENCE_FILE = "synced_reference.safetensors"  # in every checkpoint of such a run


def mixed_weights(reference: Reference, policy: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(reference's, policy's) weight by name: of two models all, of adapters those of `ref` and of the active one.

    Raises:
        ValueError: there are no two sets of weights of the same names and shapes.
    """
    mixed: dict[str, tuple[Tensor, Tensor]]
    if isinstance(reference, FrozenReference):
        theirs, ours = dict(reference.model.named_parameters()), dict(policy.named_parameters())
        if theirs.keys() != ours.keys():
            raise ValueError(_OTHERWISE)
        mixed = {name: (theirs[name], ours[name]) for name in theirs}
    elif isinstance(reference, AdapterReference):
        names = {id(weight): name for name, weight in policy.named_parameters()}
        pairs = reference_and_policy_weights(policy)
        mixed = {names[id(frozen)]: (frozen, trained) for frozen, trained in pairs if id(frozen) in names}
    else:
        raise ValueError(f"sync_ref_model must be off with the reference {reference.mode!r}: it has no weights to mix")
    if any(frozen.shape != trained.shape for frozen, trained in mixed.values()):
        raise ValueError(_OTHERWISE)
    return {name: weights for name, weights in mixed.items() if weights[0].is_floating_point()}


@torch.no_grad()
def mix(weights: dict[str, tuple[Tensor, Tensor]], alpha: float) -> None:
    """Moves each reference weight, in place, the share `alpha` of the way to the policy's.

    Rounded once, and not at all where both are equal: in bf16, weights that are not trained would drift otherwise.
    """
    for reference, policy in weights.values():
        reference.lerp_(policy.to(reference), alpha)


class SyncReference(TrainerCallback):
    """Mixes at the end of every `ref_model_sync_steps`-th optimizer step, and saves with every checkpoint.

    Args:
        is_sharded: processes hold parts of the weights.
    Raises:
        ValueError: the run has no reference that could be mixed.
    """

    def __init__(self, reference: Reference, policy: nn.Module, *, is_sharded: bool) -> None:
        if is_sharded:
            raise ValueError(
                "sync_ref_model must be off under FSDP and DeepSpeed, whose processes hold parts of weights"
            )
        self.weights = mixed_weights(reference, policy)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            mix(self.weights, args.ref_model_mixup_alpha)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from safetensors.torch import save_file

        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            tensors = {name: reference.detach().cpu().contiguous() for name, (reference, _) in self.weights.items()}
            save_file(tensors, folder / REFERENCE_FILE)

    @torch.no_grad()
    def load(self, checkpoint: str) -> None:
        """Takes the reference from a checkpoint of such a run; warns where it has none."""
        from safetensors.torch import load_file

        path = Path(checkpoint) / REFERENCE_FILE
        if not path.is_file():
            logger.warning(
                f"{checkpoint} comes from a run without sync_ref_model: the reference is what it was before training"
            )
            return
        for name, tensor in load_file(path).items():
            self.weights[name][0].copy_(tensor)
