"""`fastdpo plan`: which settings of a model fit a GPU, or several, and the longest pair for each.

In: a model's name, folder or config.json, and an amount of memory. Out: a table (or JSON) of training methods and
settings, with an estimate of each part of the memory. It needs only the config: it loads no weights and needs no GPU.
Refuses invalid amounts, and a model that fits with no settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from rich import box
from rich.table import Table

from fastdpo.cli.console import make_console
from fastdpo.cli.options.parser import RaisingParser
from fastdpo.cli.plan_cluster import DEFAULT_LENGTH, check_fits, records, show
from fastdpo.data.sources.nearest import check_model_folder
from fastdpo.training.memory.cluster.hardware import Cluster, make_cluster
from fastdpo.training.memory.cluster.plans import make_cluster_plans
from fastdpo.training.memory.plan import ROUNDING, USABLE_SHARE, Plan, Settings, make_plans, pair_tokens
from fastdpo.training.setup.model_kinds import text_part

GB = 1e9
_SHORT = {"optimizer": "state", "reference": "ref.", "gradients": "grads", "activations": "activ.", "overhead": "CUDA"}
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def main(argv: list[str]) -> None:
    """Raises:
    ValueError: an error that the user can fix, or no settings fit.
    """
    parser = RaisingParser(
        prog="fastdpo plan", description="Shows which settings fit a GPU, and the longest pair that fits with each."
    )
    parser.add_argument(
        "--model", required=True, help="Name on the Hub, folder, or config.json. Only the config is read."
    )
    parser.add_argument(
        "--gpu_memory", "--gpu-memory", required=True, help="Memory of the GPU, such as 24GB (10**9) or 24GiB (2**30)."
    )
    parser.add_argument(
        "--max_length",
        "--max-length",
        type=int,
        help="Tokens of prompt and response that must fit. Settings that take fewer are shown as not fitting.",
    )
    parser.add_argument("--lora_r", "--lora-r", type=int, default=16, help="Rank of the adapter.")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of each node. More than one: how to share the run.")
    parser.add_argument("--nodes", type=int, default=1, help="Machines with so many GPUs each.")
    parser.add_argument(
        "--interconnect",
        default="nvlink,ib400",
        help="Networks between the GPUs of a node and between nodes: nvlink3, nvlink, nvlink5, pcie4, pcie5, ib200,"
        " ib400, ib800, eth25, eth100.",
    )
    parser.add_argument(
        "--gpu", default="h100", help="Kind of GPU, for the time: a100, h100, h200, b200, l40s or rtx4090."
    )
    parser.add_argument(
        "--pairs_per_step", "--pairs-per-step", type=int, default=64, help="Pairs of a step on all GPUs, for the time."
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="Run code from the Hub, as in from_pretrained."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON, with sizes in bytes.")
    options = parser.parse_args(argv)
    for name in ("max_length", "lora_r", "pairs_per_step"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    memory = parse_bytes(options.gpu_memory)
    cluster = make_cluster(options.gpus, options.nodes, memory, options.gpu, options.interconnect)
    check_model_folder("model", options.model)
    config = load_config(options.model, options.trust_remote_code)
    if cluster.num_gpus > 1:
        _plan_cluster(config, cluster, options)
        return
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
        "longest pair: tokens of prompt and both responses; the prompt counts once and is half of them, so the longer"
        " sequence has three quarters. Shorter pairs are packed into micro-batches of this size. Sizes are in GB (10**9"
        f" bytes) at this length; {1 - USABLE_SHARE:.0%} of the memory stays free for fragmentation. adapter: the model"
        " without its LoRA is the reference; cached: log-probs are computed once. bf16: weights in bf16 with"
        " stochastic rounding; in backward: each is updated in backward, one micro-batch a step. With"
        " `--on_oversized_row split` a sequence may be as long as the longest pair, unless weights are updated in"
        " backward. No estimate has been compared with a GPU yet; measure on yours with"
        " `--max_tokens_per_microbatch auto`."
    )
    console.print("\nThe first command of each kind that fits:")
    length = "" if options.max_length is None else f"--max_length {options.max_length} "
    firsts: dict[str, Plan] = {}
    for plan in fitting:
        firsts.setdefault(plan.settings.method, plan)
    for plan in firsts.values():
        needs = "" if not plan.settings.needs_bitsandbytes else '  # pip install "fastdpo[quant]"'
        line = length + plan.settings.options(plan.tokens, options.lora_r) + needs
        console.print(f"  fastdpo train --model {options.model} ... {line}", soft_wrap=True, markup=False)


def _plan_cluster(config: Any, cluster: Cluster, options: Any) -> None:
    pair = pair_tokens(options.max_length or DEFAULT_LENGTH)
    console = make_console()
    with nullcontext() if options.json else console.status(f"running {options.model} without weights"):
        plans = make_cluster_plans(
            config, cluster, lora_r=options.lora_r, pair_tokens=pair, num_pairs=options.pairs_per_step
        )
    if options.json:
        check_fits(plans, cluster, options.model, pair)
        print(records(plans, cluster))
    else:
        show(plans, cluster, options.model, options.pairs_per_step, pair, console)


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
    ValueError: the config does not exist, or it is not for a causal LM.
    """
    from transformers import AutoConfig

    from fastdpo.training.setup.gguf_files import as_folder
    from fastdpo.training.setup.model_kinds import check_kind

    name = as_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model must be a name on the Hub, a folder or a config.json, got {name!r}: {error}"
        ) from error
    check_kind(config, name)
    return config


def _record(plan: Plan, lora_r: int) -> dict[str, Any]:
    settings = plan.settings
    return {
        "method": settings.method,
        "gradient_checkpointing": settings.checkpointing,
        "tile_rows": "auto" if settings.tiles else None,
        "activation_offloading": settings.offload,
        "reference": settings.reference,
        "optim": settings.optim,
        "fits": plan.tokens > 0,
        "weight_rounding": settings.weight_rounding,
        "optimizer_in_backward": settings.in_backward,
        "max_tokens_per_microbatch": None if settings.in_backward else plan.tokens,
        "longest_pair_tokens": plan.tokens,
        "longest_sequence_tokens": plan.tokens * 3 // 4,
        "longest_split_sequence_tokens": None if settings.in_backward else plan.tokens,  # on_oversized_row="split"
        "bytes": {**plan.estimate.parts(), "total": plan.estimate.total},
        "options": settings.options(plan.tokens, lora_r) if plan.tokens else None,
    }


def _training(settings: Settings) -> str:
    bf16 = " bf16" if settings.weight_rounding != "nearest" else ""
    return f"{settings.method}{bf16}{', in backward' if settings.in_backward else ''}"


def _table(plans: Sequence[Plan], config: Any) -> Table:
    positions = getattr(text_part(config), "max_position_embeddings", None)
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
            _training(settings),
            _activations(settings),
            settings.reference,
            settings.optim,
            tokens,
            *figures,
            _gigabytes(plan.estimate.total),
            style=None if plan.tokens else "dim",
        )
    return table


def _activations(settings: Settings) -> str:
    """How activations are kept, in the column of checkpointing."""
    if not settings.checkpointing:
        return "off"
    return "on" + (", tiles" if settings.tiles else "") + (", on host" if settings.offload else "")


def _gigabytes(size: int) -> str:
    return f"{size / GB:.1f}" if size < 100 * GB else f"{size / GB:.0f}"
