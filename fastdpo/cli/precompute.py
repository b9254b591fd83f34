"""`fastdpo precompute`: reference log-probs ahead of training, from the command line.

Takes the options of `fastdpo train`, so that one YAML file serves both; output_dir is not needed, and what only
training reads has no effect and is not shown by --help.
"""

from __future__ import annotations

import time

from rich.table import Table

from fastdpo.cli.adapters import quantization_config
from fastdpo.cli.arguments import AdapterArguments, RunArguments, parse
from fastdpo.cli.console import make_console
from fastdpo.cli.run import load_datasets
from fastdpo.training import DPOConfig
from fastdpo.training.precompute import precompute_ref_logps

OPTIONS = (  # what is read here, of those of `fastdpo train`
    "model dataset config dataset_config dataset_split eval_dataset eval_split eval_fraction max_length"
    " max_prompt_length truncation_mode on_bad_row dataset_format dataset_num_proc pad_token model_init_kwargs"
    " trust_remote_code loss_type ld_alpha ref_model precompute_ref_batch_size ref_cache_dir ref_max_memory"
    " ref_tokens_per_batch packing attention_backend impl prefix_sharing workspace_bytes bf16 fp16 use_peft"
    " load_in_4bit use_cpu disable_tqdm"
)


def main(argv: list[str]) -> None:
    """Parses, computes what the cache lacks, and says where it is.

    Raises:
        ValueError: anything that the user can mend.
    """
    run, adapter, args = parse(
        "precompute",
        [RunArguments, AdapterArguments, DPOConfig],
        ["--output_dir", "not_used", *argv],
        shown=OPTIONS.split(),
    )
    console = make_console()
    train, evaluated = load_datasets(run, args)
    started = time.perf_counter()
    done = precompute_ref_logps(
        run.model,
        args,
        {"train": train} if evaluated is None else {"train": train, "eval": evaluated},
        ref_model=adapter.ref_model,
        quantization_config=quantization_config() if adapter.load_in_4bit else None,
    )
    if args.process_index != 0:
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("reference", f"{adapter.ref_model or run.model}: {done.model}")
    for name, counts in done.counts.items():
        first, *rest = done.reports[name].lines()
        table.add_row(f"{name} data", first)
        for line in rest:
            table.add_row("", line)
        table.add_row("", str(counts))
    table.add_row("time", f"{time.perf_counter() - started:.1f} s")
    table.add_row("cache", str(done.folder))
    console.print(table)
    console.print(
        "`fastdpo train` with the same model, data and settings and `--reference cached` computes none of it again"
    )
