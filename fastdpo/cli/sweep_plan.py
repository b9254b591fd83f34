"""The memory of every run of a sweep, for `fastdpo sweep --dry_run`.

In: the settings of the runs, and an amount of memory. Out: a table with each run's estimated peak, and whether it fits.
It reads configs, tokenizers and data, and no weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.cli.forwarded import TrainRun

GB, MB = 1e9, 1e6
# settings on which the memory does not depend; runs that differ only in them share an estimate
_WITHOUT_EFFECT = (
    "output_dir", "run_name", "logging_dir", "beta", "learning_rate", "label_smoothing", "num_train_epochs",
    "max_steps", "warmup_steps", "warmup_ratio", "weight_decay", "lr_scheduler_type", "seed",
)  # fmt: skip


def available_memory(asked: str | None) -> tuple[int, bool, str]:
    """Bytes, whether they are a GPU's, and whose they are in words: those asked for, or this machine's device."""
    if asked is not None:
        from fastdpo.cli.plan import parse_bytes

        return parse_bytes(asked), True, "a GPU"
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1], True, torch.cuda.get_device_name()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), False, "this machine's memory"


def memory_table(params: Sequence[Mapping[str, str]], planned: Sequence[TrainRun], asked: str | None) -> Any:
    """A row per run: its parameters, the parts of its peak, the peak, and whether it fits."""
    from rich import box
    from rich.table import Table

    from fastdpo.training.memory.card.plans import USABLE_SHARE

    memory, on_gpu, whose = available_memory(asked)
    title = f"estimated peak memory of each run; {whose}: {_shown(memory)}"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for name in (*params[0], "weights", "optimizer", "reference", "all else", "peak", "fits"):
        table.add_column(name, justify="right")
    known: dict[str, Any] = {}
    for run, trained in zip(params, planned, strict=True):
        key = _key(trained)
        if key not in known:
            known[key] = _estimate(trained, memory if on_gpu else None)
        found = known[key]
        if isinstance(found, str):
            table.add_row(*run.values(), "", "", "", "", "unknown", found)
            continue
        rest = found.total - found.weights - found.optimizer - found.reference
        sizes = [_shown(size) for size in (found.weights, found.optimizer, found.reference, rest, found.total)]
        table.add_row(*run.values(), *sizes, "yes" if found.total <= USABLE_SHARE * memory else "no")
    table.caption = (
        f"An estimate, from the longest rows of the data. {1 - USABLE_SHARE:.0%} of the memory stays free for"
        " fragmentation."
    )
    table.caption_justify = "left"
    return table


def _shown(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / MB:.1f} MB"


def _key(trained: TrainRun) -> str:
    settings = {**trained.args.to_dict(), **vars(trained.adapter), **vars(trained.run)}
    return json.dumps({k: v for k, v in settings.items() if k not in _WITHOUT_EFFECT}, sort_keys=True, default=str)


def _estimate(trained: TrainRun, gpu_memory: int | None) -> Any:
    """A MemoryEstimate, or why there is none; on a CPU without gpu_memory."""
    from fastdpo.cli.looks import look_at_models, look_at_rows
    from fastdpo.cli.options.adapters import lora_config
    from fastdpo.cli.run import load_datasets
    from fastdpo.data.prepare import prepare_preference_dataset
    from fastdpo.training.memory.planned import PlannedRun, estimate_planned_run
    from fastdpo.training.setup.models import adapter_base, load_config

    run, adapter, args = trained.run, trained.adapter, trained.args
    if run.dataset_streaming:
        return "the lengths of a stream are not known"
    tokenizer = look_at_models(run, args, adapter.ref_model)
    datasets = load_datasets(run, args)
    look_at_rows(*datasets, tokenizer, args, run)
    settings = args.tokenization_settings()
    train, evaluated = (
        None
        if rows is None
        else prepare_preference_dataset(rows, tokenizer, settings, num_proc=args.dataset_num_proc)[0]
        for rows in datasets
    )
    if gpu_memory is not None:  # as the run resolves them on a GPU
        args.bf16 = not args.fp16 if trained.given.bf16 is None else args.bf16
        args.gradient_checkpointing = (
            True if trained.given.gradient_checkpointing is None else args.gradient_checkpointing
        )
    base, peft_config = adapter_base(run.model), None
    if adapter.use_peft:
        peft_config = lora_config(adapter)
    elif base is not None:
        from peft import PeftConfig

        peft_config = PeftConfig.from_pretrained(run.model, inference_mode=False)
    ref = adapter.ref_model
    return estimate_planned_run(
        PlannedRun(
            args,
            load_config(run.model, args.init_kwargs()),
            tokenizer,
            train,
            evaluated,
            peft_config=peft_config,
            bits=4 if adapter.load_in_4bit else 8 if adapter.load_in_8bit else None,
            ref_config=None if ref is None else load_config(ref, args.init_kwargs(), "ref_model"),
            ref_model=ref,
            num_processes=run.num_processes or 1,
        ),
        on_gpu=gpu_memory is not None,
        memory=gpu_memory,
    )
