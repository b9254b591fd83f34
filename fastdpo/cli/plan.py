"""`fastdpo plan`: which settings of a model fit a GPU, and the longest pair that each takes.

In: a model's name, folder or config.json, and an amount of memory. Out: a table (or JSON) of what to train, how, with
the estimate of each part. From the config alone: no weight is loaded, no GPU is needed. Refuses amounts that are none,
and a model that fits in no way.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from fastdpo.cli.console import make_console
from fastdpo.modeling.packed import bare_model
from fastdpo.training.dry_run import RowShape, StepPeak, dry_step, fake_mode, shape_only
from fastdpo.training.memory import (
    BYTES_IN_4_BIT,
    CUDA_WORKSPACE_BYTES,
    MemoryEstimate,
    estimate_step,
    model_bytes,
    planned_impl,
)

ROUNDING = 256  # tokens
MEASURED_TOKENS = (512, 8192, 131072)  # what is between them and beyond is on the lines through them
REFINEMENTS, CLOSE = 5, 0.98  # dry runs at most, and the share of the memory at which no more are made
USABLE_SHARE = 0.95  # of the memory; the rest is for fragments of the allocator
GB = 1e9
_SHORT = {"optimizer": "state", "reference": "ref.", "gradients": "grads", "activations": "activ.", "overhead": "CUDA"}
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Settings:
    """One way to train the model."""

    method: str  # "full", "lora" or "qlora"
    checkpointing: bool
    reference: str  # "frozen", "cached" or "adapter"
    optim: str

    def options(self, tokens: int, lora_r: int) -> str:
        """What `fastdpo train` is to be given."""
        parts = ["--bf16 true", f"--gradient_checkpointing {str(self.checkpointing).lower()}"]
        if self.method != "full":
            parts += ["--use_peft", f"--lora_r {lora_r}", '--model_init_kwargs \'{"dtype": "bfloat16"}\'']
        if self.method == "qlora":
            parts.append("--load_in_4bit")
        parts += [f"--reference {self.reference}", f"--optim {self.optim}", f"--max_tokens_per_microbatch {tokens}"]
        return " ".join(parts)


# From what changes the model most and runs fastest to what holds least. Full training keeps fp32 weights.
CANDIDATES = [
    *(
        Settings("full", checkpointing, reference, optim)
        for optim in ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit")
        for checkpointing in (False, True)
        for reference in ("frozen", "cached")
    ),
    *(
        Settings(method, checkpointing, "adapter", "adamw_torch_fused")
        for method in ("lora", "qlora")
        for checkpointing in (False, True)
    ),
]


@dataclass(frozen=True)
class Plan:
    """One way to train, with what fits."""

    settings: Settings
    tokens: int  # of the largest micro-batch that fits, which is the longest pair, prompt once; 0 where none does
    estimate: MemoryEstimate  # at so many tokens, or of a pair of ROUNDING tokens where nothing fits


def main(argv: list[str]) -> None:
    """Raises:
    ValueError: anything that the user can mend; also where no settings fit.
    """
    parser = _Parser(prog="fastdpo plan", description="Settings that fit a GPU, and the longest pair each takes.")
    parser.add_argument(
        "--model", required=True, help="Name on the Hub, folder, or config.json. Only its config is read."
    )
    parser.add_argument("--gpu_memory", "--gpu-memory", required=True, help="Such as 24GB (10**9) or 24GiB (2**30).")
    parser.add_argument(
        "--max_length",
        "--max-length",
        type=int,
        help="Tokens of prompt and response that must fit; settings that take less are shown as not fitting.",
    )
    parser.add_argument("--lora_r", "--lora-r", type=int, default=16, help="Rank of the adapter.")
    parser.add_argument("--trust_remote_code", action="store_true", help="As in from_pretrained.")
    parser.add_argument("--json", action="store_true", help="Print JSON, sizes in bytes.")
    options = parser.parse_args(argv)
    for name in ("max_length", "lora_r"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    memory = parse_bytes(options.gpu_memory)
    config = load_config(options.model, options.trust_remote_code)
    least = ROUNDING if options.max_length is None else pair_tokens(options.max_length)
    console = make_console()
    if options.json:
        plans = make_plans(config, memory, options.lora_r, least)
    else:
        with console.status(f"running {options.model} without weights"):
            plans = make_plans(config, memory, options.lora_r, least)
    fitting = [plan for plan in plans if plan.tokens]
    if not fitting:
        needed = min(plans, key=lambda plan: plan.estimate.total)
        raise ValueError(
            f"gpu_memory must be at least {needed.estimate.total / USABLE_SHARE / GB:.1f}GB for {options.model} and"
            f" pairs of {least} tokens, got {options.gpu_memory}; that is {needed.settings.method} with"
            f" {needed.settings.optim}, gradient checkpointing {'on' if needed.settings.checkpointing else 'off'}"
        )
    if options.json:
        print(json.dumps([_record(plan, options.lora_r) for plan in plans], indent=1))
        return
    console.print(_table(plans, config))
    console.print(
        "Sizes in GB (10**9 bytes), estimated at the tokens shown: prompt once and both responses, which have half of"
        f" them. {1 - USABLE_SHARE:.0%} of the memory is left for fragments. No estimate has been compared with a GPU"
        " yet; on yours `--max_tokens_per_microbatch auto` measures."
    )
    console.print(f"\nThe first that fits:\n  fastdpo train --model {options.model} ... ", end="")
    length = "" if options.max_length is None else f"--max_length {options.max_length} "
    print(length + fitting[0].settings.options(fitting[0].tokens, options.lora_r))


def parse_bytes(text: str) -> int:
    """24GB, 24GiB, 24000MB, "24 G" (as GB) or a number of bytes.

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]) or float(found[1]) == 0:
        raise ValueError(f"gpu_memory must be an amount like 24GB or 24GiB, got {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].upper()])


def load_config(name: str, trust_remote_code: bool = False) -> Any:
    """Raises:
    ValueError: there is no such config, or it is not of a text-only causal LM.
    """
    from transformers import AutoConfig

    from fastdpo.training.models import refuse_vision

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model must be a name on the Hub, a folder or a config.json, got {name!r}: {error}"
        ) from error
    refuse_vision(config, name)
    return config


