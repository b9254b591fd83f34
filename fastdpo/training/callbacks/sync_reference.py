"""A reference that follows the policy: TR-DPO, arXiv 2404.09656, with TRL's names and defaults.

In: the reference of a built trainer and its policy. Every `ref_model_sync_steps` optimizer steps the reference's
weights become `(1 - alpha) * reference + alpha * policy`, alpha = `ref_model_mixup_alpha`. Refuses references without
weights (cached, none), and references with other weights than the policy's.

In a LoRA run whose reference is an adapter, the matrices A and B are mixed one by one, so that the reference stays an
adapter of the same rank. The product of the mixed matrices equals the mixture of the products exactly if alpha = 1, and
nearly while A is close to its initial values. Checkpoints contain the reference, because a mixed reference cannot be
computed again.
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
    "sync_ref_model must be off if the reference is built otherwise than the policy, got True: only weights of equal"
    " names and shapes can be mixed"
)
REFERENCE_FILE = "synced_reference.safetensors"  # in every checkpoint of such a run


def mixed_weights(reference: Reference, policy: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(reference's weight, policy's weight) by name: all weights of two models, or those of the adapter `ref` and the
    active adapter.

    Raises:
        ValueError: reference and policy do not have weights of the same names and shapes.
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
        raise ValueError(
            f"sync_ref_model must be off if reference is {reference.mode!r}, got True: this reference has no weights"
        )
    if any(frozen.shape != trained.shape for frozen, trained in mixed.values()):
        raise ValueError(_OTHERWISE)
    return {name: weights for name, weights in mixed.items() if weights[0].is_floating_point()}


@torch.no_grad()
def mix(weights: dict[str, tuple[Tensor, Tensor]], alpha: float) -> None:
    """Moves each reference weight, in place, by the share `alpha` of its distance to the policy's weight.

    Rounds once, and equal weights stay exactly equal: otherwise untrained weights would drift in bf16.
    """
    for reference, policy in weights.values():
        reference.lerp_(policy.to(reference), alpha)


class SyncReference(TrainerCallback):
    """Moves the reference every `ref_model_sync_steps` optimizer steps, and saves it with every checkpoint.

    Args:
        is_sharded: whether the weights are sharded over processes.
    Raises:
        ValueError: the weights are sharded, or the reference cannot be mixed with the policy.
    """

    def __init__(self, reference: Reference, policy: nn.Module, *, is_sharded: bool) -> None:
        if is_sharded:
            raise ValueError(
                "sync_ref_model must be off under FSDP, DeepSpeed and tensor parallelism, which divide the weights, got"
                " True"
            )
        self.weights = mixed_weights(reference, policy)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            mix(self.weights, args.ref_model_mixup_alpha)

    def save(self, folder: str) -> None:
        """Saves the reference into a checkpoint."""
        from safetensors.torch import save_file

        tensors = {name: reference.detach().cpu().contiguous() for name, (reference, _) in self.weights.items()}
        save_file(tensors, Path(folder) / REFERENCE_FILE)

    @torch.no_grad()
    def load(self, folder: str) -> None:
        """Loads the reference from a checkpoint; warns if the checkpoint does not contain one."""
        from safetensors.torch import load_file

        path = Path(folder) / REFERENCE_FILE
        if not path.is_file():
            logger.warning(
                f"{folder} comes from a run without sync_ref_model: training resumes with the initial reference"
            )
            return
        for name, tensor in load_file(path).items():
            self.weights[name][0].copy_(tensor)
