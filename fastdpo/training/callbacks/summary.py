"""The summary of a run before it starts: model, data, reference, kernels, attention, steps, estimated peak memory.

In: a built trainer. Out: lines of text. `memory/estimate.py` explains the estimate of memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from rich.table import Table
from rich.text import Text

from fastdpo.data.terminal import make_console
from fastdpo.data.visible import visible
from fastdpo.modeling.backbone import bare_model, tower_names
from fastdpo.modeling.head import whole_shape
from fastdpo.modeling.tiles import tiles_of
from fastdpo.ops.engine import resolve_impl
from fastdpo.references.adapters import is_peft_model
from fastdpo.training.inputs.streams import is_stream
from fastdpo.training.memory.estimate import estimate_peak_memory
from fastdpo.training.memory.largest_batch import is_measured_later
from fastdpo.training.run import Run
from fastdpo.training.settings.engine import EngineConfig
from fastdpo.training.setup.adapter_facts import adapter_lines
from fastdpo.training.setup.models import head_dtype
from fastdpo.training.setup.tensor_parallel import is_cut


def summary_lines(run: Run) -> list[tuple[str, str]]:
    """The summary as (what, fact) pairs in reading order."""
    lines = [("model", _model(run))]
    if is_peft_model(run.model):
        about, *more = adapter_lines(run.model)
        lines += [("adapter", about), *(("", line) for line in more)]
    for name, report in run.data_reports.items():
        text = report.lines()
        lines += [(f"{name} data", text[0]), *(("", line) for line in text[1:])]
        if name == "train":
            lines += [
                ("first row" if i == 0 else "", f"{what}: {said}") for i, (what, said) in enumerate(report.first_row)
            ]
    reference = run.reference
    if reference is not None:
        lines.append(("reference", f"{reference.mode}: {run.reference_reason}"))
    lines.append(("batches", _batches(run)))
    lines.append(("attention", _attention(run)))
    if run.is_packed and run.packing_check.note is not None:
        lines.append(("", run.packing_check.note))
    tiles = tiles_of(bare_model(run.model))
    if tiles is not None:
        lines.append(("layers", tiles.describe(bare_model(run.model))))
    lines.append(("head op", _head_op(run)))
    lines.append(("steps", _steps(run)))
    if run.args.weight_rounding != "nearest" or run.args.optimizer_in_backward:
        lines.append(("updates", _updates(run.args)))
    lines.append(("peak memory", _peak_memory(run)))
    return lines


def summary_text(run: Run) -> str:
    """The summary as plain text, one line per fact. Does not change the state of random generators."""
    lines = _lines_apart(run)
    width = max(len(what) for what, _ in lines)
    return "\n".join(f"{what:<{width}}  {fact}" for what, fact in lines)


def print_summary(run: Run, more: Sequence[tuple[str, str]] = ()) -> None:
    """Prints the summary and the lines of `more`. In a file or a pipe, lines have 140 characters."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for what, fact in [*_lines_apart(run), *more]:
        table.add_row(what, Text(visible(fact, keeps="\n")))
    make_console().print(table)


def _lines_apart(run: Run) -> list[tuple[str, str]]:
    with torch.random.fork_rng(devices=[]):  # the summary must not change the order of the rows
        return summary_lines(run)


def _model(run: Run) -> str:
    model = bare_model(run.model)  # its num_parameters counts 4-bit weights right, although several share one element
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    share = "all trained" if trained == total else f"{trained:,} trained"
    autocast = "bf16 autocast" if run.args.bf16 else "fp16 autocast" if run.args.fp16 else "no autocast"
    towers = tower_names(model)
    share += f"; {', '.join(towers)} not trained" if towers else ""
    return f"{type(model).__name__}, {total:,} parameters ({share}), {dtypes}, {autocast}, {run.args.device}"


def _batches(run: Run) -> str:
    limit = run.collator.max_tokens
    auto = ", in micro-batches that fit the free memory" if run.args.max_tokens_per_microbatch == "auto" else ""
    split = auto if limit is None else f", in micro-batches of at most {limit:,} tokens"
    if not run.is_packed:
        return "padded: one row per sequence" + split
    shares = run.args.prefix_sharing and any(report.kind == "pairs" for report in run.data_reports.values())
    return "packed: one row without padding" + (", shared tokens computed once" if shares else "") + split


def _attention(run: Run) -> str:
    check = run.packing_check
    if run.is_packed:
        return str(check)
    reason = "packing='padded' is set" if run.args.packing == "padded" else check.reason
    return f"{bare_model(run.model).config._attn_implementation}, the model's own: {reason}"


def _head_op(run: Run) -> str:
    vocab_size, hidden_size = whole_shape(bare_model(run.model).get_output_embeddings().weight)
    impl = resolve_impl(run.args.impl, run.args.device, head_dtype(run.model, run.args))
    why = "set by impl" if run.args.impl != "auto" else f"chosen for {run.args.device.type}"
    return f"{impl} ({why}); vocabulary {vocab_size:,}, hidden size {hidden_size:,}"


def _updates(args: EngineConfig) -> str:
    rounding = {
        "nearest": "rounded to the nearest number of the weights' dtype",
        "stochastic": "computed in fp32 and rounded to bf16 stochastically",
        "kahan": "computed in fp32; what rounding to bf16 cuts off is kept",
    }[args.weight_rounding]
    if not args.optimizer_in_backward:
        return f"{rounding}, one weight at a time"
    clipping = {
        "previous_norm": "clipped by the norm of the step before",
        "two_passes": "clipped exactly, with a forward and backward of its own",
    }[args.clipping_in_backward]
    return f"{rounding}, in backward; {clipping if args.max_grad_norm else 'not clipped'}"


def _steps(run: Run) -> str:
    args = run.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.data_parallel_size
    processes = f"{args.world_size} processes"
    if args.row_group_size > 1:
        processes = f"{args.data_parallel_size} groups of {args.row_group_size} processes"
    is_known = run.train_dataset is not None and not is_stream(run.train_dataset)
    per_epoch = math.ceil(len(run.train_dataset) / per_step) if is_known else 0
    epoch = f"{per_epoch} an epoch" if is_known else "of a stream"
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    return (
        f"{steps} optimizer steps of {per_step} rows ({args.per_device_train_batch_size} x"
        f" {args.gradient_accumulation_steps} accumulated x {processes}), {epoch}"
    )


def _peak_memory(run: Run) -> str:
    if is_cut(run.model):  # the estimate runs layers, on the main process alone: they would wait for their other parts
        return "not estimated for a model that is cut over processes"
    device = run.args.device
    try:
        memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
        estimate = estimate_peak_memory(run, memory=memory)
    except Exception as error:  # model code may fail on tensors without data, and still be trainable
        return f"not estimated: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if is_measured_later(run):
        return f"micro-batches fill the memory that is free at the start; the longest row alone takes {estimate}"
    return str(estimate)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated memory on a GPU, resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
