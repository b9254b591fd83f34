"""`fastdpo precompute`: reference log-probs ahead of training, from the command line.

Takes the options of `fastdpo train`, so that one YAML file serves both. output_dir is optional; options that only
training reads have no effect, and --help does not show them.
"""

from __future__ import annotations

import time

from fastdpo.cli.options.early import look

OPTIONS = (  # the options of `fastdpo train` that this command reads
    "model dataset config model_revision dtype attn_implementation tokenizer chat_template dataset_config dataset_split"
    " datasets eval_dataset eval_split eval_datasets eval_fraction max_length max_prompt_length truncation_mode"
    " on_bad_row dataset_format dataset_num_proc pad_token model_init_kwargs trust_remote_code loss_type ld_alpha"
    " ref_model precompute_ref_batch_size ref_cache_dir ref_max_memory ref_tokens_per_batch packing attention_backend"
    " impl prefix_sharing workspace_bytes bf16 fp16 use_peft load_in_4bit load_in_8bit bnb_4bit_quant_type"
    " bnb_4bit_quant_storage use_bnb_nested_quant use_cpu disable_tqdm"
)


def main(argv: list[str]) -> None:
    """Parses the options, computes the log-probs missing in the cache, and prints its location.

    Raises:
        ValueError: an error that the user can fix.
    """
    argv, shown = ["--output_dir", "not_used", *argv], OPTIONS.split()
    look("precompute", argv, shown)
    from rich.table import Table

    from fastdpo.cli.arguments import AdapterArguments, RunArguments, parse
    from fastdpo.cli.console import make_console
    from fastdpo.cli.launch.start import check_processes
    from fastdpo.cli.looks import look_at_models, look_at_rows, merge_load_settings
    from fastdpo.cli.options.adapters import quantization_config
    from fastdpo.cli.run import load_datasets
    from fastdpo.training import DPOConfig
    from fastdpo.training.precompute import precompute_ref_logps

    run, adapter, args = parse("precompute", [RunArguments, AdapterArguments, DPOConfig], argv, shown=shown)
    check_processes(args)
    merge_load_settings(args, run.load_settings())
    console = make_console()
    tokenizer = look_at_models(run, args, ref_model=adapter.ref_model)
    train, evaluated = load_datasets(run, args)
    look_at_rows(train, evaluated, tokenizer, args, run)
    started = time.perf_counter()
    done = precompute_ref_logps(
        run.model,
        args,
        {"train": train} if evaluated is None else {"train": train, "eval": evaluated},
        ref_model=adapter.ref_model,
        quantization_config=quantization_config(adapter, run.dtype),
        processing_class=tokenizer,
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
    console.print("`fastdpo train --reference cached` with the same model, data and settings reuses these log-probs")
