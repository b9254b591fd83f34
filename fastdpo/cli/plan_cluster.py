"""`fastdpo plan --gpus N [--nodes M]`: what fits several GPUs, what processes send, and how long a step takes.

In: the plans of a cluster. Out: a table, or JSON with bytes and seconds. Refuses a cluster in which nothing fits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from fastdpo.training.memory.card.plans import USABLE_SHARE
from fastdpo.training.memory.cluster.hardware import Cluster
from fastdpo.training.memory.cluster.plans import ClusterPlan
from fastdpo.training.memory.cluster.step_time import ASSUMPTIONS

GB = 1e9
DEFAULT_LENGTH = 3072  # tokens of prompt and response: a pair of 4,096


def show(plans: Sequence[ClusterPlan], cluster: Cluster, model: str, num_pairs: int, pair: int, console: Any) -> None:
    """Raises:
    ValueError: nothing fits.
    """
    check_fits(plans, cluster, model, pair)
    console.print(_table(plans))
    console.print(
        f"{cluster.nodes} x {cluster.gpus} GPUs; sizes in GB (10**9 bytes) of one GPU at the longest pair, of which"
        f" {1 - USABLE_SHARE:.0%} stays free. state: weights, gradients and AdamW's moments. ref.: a frozen reference."
        " gathered: whole layers under FSDP, bf16 copies of weights otherwise. adapter: the model without its LoRA is"
        " the reference; cached: log-probs are computed once. step, sent, compute and network (seconds) are for a step"
        f" of {num_pairs} pairs of {pair:,} tokens, prompt once. No estimate has been compared with GPUs yet. Assumed:"
    )
    for assumption in ASSUMPTIONS:
        console.print(f"  - {assumption}", markup=False)
    console.print("\nThe fastest of each kind that fits:")
    for method in dict.fromkeys(plan.method for plan in plans):
        seconds = [(plan, plan.time.total) for plan in plans if plan.method == method and plan.time is not None]
        if seconds:
            best, _ = min(seconds, key=lambda pair: pair[1])
            command = f"fastdpo train --model {model} ... {options(best, cluster)}"
            console.print(f"  {command}", soft_wrap=True, markup=False)


def check_fits(plans: Sequence[ClusterPlan], cluster: Cluster, model: str, pair: int) -> None:
    """Raises:
    ValueError: no plan takes a pair of so many tokens.
    """
    if any(plan.tokens for plan in plans):
        return
    least = min(plans, key=lambda plan: plan.memory.total)
    raise ValueError(
        f"gpu_memory must be at least {least.memory.total / USABLE_SHARE / GB:.1f}GB for {model} and pairs of {pair}"
        f" tokens on {cluster.nodes} x {cluster.gpus} GPUs, got {cluster.memory / GB:.1f}GB; that is {least.method}"
        f" with {least.layout.name}, gradient checkpointing {'on' if least.checkpointing else 'off'}; use more GPUs"
    )


def options(plan: ClusterPlan, cluster: Cluster) -> str:
    """The options for `fastdpo train`."""
    parts = [f"--num_processes {cluster.num_gpus}"]
    if cluster.nodes > 1:
        parts.append(f"--num_machines {cluster.nodes}")
    layout = plan.layout
    parts.append(f"--accelerate_config {_CONFIGS[_kind(plan)]}")
    if layout.tensor > 1:
        parts.append(f"--tensor_parallel_size {layout.tensor}")
    if layout.sequence > 1:
        parts.append(f"--sequence_parallel_size {layout.sequence}")
    parts += ["--bf16 true", f"--gradient_checkpointing {str(plan.checkpointing).lower()}"]
    parts += ["--use_peft"] * (plan.method == "lora")
    parts.append(f"--reference {plan.reference}")
    parts.append(f"--max_tokens_per_microbatch {plan.tokens}")
    return " ".join(parts)


_CONFIGS = {"DDP": "multi_gpu", "FSDP2": "fsdp2", "HSDP": "hybrid", "TP": "tp", "SP": "sp"}


def _kind(plan: ClusterPlan) -> str:
    layout = plan.layout
    return "SP" if layout.sequence > 1 else "TP" if layout.tensor > 1 else layout.name


def records(plans: Sequence[ClusterPlan], cluster: Cluster) -> str:
    """JSON: a list of plans, with bytes and seconds."""
    return json.dumps([_record(plan, cluster) for plan in plans], indent=1)


def _record(plan: ClusterPlan, cluster: Cluster) -> dict[str, Any]:
    time = plan.time
    sizes = {name: int(size) for name, size in plan.memory.parts().items()}
    return {
        "method": plan.method,
        "layout": plan.layout.name,
        "gradient_checkpointing": plan.checkpointing,
        "reference": plan.reference,
        "fits": plan.tokens > 0,
        "longest_pair_tokens": plan.tokens,
        "longest_sequence_tokens": plan.tokens * 3 // 4,
        "bytes": {**sizes, "total": sum(sizes.values())},
        "step": time
        and {
            "microbatches": time.microbatches,
            "sent_bytes": int(time.sent),
            "compute_s": time.compute,
            "overlapped_network_s": time.overlapped,
            "blocking_network_s": time.blocking,
            "optimizer_s": time.optimizer,
            "total_s": time.total,
        },
        "options": options(plan, cluster) if plan.tokens else None,
    }


def _table(plans: Sequence[ClusterPlan]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("train", "over GPUs", "checkpointing", "reference"):
        table.add_column(name, no_wrap=True)
    of_memory = ("state", "ref.", "gathered", "activ.", "total")
    for name in ("longest pair", *of_memory, "sent", "compute", "network", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        memory, time = plan.memory, plan.time
        sizes = (
            memory.weights + memory.optimizer + memory.gradients,
            memory.reference,
            memory.gathered,
            memory.activations + memory.head,
            memory.total,
        )
        seconds = ["", "", "", ""]
        if time is not None:
            seconds = [f"{time.sent / GB:.1f}"]
            seconds += [f"{s:.2f} s" for s in (time.compute, time.overlapped + time.blocking, time.total)]
        table.add_row(
            plan.method,
            plan.layout.name,
            "on" if plan.checkpointing else "off",
            plan.reference,
            f"{plan.tokens:,}" if plan.tokens else "does not fit",
            *(f"{size / GB:.1f}" for size in sizes),
            *seconds,
            style=None if plan.tokens else "dim",
        )
    return table
