"""Several runs beside each other: settings that differ, last metrics, curves over each other, samples side by side.

In: output directories of DPOTrainer, SFTTrainer or `fastdpo train`. Out: a `Comparison`, and a page of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.report.html import write_report
from fastdpo.report.run import RUN_CURVES, curves_of, has_matplotlib, read_object, run_state
from fastdpo.report.sections import FigureGrid, Response, Sample, SampleList, Section, Table, Text
from fastdpo.training.callbacks.json_lines import read_lines
from fastdpo.training.callbacks.log_history import RESULTS, logs_by_source
from fastdpo.training.callbacks.samples import SAMPLES_FILE

OPTIONS_FILE = "fastdpo_run.json"  # what `fastdpo train` writes of its options
_NOT_COMPARED = ("command", "output_dir", "logging_dir", "run_name")


@dataclass(frozen=True)
class Comparison:
    """What is known of the runs, each by its name."""

    names: list[str]
    settings: dict[str, list[Any]]  # those that differ; None where a run does not say
    metrics: dict[str, dict[str, list[float | None]]]  # by source ("training", "evaluation"), then by metric
    histories: dict[str, list[dict[str, Any]]]

    def as_json(self) -> dict[str, Any]:
        """Without the histories."""
        return {"runs": self.names, "settings": self.settings, "metrics": self.metrics}


def compare_runs(folders: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Reads the runs.

    Raises:
        ValueError: fewer than two, one twice, or a folder that holds no run.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"runs must be at least two different folders, got {', '.join(map(str, paths)) or 'none'}")
    names = _names(paths)
    histories = {name: run_state(path)["log_history"] for name, path in zip(names, paths, strict=True)}
    options = [flat_options(path) for path in paths]
    settings = {}
    for key in dict.fromkeys(key for of in options for key in of if key not in _NOT_COMPARED):
        values = [of.get(key) for of in options]
        if any(value != values[0] for value in values):
            settings[key] = values
    return Comparison(names, settings, _last_metrics(histories), histories)


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the way to them as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def flat_options(path: Path) -> dict[str, Any]:
    """The options of a run of the command, flat; of a run from Python none are known."""
    file = path / OPTIONS_FILE
    found = read_object(file) if file.is_file() else {}
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    if isinstance(flat.get("command"), list):
        flat["command"] = " ".join(flat["command"])
    return flat


def _last_metrics(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, list[float | None]]]:
    last = [
        {source: entries[-1] for source, entries in logs_by_source(history).items()} for history in histories.values()
    ]
    metrics: dict[str, dict[str, list[float | None]]] = {}
    for source in dict.fromkeys(source for of in last for source in of):
        for key in RESULTS:
            values = [of.get(source, {}).get(key) for of in last]
            if any(value is not None for value in values):
                metrics.setdefault(source, {})[key] = values
    return metrics


def metric_rows(comparison: Comparison) -> list[list[str]]:
    """(metric, the first run's value, each other's with its difference from the first) for tables."""
    rows = []
    for source, metrics in comparison.metrics.items():
        for key, values in metrics.items():
            first = values[0]
            cells = [_value(first)]
            for value in values[1:]:
                both = first is not None and value is not None
                cells.append(_value(value) + (f" ({value - first:+.4f})" if both else ""))  # type: ignore[operator]
            rows.append([f"{RESULTS[key]}, {source}", *cells])
    return rows


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def write_comparison(path: str | os.PathLike[str], folders: Sequence[str | os.PathLike[str]]) -> Path:
    """Writes the page and returns its path.

    Raises:
        ValueError: as `compare_runs`.
    """
    found = compare_runs(folders)
    columns = ("", *found.names)
    note = "In brackets: the difference from the first run. Rewards and log-probs are in nats."
    sections: list[Section] = [Table("At the last log", columns, metric_rows(found), note=note)]
    if found.settings:
        rows = [[key, *map(str, values)] for key, values in found.settings.items()]
        sections.append(Table("Settings that differ", columns, rows, is_prose=True))
    logged = {key for history in found.histories.values() for entry in history for key in entry}
    keys = [key for key in RUN_CURVES if {key, f"eval_{key}"} & logged]
    if has_matplotlib() and keys:
        note = "Solid: training pairs. Dashed with markers: evaluation."
        sections.append(FigureGrid("Training", curves_of(found.histories, keys), note=note))
    else:
        sections.append(Text("Training", ['No curves: nothing was logged, or pip install "fastdpo[plots]".']))
    samples = _samples(found.names, [Path(folder) for folder in folders])
    if samples:
        note = "What each run's policy answered at its last evaluation, to prompts that several were asked."
        sections.append(SampleList("Samples", samples, "Tokens", note=note))
    return write_report(path, "Runs compared", sections, subtitle=", ".join(found.names))


def _samples(names: Sequence[str], folders: Sequence[Path]) -> list[Sample]:
    """Prompts that more than one run was asked."""
    answers: dict[str, list[Response]] = {}
    for name, folder in zip(names, folders, strict=True):
        lines = read_lines(folder / SAMPLES_FILE)
        last = lines[-1]["step"] if lines else None
        for line in lines:
            if line["step"] == last:
                said = Response(f"{name}, step {last}", line["policy"], str(line["policy_tokens"]))
                answers.setdefault(line["prompt"], []).append(said)
    return [Sample(prompt, said) for prompt, said in answers.items() if len(said) > 1]
