"""`fastdpo precompute`: reference log-probs ahead of training, from the command line.

Takes the options of `fastdpo train`, so that one YAML file serves both; output_dir is not needed, and what only
training reads has no effect.
"""

from __future__ import annotations

import time

from rich.table import Table

from fastdpo.cli.arguments import AdapterArguments, RunArguments, parse
from fastdpo.cli.console import make_console
from fastdpo.cli.run import load_datasets
from fastdpo.cli.train import quantization_config
from fastdpo.training import DPOConfig
from fastdpo.training.precompute import precompute_ref_logps


def main(argv: list[str]) -> None:
    """Parses, computes what the cache lacks, and says where it is.

    Raises:
        ValueError: anything that the user can mend.
    """
    run, adapter, args = parse(
        "precompute", [RunArguments, AdapterArguments, DPOConfig], ["--output_dir", "not_used", *argv]
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
