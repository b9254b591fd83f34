"""Liger's kernels for norms, rotary positions and MLPs, which transformers enables by `use_liger_kernel`.

In: a model and the run's arguments. Out: the same model with the kernels in its layers. Refuses the parts that would
replace fastdpo's head op.
"""

from __future__ import annotations

from torch import nn
from transformers import TrainingArguments

HEAD_PARTS = ("cross_entropy", "fused_linear_cross_entropy")  # of Liger's; they replace the model's forward


def use_layer_kernels(model: nn.Module, args: TrainingArguments) -> None:
    """Installs the kernels before the model is checked and copied as reference; Trainer would do so when training
    starts.

    Raises:
        ValueError: the run is on a CPU, or the config enables a part that fastdpo replaces.
    """
    if not args.use_liger_kernel:
        return
    if args.device.type == "cpu":
        raise ValueError("use_liger_kernel must be False on a CPU: Liger's kernels run on GPUs only, got True")
    config = dict(args.liger_kernel_config or {})
    for part in HEAD_PARTS:
        if config.get(part):
            raise ValueError(
                f"liger_kernel_config must not set {part}: log-probs come from fastdpo's head op, got {config[part]!r}"
            )
        config[part] = False
    args.liger_kernel_config = config  # Trainer applies it again, without effect
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, config)
