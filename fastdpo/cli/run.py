"""The code shared by `fastdpo train` and `fastdpo sft`: output directory, data, start and end of the run."""

from __future__ import annotations

import json
import shlex
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastdpo.cli.arguments import AdapterArguments, LoraArguments, RunArguments, parse
from fastdpo.cli.comparison import comparison_table
from fastdpo.cli.console import make_console
from fastdpo.cli.launch.start import check_processes
from fastdpo.cli.looks import look_at_models, look_at_rows, merge_load_settings
from fastdpo.cli.options.adapters import (
    ignore_bias_buffers,
    lora_config,
    quantization_config,
    warn_of_dropout,
)
from fastdpo.cli.threads import FreeCores, busy_cores_warning
from fastdpo.data.mixture import load_mixture
from fastdpo.data.prepare import one_prompt_a_row
from fastdpo.data.rows.report import StreamReport
from fastdpo.data.sources.loading import load_preference_dataset, stream_preference_dataset
from fastdpo.files import write_whole
from fastdpo.locks import locked
from fastdpo.report.run import write_run_report
from fastdpo.training.base import PackedTrainer
from fastdpo.training.callbacks.model_card import training_facts
from fastdpo.training.callbacks.summary import peak_memory
from fastdpo.training.memory.estimate import MIB
from fastdpo.training.saving.checkpoints import checkpoint_folder
from fastdpo.training.saving.signals import StopOnSignal
from fastdpo.training.saving.staging import restore_unfinished
from fastdpo.training.settings.config import SFTConfig
from fastdpo.training.settings.engine import EngineConfig
from fastdpo.training.setup.failures import failing_together
from fastdpo.training.setup.models import adapter_base

RUN_FILE = "fastdpo_run.json"  # marks a directory as the output of a run, with the options it had
_SIGNS_OF_A_RUN = (RUN_FILE, "trainer_state.json", "config.json", "adapter_config.json", "checkpoint-*")


def run_training(
    command: str,
    argv: Sequence[str],
    trainer_class: Any,
    config_class: type[EngineConfig],
    adapter_class: type[LoraArguments],
    columns: list[tuple[str, str]],
) -> None:
    """Parses the options, checks them, trains, and reports.

    Args:
        columns: (metric, heading) of the before/after table.
    Raises:
        ValueError: an error that the user can fix; raised before any weight is changed.
    """
    run, adapter, args = parse(command, [RunArguments, adapter_class, config_class], argv)
    check_processes(args)
    stop = StopOnSignal(resume_command(command, argv))
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # only it receives signals
            stack.enter_context(stop.installed())
        if args.should_save:
            stack.enter_context(locked(args.output_dir, "output_dir"))
            restore_unfinished(Path(args.output_dir))
        stack.enter_context(failing_together(args))
        _run(command, argv, run, adapter, args, trainer_class, columns, stop)


def _run(
    command: str,
    argv: Sequence[str],
    run: RunArguments,
    adapter: LoraArguments,
    args: EngineConfig,
    trainer_class: Any,
    columns: list[tuple[str, str]],
    stop: StopOnSignal,
) -> None:
    warn_of_dropout(adapter, args)
    merge_load_settings(args, run.load_settings())
    console, cores = make_console(), FreeCores()
    is_adapter = adapter_base(run.model) is not None
    is_known = adapter.use_peft or Path(run.model).is_dir()  # the contents of a name on the Hub are not known
    has_adapter = adapter.use_peft or is_adapter if is_known else None
    resume_from = check_output_dir(args, overwrite=run.overwrite_output_dir, has_adapter=has_adapter)
    ref_model = {"ref_model": adapter.ref_model} if isinstance(adapter, AdapterArguments) else {}
    tokenizer = look_at_models(run, args, **ref_model)
    train_dataset, eval_dataset = load_datasets(run, args)
    look_at_rows(train_dataset, eval_dataset, tokenizer, args, run)
    trainer = trainer_class(
        run.model,
        **ref_model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=[stop] if stop.is_installed else [],
        quantization_config=quantization_config(adapter, run.dtype),
        peft_config=lora_config(adapter) if adapter.use_peft and not is_adapter else None,
    )
    if adapter.use_peft and is_adapter and trainer.is_world_process_zero():
        console.print(f"{run.model} is an adapter: it is trained further, and the lora_ options have no effect")
    if run.ignore_bias_buffers:
        ignore_bias_buffers(trainer.model)
    print_summary(trainer, run)
    warn_of_busy_cores(console, trainer, cores)
    options = {"command": ["fastdpo", command, *without_secrets(argv)], **vars(run), **vars(adapter), **args.to_dict()}
    train_and_compare(console, trainer, resume_from, options, columns)


