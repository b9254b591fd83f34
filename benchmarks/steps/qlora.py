"""Does a 7B QLoRA step fit in 24 GB? One pair of 24k tokens, trained under a cap that torch enforces.

A Llama of 7B shape with random weights, its layers' matrices in 4 bits (bitsandbytes' NF4), LoRA of rank 16 on all of
them, the adapter's absence as the reference, gradient checkpointing. The cap is set once the weights are quantized:
loading a published 4-bit model never holds more than that either. Refused without bitsandbytes and peft.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from typing import Any

import torch
from torch import nn

MIB = 2**20
CAP_BYTES = 24 * 10**9  # the 24 GB of a card, not GiB
SEGMENT = 8000  # tokens of the prompt and of each response: 24k in all, the prompt computed once
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
NUM_STEPS = 3


def measure(shape: dict[str, int] | None = None, segment: int = SEGMENT, device: str = "cuda") -> dict[str, Any]:
    """Peak MiB, seconds and losses of the steps, or {"error": why there are none}."""
    try:
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        return {"error": f"not run: {error}"}
    try:
        return _measure(shape or SHAPE, segment, device)
    except torch.OutOfMemoryError as error:
        return {"error": f"does not fit: {str(error).split('. ')[0]}"}


def _measure(shape: dict[str, int], segment: int, device: str) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fastdpo import DPOConfig, DPOTrainer
    from fastdpo.evidence.bench.steps.workloads import WORKLOADS, make_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=4 * segment)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quantize(model.model, device)
    model.is_loaded_in_4bit = True  # where PEFT looks
    cap = _set_cap() if device == "cuda" else 0.0
    rng = random.Random(0)

    def ids() -> list[int]:
        return [rng.randrange(3, shape["vocab_size"]) for _ in range(segment)]

    rows = [{"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids()} for _ in range(NUM_STEPS)]
    losses: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=NUM_STEPS,
            max_length=None,
            learning_rate=1e-4,
            gradient_checkpointing=True,
            bf16=True,
            packing="packed",
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(WORKLOADS["tiny"]),
            peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        step = trainer.training_step

        def keep_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

        trainer.training_step = keep_loss  # type: ignore[method-assign]
        start = time.perf_counter()
        trainer.train()
    first = losses[0].item()
    if not abs(first - math.log(2)) < 1e-2:
        return {"error": f"the first loss must be ln 2, got {first:.6f}"}
    return {
        "tokens_per_pair": 3 * segment,
        "cap_mib": cap / MIB,
        "peak_mib": torch.cuda.max_memory_allocated() / MIB if device == "cuda" else 0.0,
        "reserved_mib": torch.cuda.max_memory_reserved() / MIB if device == "cuda" else 0.0,
        "step_s": (time.perf_counter() - start) / NUM_STEPS,
        "losses": [loss.item() for loss in losses],
    }


def quantize(backbone: nn.Module, device: str) -> None:
    """Puts NF4 matrices in the place of every linear layer, one after the other."""
    import bitsandbytes as bnb

    for parent in list(backbone.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                small = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                    device="meta",
                )
                small.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, small.to(device))  # quantizes


def _set_cap() -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(CAP_BYTES / torch.cuda.get_device_properties(0).total_memory)
    return float(CAP_BYTES)