def pair_tokens(max_length: int) -> int:
    """Tokens of a packed pair whose longer sequence has max_length: prompt of two thirds, and two responses."""
    return math.ceil(max_length * 4 / 3)


def pair_shape(num_tokens: int) -> RowShape:
    """One pair: half of the tokens prompt, a quarter each response."""
    prompt, chosen = num_tokens // 2, num_tokens // 2 + num_tokens // 4
    return RowShape(((0, chosen, 0, 0), (chosen, num_tokens, 0, prompt)), num_tokens - prompt)


def make_plans(config: Any, memory: int, lora_r: int, least: int) -> list[Plan]:
    """Every candidate, with the largest micro-batch that `memory` bytes hold; 0 tokens where `least` do not fit."""
    models: dict[tuple[bool, bool], Callable[[Settings, int], MemoryEstimate]] = {}
    plans = []
    for settings in CANDIDATES:
        key = (settings.method == "full", settings.checkpointing)
        if key not in models:
            models[key] = _estimator(config, *key, lora_r)
        plans.append(_plan(settings, models[key], memory * USABLE_SHARE, least))
    return plans


def _plan(settings: Settings, estimate: Callable[[Settings, int], MemoryEstimate], memory: float, least: int) -> Plan:
    smallest = estimate(settings, least)
    if smallest.total > memory:
        return Plan(settings, 0, smallest)
    known = [(tokens, estimate(settings, tokens).total) for tokens in MEASURED_TOKENS]
    below, above = next((pair for pair in pairwise(known) if memory <= pair[1][1]), tuple(known[-2:]))
    tokens = 0
    for _ in range(
        REFINEMENTS
    ):  # memory is made of lines that bend upwards: what is between two points is below theirs
        slope = max(above[1] - below[1], 1) / (above[0] - below[0])
        guess = max(int(below[0] + (memory - below[1]) / slope) // ROUNDING * ROUNDING, 0)
        if guess < ROUNDING or guess == tokens:
            break
        total = estimate(settings, guess).total
        if total <= memory:
            tokens = max(tokens, guess)
            below = (guess, total)
            if total > CLOSE * memory or guess >= above[0]:
                break
        else:
            above = (guess, total)
            if guess <= below[0]:
                below = (0, min(below[1], total - 1))
    if tokens < least:
        return Plan(settings, 0, smallest)
    return Plan(settings, tokens, estimate(settings, tokens))


def _estimator(config: Any, full: bool, checkpointing: bool, lora_r: int) -> Callable[[Settings, int], MemoryEstimate]:
    """Estimates by settings and tokens; dry runs are shared by settings that differ in sums over parameters alone."""
    mode = fake_mode()
    model, plain_bytes, four_bit_bytes, largest = _build(config, full, lora_r)
    dry: Any = shape_only(model, mode)
    if checkpointing:
        bare = bare_model(dry)
        (getattr(bare, "activation_checkpointing_enable", None) or bare.gradient_checkpointing_enable)()
    peaks: dict[int, StepPeak] = {}

    def estimate(settings: Settings, tokens: int) -> MemoryEstimate:
        if tokens not in peaks:
            peaks[tokens] = dry_step(
                dry,
                pair_shape(tokens),
                mode,
                impl=planned_impl(),
                varlen=True,
                autocast=torch.bfloat16,
                accumulates=True,
                workspace_bytes=CUDA_WORKSPACE_BYTES,
            )
        reference = plain_bytes if settings.reference == "frozen" else 0
        sizes = {"weight_bytes": plain_bytes, "reference_bytes": reference}
        result = estimate_step(dry, peaks[tokens], optim=settings.optim, **sizes, on_gpu=True)
        if settings.method == "qlora":  # a layer at a time is turned back into bf16
            result = replace(result, weights=four_bit_bytes, casts=result.casts + largest)
        return result

    return estimate


def _build(config: Any, full: bool, lora_r: int) -> tuple[nn.Module, int, int, int]:
    """A model without storage; its bytes, those with a base in 4 bits, and those of its largest layer in bf16."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if full else torch.bfloat16)
    model.tie_weights()
    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    if not full:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ValueError('fastdpo plan needs the peft package: pip install "fastdpo[peft]"') from error
        lora = LoraConfig(r=lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
        model.enable_input_require_grads()
    plain = model_bytes(model)
    saved = sum(w.numel() * (w.element_size() - BYTES_IN_4_BIT) for w in linear)
    return model, plain, int(plain - saved), max((w.numel() * 2 for w in linear), default=0)


def _record(plan: Plan, lora_r: int) -> dict[str, Any]:
    settings = plan.settings
    return {
        "method": settings.method,
        "gradient_checkpointing": settings.checkpointing,
        "reference": settings.reference,
        "optim": settings.optim,
        "fits": plan.tokens > 0,
        "max_tokens_per_microbatch": plan.tokens,
        "longest_pair_tokens": plan.tokens,
        "longest_sequence_tokens": plan.tokens * 3 // 4,
        "bytes": {**plan.estimate.parts(), "total": plan.estimate.total},
        "options": settings.options(plan.tokens, lora_r) if plan.tokens else None,
    }


def _table(plans: Sequence[Plan], config: Any) -> Table:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    caption = f"The model's own limit is {positions:,} tokens of prompt and response." if positions else None
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("train", "checkpointing", "reference", "optim"):
        table.add_column(name, no_wrap=True)
    parts = list(plans[0].estimate.parts())
    for name in ("longest pair", *(_SHORT.get(part, part) for part in parts), "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        settings, sizes = plan.settings, plan.estimate.parts()
        figures = [_gigabytes(sizes[name]) for name in parts]
        tokens = f"{plan.tokens:,}" if plan.tokens else "does not fit"
        table.add_row(
            settings.method,
            "on" if settings.checkpointing else "off",
            settings.reference,
            settings.optim,
            tokens,
            *figures,
            _gigabytes(plan.estimate.total),
            style=None if plan.tokens else "dim",
        )
    return table


def _gigabytes(size: int) -> str:
    return f"{size / GB:.1f}" if size < 100 * GB else f"{size / GB:.0f}"


class _Parser(argparse.ArgumentParser):
    """Raises in place of exiting, so that every mistake is reported in one way."""

    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (all options: {self.prog} --help)")