def resume_command(command: str, argv: Sequence[str]) -> str:
    """The command line that continues a run that was stopped."""
    words, is_next = ["fastdpo", command], False
    for word in without_secrets(argv):
        name, joined, _ = word.partition("=")
        is_resume = name.replace("-", "_") == "__resume_from_checkpoint"
        if not (is_resume or is_next):
            words.append(word)
        is_next = is_resume and not joined
    return shlex.join([*words, "--resume_from_checkpoint", "last"])


def check_output_dir(args: EngineConfig, *, overwrite: bool, has_adapter: bool | None = None) -> str | None:
    """The checkpoint to resume from, if any.

    Args:
        has_adapter: whether the run trains an adapter; None if only the model will show it.
    Raises:
        ValueError: the directory holds another run, or `resume_from_checkpoint` is not a checkpoint of such a run.
    """
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir must be a directory, got the file {output_dir}")
    checkpoint = checkpoint_folder(args.resume_from_checkpoint, output_dir, has_adapter=has_adapter)
    if checkpoint is not None:
        return checkpoint
    if not overwrite and any(next(output_dir.glob(sign), None) for sign in _SIGNS_OF_A_RUN):
        raise ValueError(
            f"output_dir must not hold another run, got {output_dir}; choose a new folder, continue the run with"
            " --resume_from_checkpoint last, or replace it with --overwrite_output_dir"
        )
    return None


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The command line with <HUB_TOKEN> in place of the token, as in TrainingArguments.to_dict, for the report."""
    shown, is_next = [], False
    for argument in argv:
        option, joined, _ = argument.partition("=")
        is_token = option.replace("-", "_") == "__hub_token"
        kept = f"{option}=<HUB_TOKEN>" if is_token and joined else argument
        shown.append("<HUB_TOKEN>" if is_next else kept)
        is_next = is_token and not joined
    return shown


def load_datasets(run: RunArguments, args: EngineConfig) -> tuple[Any, Any]:
    """Training and evaluation rows. Without evaluation data, training rows are held out, unless streamed."""
    is_sft = isinstance(args, SFTConfig)
    how: dict[str, Any] = {"streaming": run.dataset_streaming, "dataset_format": args.dataset_format, "is_sft": is_sft}
    load = stream_preference_dataset if run.dataset_streaming else load_preference_dataset
    if run.datasets is not None:
        train: Any = load_mixture(run.datasets, **how)
    else:
        train = load(run.dataset, run.dataset_split, run.dataset_config)
    if run.eval_datasets is not None:
        return train, load_mixture(run.eval_datasets, **how)
    if run.eval_dataset is not None:
        config = run.dataset_config if run.eval_dataset == run.dataset else None
        return train, load(run.eval_dataset, run.eval_split or "test", config)
    if _names_split(run):
        return train, _evaluated_split(run, load)
    if run.dataset_streaming:
        return train, None
    train = one_prompt_a_row(train, args.dataset_format, is_sft=is_sft)
    num_eval = min(round(len(train) * run.eval_fraction), len(train) - 1)
    if num_eval < 1:
        return train, None
    parts = train.train_test_split(test_size=num_eval, seed=args.seed)
    return parts["train"], parts["test"]


def _names_split(run: RunArguments) -> bool:
    """Whether a split of the training dataset itself is evaluated; a file has only one split, for any name."""
    return run.eval_split is not None and run.datasets is None and not Path(run.dataset).expanduser().is_file()


def _evaluated_split(run: RunArguments, load: Any) -> Any:
    try:
        return load(run.dataset, run.eval_split, run.dataset_config)
    except ValueError as error:
        raise ValueError(
            f"eval_split must be a split of {run.dataset} (TRL evaluates on dataset_test_split, test by default), got"
            f" {run.eval_split!r}; write another --eval_split, --eval_dataset FILE, or --eval_fraction 0.05 to hold out"
            f" rows: {error}"
        ) from error


def print_summary(trainer: PackedTrainer, run: RunArguments) -> None:
    more = [("output", str(trainer.args.output_dir))]
    is_named = run.eval_dataset is not None or run.eval_datasets is not None or _names_split(run)
    if trainer.eval_dataset is not None and not is_named:
        held_out = f"on {run.eval_fraction:.0%} of the training data, held out (--eval_fraction)"
        more.insert(0, ("evaluation", held_out))
    trainer.print_summary(*more)


def warn_of_busy_cores(console: Console, trainer: PackedTrainer, cores: FreeCores) -> None:
    """Warns of busy cores without changing the number of threads: the number affects the rounding of sums, and a run
    must not depend on other programs.
    """
    num_threads = torch.get_num_threads()
    cores.threads(num_threads)  # counts the free cores while model and data were loaded
    warning = busy_cores_warning(cores.free, cores.num_cores, num_threads)
    if warning is not None and trainer.args.device.type == "cpu" and trainer.is_world_process_zero():
        console.print(f"warning: {warning}", soft_wrap=True, highlight=False)


def train_and_compare(
    console: Console,
    trainer: PackedTrainer,
    resume_from: str | None,
    options: Mapping[str, Any],
    columns: list[tuple[str, str]],
) -> None:
    """Evaluates, trains, evaluates again, saves everything, and prints the changes and the saved files.

    Args:
        options: the options of the run; written to RUN_FILE.
        columns: (metric, label) pairs of the table, metrics without prefix.
    """
    if resume_from is None and trainer.is_world_process_zero():  # files of an earlier run, for --overwrite_output_dir
        for checkpoint in Path(trainer.args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    data = str(options["dataset"] or ", ".join(part["path"] for part in options["datasets"]))
    trainer.dataset_name = Path(data).name if Path(data).exists() else data
    before = trainer.evaluate() if trainer.eval_dataset is not None else {}
    try:
        metrics = trainer.train(resume_from_checkpoint=resume_from).metrics
    except Exception:
        _end_progress_bars(trainer)
        raise
    trainer.save_model()  # first: a signal may end the evaluation
    trainer.save_state()
    after = trainer.evaluate() if trainer.eval_dataset is not None else {}
    _save(trainer, metrics, after, options)
    report = _report(trainer, options) if trainer.is_world_process_zero() else None
    trainer.accelerator.end_training()
    if trainer.is_world_process_zero():
        if resume_from is not None:
            console.print(f"resumed from {resume_from}")
        for name, data_report in trainer.data_reports.items():
            if isinstance(data_report, StreamReport):  # known only now
                console.print(f"{name} data: {data_report.lines()[0]}")
        comparison, notes = comparison_table(trainer, before, after, columns)
        if comparison.row_count > 0:
            console.print(comparison)
            for note in notes:
                console.print(note)
        else:
            options_for_rows = "--eval_dataset" if options["dataset_streaming"] else "--eval_dataset, --eval_fraction"
            console.print(f"no before/after table: no evaluation rows ({options_for_rows}) and no logged steps")
        console.print(
            f"{metrics['train_runtime']:.1f} s, {metrics['train_samples_per_second']:.2f} rows/s,"
            f" peak memory {peak_memory(trainer.args.device) / MIB:,.0f} MiB"
            + (" (of the whole process)" if trainer.args.device.type == "cpu" else "")
        )
        console.print(
            f"saved in {trainer.args.output_dir}: the model, its tokenizer and its card (README.md), trainer_state.json"
            f" (all logs), {RUN_FILE} (options), {report} (curves, warnings, samples)"
        )


def _end_progress_bars(trainer: PackedTrainer) -> None:
    """Ends the line of an open progress bar, so that the error starts on a new line."""
    for callback in trainer.callback_handler.callbacks:
        for name in ("prediction_bar", "training_bar"):
            bar = getattr(callback, name, None)
            if bar is not None:
                bar.close()


def _save(
    trainer: PackedTrainer, metrics: dict[str, float], after: dict[str, float], options: Mapping[str, Any]
) -> None:
    trainer.save_state()
    trainer.save_metrics("train", metrics)
    if after:
        trainer.save_metrics("eval", after)
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / RUN_FILE
        write_whole(path, json.dumps(options, indent=2, default=str) + "\n")


def _report(trainer: PackedTrainer, options: Mapping[str, Any]) -> str:
    """Writes the HTML report and returns its name."""
    settings = {"command": " ".join(options["command"]), **dict(training_facts(trainer))}
    return write_run_report(trainer.args.output_dir, settings).name
