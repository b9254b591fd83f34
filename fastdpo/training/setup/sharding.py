"""What FSDP2 must be told so that the numbers of a sharded run are those of one process.

In: the accelerator of a trainer, before it shards the model. Out: its FSDP plugin with a mixed precision policy that
does not round what the model returns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def keep_outputs_whole(accelerator: Any) -> None:
    """Keeps summed log-probs and losses in fp32, which accelerate's policy for bf16 and fp16 would round.

    A response of -350 nats would be off by up to one nat in bf16. Layers still compute in the policy's param_dtype.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:  # FSDP1's policy has no such field
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)
