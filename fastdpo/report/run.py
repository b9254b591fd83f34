"""The report of one training run, from the files in its output directory: result, curves, warnings, samples.

In: trainer_state.json (from `trainer.save_state()`, or from the last checkpoint of a later, interrupted run), and the
warnings and samples that training wrote to the same folder. Out: report.html in that folder. Works for any run of
DPOTrainer or SFTTrainer, including interrupted ones. Without matplotlib the report has no curves and says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from fastdpo.report.html import write_report
from fastdpo.report.plots import training_curves
from fastdpo.report.sections import FigureGrid, Response, Sample, SampleList, Section, Table, Text
from fastdpo.training.callbacks.json_lines import read_lines
from fastdpo.training.callbacks.log_history import RESULTS, logs_by_source
from fastdpo.training.callbacks.samples import SAMPLES_FILE
from fastdpo.training.callbacks.watch import WARNINGS_FILE

REPORT_FILE = "report.html"
STATE_FILE = "trainer_state.json"
_PREFERENCE_CURVES = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected")
_CURVES = ("loss", "entropy", "mean_token_accuracy")
RUN_CURVES = tuple(dict.fromkeys((*_PREFERENCE_CURVES, *_CURVES)))


def write_run_report(output_dir: str | os.PathLike[str], settings: Mapping[str, Any] | None = None) -> Path:
    """Writes report.html and returns its path.

    Args:
        settings: settings by name, for the report's last table.
    Raises:
        ValueError: the directory does not hold a run.
    """
    folder = Path(output_dir)
    state = run_state(folder)
    history: list[dict[str, Any]] = state["log_history"]
    sections: list[Section] = [_result(history), _curves(history)]
    warnings = read_lines(folder / WARNINGS_FILE)
    if warnings:
        rows = [[f"step {entry['step']}", entry["message"] + "."] for entry in warnings]
        sections.append(Table("Warnings during training", (), rows, is_prose=True))
    samples = read_lines(folder / SAMPLES_FILE)
    if samples:
        sections.append(_samples(samples))
    if settings:
        rows = [[name, str(value)] for name, value in settings.items() if value is not None]
        sections.append(Table("Settings", (), rows, is_prose=True))
    subtitle = f"{state['global_step']:,} optimizer steps, {state['epoch'] or 0:.2f} epochs"
    return write_report(folder / REPORT_FILE, f"Training run {folder.absolute().name}", sections, subtitle=subtitle)


def run_state(folder: Path) -> Any:
    """trainer_state.json of the last run in the folder, from its end or, if it was interrupted, from its last
    checkpoint.

    Raises:
        ValueError: there is none, or it is incomplete.
    """
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    paths = [folder / STATE_FILE, *([Path(checkpoint) / STATE_FILE] if checkpoint is not None else [])]
    states = [(path.stat().st_mtime, read_object(path, "log_history")) for path in paths if path.is_file()]
    if not states:
        raise ValueError(f"output_dir must hold a run ({STATE_FILE}, or a checkpoint with one), got {folder}")
    (made, state), (later, other) = states[0], states[-1]
    history = other["log_history"]
    is_part = state["log_history"][: len(history)] == history  # also where copying has changed the times of files
    return other if later > made and not is_part else state


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object in a file of a run.

    Raises:
        ValueError: the file holds something else, or lacks a key.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"output_dir must hold complete files, got {path}, which is not JSON: {error}") from error
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        named = f" with {', '.join(keys)}" if keys else ""
        raise ValueError(f"output_dir must hold the files of a run, got {path}, which holds no object{named}")
    return found


def _result(history: Sequence[Mapping[str, Any]]) -> Section:
    """First and last values of training and, if there is one, of evaluation."""
    columns, cells = [""], []
    for source, entries in logs_by_source(history).items():
        first, last = entries[0], entries[-1]
        ends = {", first": first, ", last": last} if first["step"] != last["step"] else {"": last}
        for place, entry in ends.items():
            columns.append(f"{source}{place} (step {entry['step']})")
            cells.append([f"{entry[key]:.4f}" if key in entry else "" for key in RESULTS])
    rows = [
        [words, *(column[index] for column in cells)]
        for index, words in enumerate(RESULTS.values())
        if any(column[index] for column in cells)
    ]
    if not rows:
        return Text("Result", ["No metrics were logged: logging_steps is larger than the number of steps."])
    note = "Training values are means since the previous log. Rewards and log-probs are in nats."
    return Table("Result", columns, rows, note=note)


def _curves(history: Sequence[Mapping[str, Any]]) -> Section:
    wanted = _PREFERENCE_CURVES if any("rewards/margins" in entry for entry in history) else _CURVES
    keys = [key for key in wanted if any(key in entry or f"eval_{key}" in entry for entry in history)]
    if not has_matplotlib() or not keys:
        why = "no metrics were logged" if not keys else 'matplotlib is missing: pip install "fastdpo[plots]"'
        return Text("Training", [f"No curves: {why}."])
    note = "Solid: training pairs. Dashed with markers: evaluation."
    return FigureGrid("Training", curves_of({"run": history}, keys), note=note)


def has_matplotlib() -> bool:
    """Whether pages can have curves."""
    return importlib.util.find_spec("matplotlib") is not None


def curves_of(histories: Mapping[str, Sequence[Mapping[str, Any]]], keys: Sequence[str]) -> list[tuple[str, Any]]:
    """(alternative text, figure) of each metric."""
    return [
        (f"{key} by optimizer step, in training and held out", figure)
        for key, figure in training_curves(histories, keys)
    ]


def _samples(lines: Sequence[Mapping[str, Any]]) -> SampleList:
    """For each prompt, the responses of the reference and of the policy at the first and last evaluation."""
    first, last = lines[0]["step"], lines[-1]["step"]
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if line["step"] in (first, last):
            by_prompt.setdefault(line["prompt"], []).append(line)
    samples = []
    for prompt, entries in by_prompt.items():
        end = entries[-1]
        known = end["reference"] is not None
        reference = (end["reference_name"], end["reference"], str(end["reference_tokens"]))
        responses = [Response(*reference)] if known else []
        responses += [
            Response(f"policy, step {entry['step']}", entry["policy"], str(entry["policy_tokens"])) for entry in entries
        ]
        samples.append(Sample(prompt, responses))
    return SampleList("Samples", samples, "Tokens", note="Responses of policy and reference to evaluation prompts.")
