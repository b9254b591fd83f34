"""`fastdpo plan`: which settings of a model fit a GPU, or several, the longest pair for each, and the fastest.

In: a model's name, folder or config.json, and an amount of memory, or the length of a pair. Out: a table (or JSON) of
training methods and settings, with an estimate of each part of the memory and of the time, a picture of them, and the
command of the fastest. It needs only the config: it loads no weights and needs no GPU. Refuses invalid amounts, and a
model that fits with no settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastdpo.cli.console import make_console
from fastdpo.cli.options.parser import RaisingParser
from fastdpo.cli.plan_cluster import DEFAULT_LENGTH, check_fits, records, show
from fastdpo.cli.plan_length import fastest_of_smallest_cards, fitting_plans, length_record, length_table
from fastdpo.cli.plan_names import GB, ON_GPUS, gigabytes, kept_activations, seconds_text, training_name
from fastdpo.training.memory.card.estimates import pair_tokens
from fastdpo.training.memory.card.plans import ROUNDING, USABLE_SHARE, Estimates, Plan, Timed, fastest
from fastdpo.training.memory.card.seconds import ASSUMPTIONS, StepSeconds
from fastdpo.training.memory.cluster.hardware import Cluster, find_gpu, make_cluster
from fastdpo.training.memory.cluster.plans import make_cluster_plans
from fastdpo.training.setup.model_kinds import text_part
from fastdpo.training.setup.models import load_config

LEAST_PAIR = 4  # tokens: two of the prompt, and one of each response
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
        "--gpu_memory",
        "--gpu-memory",
        help="Memory of the GPU, such as 24GB (10**9) or 24GiB (2**30). Needed without --pair_tokens.",
    )
    parser.add_argument(
        "--pair_tokens",
        "--pair-tokens",
        type=int,
        help="Tokens of a pair, its prompt and both responses. Shows the memory that each setting takes for it, and the"
        " smallest GPU.",
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
    parser.add_argument(
        "--html", metavar="PAGE", help="Write a page: longest pair by memory from 8 to 141 GB, and where the bytes go."
    )
    parser.add_argument("--png", metavar="FILE", help="Write the same picture as a PNG file.")
    options = parser.parse_args(argv)
    _check(options)
    memory = None if options.gpu_memory is None else parse_bytes(options.gpu_memory)
    cluster, gpu = None, find_gpu(options.gpu)
    if memory is not None:
        cluster = make_cluster(options.gpus, options.nodes, memory, options.gpu, options.interconnect)
    config = load_config(options.model, {"trust_remote_code": options.trust_remote_code})
    if cluster is not None and cluster.num_gpus > 1:
        _plan_cluster(config, cluster, options)
        return
    console = make_console()
    with nullcontext() if options.json else console.status(f"running {options.model} without weights"):
        estimates = Estimates(config, options.lora_r)
        if options.pair_tokens is None:
            assert memory is not None  # by _check
            plans = estimates.plans(memory, ROUNDING if options.max_length is None else pair_tokens(options.max_length))
        else:
            plans = estimates.at_length(options.pair_tokens)
    fitting = _fitting(plans, memory, options)
    pair = options.pair_tokens or _timed_pair(fitting, options)
    timed = estimates.timed(plans, gpu, num_pairs=options.pairs_per_step, pair_tokens=pair)
    taken = [one for one in timed if one[0] in fitting]
    if options.json:
        print(json.dumps([_record(plan, seconds, memory, options) for plan, seconds in timed], indent=1))
    elif options.pair_tokens is None:
        _show_longest(timed, taken, pair, config, options, console)
    else:
        _show_length(timed, taken, memory, options, console)
    if options.html or options.png:
        from fastdpo.cli.plan_page import write_pictures

        with nullcontext() if options.json else console.status("drawing"):
            written = write_pictures(
                estimates,
                plans,
                memory,
                title=f"Memory of {_short_name(options.model)}",
                commands=[_command(plan, options) for plan in fastest(taken)],
                html=options.html,
                png=options.png,
            )
        for path in [] if options.json else written:
            console.print(f"picture: {path}", markup=False, soft_wrap=True)


def _check(options: Any) -> None:
    """Raises:
    ValueError: options that are out of range, or do not go together.
    """
    for name, least in (("max_length", 1), ("pair_tokens", LEAST_PAIR), ("lora_r", 1), ("pairs_per_step", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if options.pair_tokens is not None and options.max_length is not None:
        raise ValueError(
            f"max_length must be absent if pair_tokens is given, got {options.max_length}: it is the length of one"
            " sequence, and pair_tokens that of prompt and both responses"
        )
    is_cluster = options.gpus != 1 or options.nodes != 1
    if options.gpu_memory is None and (options.pair_tokens is None or is_cluster):
        raise ValueError("gpu_memory must be given, such as --gpu_memory 24GB; without it, plan takes --pair_tokens")
    for name in ("html", "png"):
        if getattr(options, name) is not None:
            if is_cluster:
                raise ValueError(f"{name} must be absent for several GPUs, got {getattr(options, name)!r}; try --json")
            from fastdpo.report import require_matplotlib

            require_matplotlib()


def _fitting(plans: Sequence[Plan], memory: int | None, options: Any) -> list[Plan]:
    """Raises:
    ValueError: no settings fit.
    """
    if options.pair_tokens is not None:
        return fitting_plans(plans, memory, options.model, options.pair_tokens)
    fitting = [plan for plan in plans if plan.tokens]
    if not fitting:
        needed = min(plans, key=lambda plan: plan.estimate.total)
        least = ROUNDING if options.max_length is None else pair_tokens(options.max_length)
        raise ValueError(
            f"gpu_memory must be at least {needed.estimate.total / USABLE_SHARE / GB:.1f}GB for {options.model} and"
            f" pairs of {least} tokens, got {options.gpu_memory}; that is {needed.settings.method} with"
            f" {needed.settings.optim}, gradient checkpointing {'on' if needed.settings.checkpointing else 'off'}"
        )
    return fitting


def _timed_pair(fitting: Sequence[Plan], options: Any) -> int:
    """Tokens of the pairs whose time is shown: of the length asked for, or the usual one, or the longest that fits."""
    if options.max_length is not None:
        return pair_tokens(options.max_length)
    return min(pair_tokens(DEFAULT_LENGTH), max(plan.tokens for plan in fitting))


def _command(plan: Plan, options: Any) -> str:
    length = "" if options.max_length is None else f"--max_length {options.max_length} "
    needs = "" if not plan.settings.needs_bitsandbytes else '  # pip install "fastdpo[quant]"'
    return f"fastdpo train --model {options.model} ... {length}{plan.options(options.lora_r)}{needs}"


def _short_name(model: str) -> str:
    return model if not Path(model).exists() else Path(model).resolve().name


def _show_length(
    timed: Sequence[Timed], fitting: Sequence[Timed], memory: int | None, options: Any, console: Console
) -> None:
    console.print(length_table(timed, memory))
    console.print(
        f"needs: GB (10**9 bytes) for a pair of {options.pair_tokens:,} tokens, prompt and both responses, the prompt"
        f" once and half of them; with the {1 - USABLE_SHARE:.0%} that stay free for fragmentation."
        f" {_step_text(options.pair_tokens, options)} With `--on_oversized_row split`, a sequence of so many tokens is"
        f" enough. {ON_GPUS} Assumed for the time:"
    )
    _show_assumptions(console)
    console.print(
        "\nThe fastest on the GPU:" if memory else "\nThe smallest GPU for each kind, and the fastest command on it:"
    )
    for card, plan in fastest_of_smallest_cards(fitting, memory):
        console.print(f"  {card / GB:g} GB: {_command(plan, options)}", soft_wrap=True, markup=False)


def _show_longest(
    timed: Sequence[Timed], fitting: Sequence[Timed], pair: int, config: Any, options: Any, console: Console
) -> None:
    console.print(_table(timed, config))
    console.print(
        "longest: tokens of the longest pair that fits, prompt and both responses; the prompt counts once and is half"
        " of them, so the longer sequence has three quarters. Shorter pairs are packed into micro-batches of this size."
        f" Sizes are in GB (10**9 bytes) at this length; {1 - USABLE_SHARE:.0%} of the memory stays free for"
        " fragmentation. adapter: the model without its LoRA is the reference; cached: log-probs are computed once."
        " bf16: weights in bf16 with stochastic rounding; in backward: each is updated in backward, one micro-batch a"
        " step. With `--on_oversized_row split` a sequence may be as long as the longest pair, unless weights are"
        f" updated in backward. {_step_text(pair, options)} {ON_GPUS} Measure on yours with"
        " `--max_tokens_per_microbatch auto`."
        " Assumed for the time:"
    )
    _show_assumptions(console)
    console.print(
        f"\nThe fastest of each kind that fits a pair of {pair:,} tokens; of all weights, those that round least:"
    )
    for plan in fastest(fitting):
        console.print(f"  {_command(plan, options)}", soft_wrap=True, markup=False)


def _step_text(pair: int, options: Any) -> str:
    return f"step: seconds for {options.pairs_per_step:,} pairs of {pair:,} tokens on one {options.gpu.lower()}."


def _show_assumptions(console: Console) -> None:
    for assumption in ASSUMPTIONS:
        console.print(f"  - {assumption}", markup=False)


def _plan_cluster(config: Any, cluster: Cluster, options: Any) -> None:
    pair = options.pair_tokens or pair_tokens(options.max_length or DEFAULT_LENGTH)
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


def _record(plan: Plan, seconds: StepSeconds | None, memory: int | None, options: Any) -> dict[str, Any]:
    settings = plan.settings
    record = {
        "method": settings.method,
        "gradient_checkpointing": settings.checkpointing,
        "every_n_layers": settings.every_n_layers,
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
        "workspace_bytes": plan.workspace_bytes,
        "step_seconds": seconds and seconds.total,
        "options": plan.options(options.lora_r) if plan.tokens else None,
    }
    if options.pair_tokens is None:
        return record
    lengths = ("longest_pair_tokens", "longest_sequence_tokens", "longest_split_sequence_tokens")
    record = {name: value for name, value in record.items() if name not in lengths}
    return record | length_record(plan, memory, options.lora_r)


def _table(timed: Sequence[Timed], config: Any) -> Table:
    positions = getattr(text_part(config), "max_position_embeddings", None)
    caption = f"The model's own limit is {positions:,} tokens of prompt and response." if positions else None
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("train", "checkpointing", "reference", "optim"):
        table.add_column(name, no_wrap=True)
    parts = list(timed[0][0].estimate.parts())
    for name in ("longest", *(_SHORT.get(part, part) for part in parts), "total", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan, seconds in timed:
        settings, sizes = plan.settings, plan.estimate.parts()
        figures = [gigabytes(sizes[name]) for name in parts]
        tokens = f"{plan.tokens:,}" if plan.tokens else "no"
        table.add_row(
            training_name(settings),
            kept_activations(settings),
            settings.reference,
            settings.optim,
            tokens,
            *figures,
            gigabytes(plan.estimate.total),
            seconds_text(seconds),
            style=None if plan.tokens else "dim",
        )
    return table
