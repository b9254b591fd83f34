"""Runs over a grid of settings, with their results in one file.

In: values by setting. Out: a folder per run, and results.jsonl with a line for each finished run. A stopped sweep
continues with the runs that are not in that file.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdpo.rounds.state import as_stored, check_same
from fastdpo.training.callbacks.json_lines import append_lines, read_lines

RESULTS_FILE = "results.jsonl"
Params = dict[str, str]


def read_params(given: Sequence[str]) -> dict[str, list[str]]:
    """`["beta=0.1,0.3", "loss_type=sigmoid,ipo"]` as values by setting.

    Raises:
        ValueError: a name or value is missing, or occurs twice.
    """
    found: dict[str, list[str]] = {}
    for text in given:
        name, sign, values = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        parts = [value.strip() for value in values.split(",")]
        if not (name and sign and all(parts)):
            raise ValueError(f"param must be NAME=VALUE,VALUE,..., got {text!r}")
        if name in found or len(set(parts)) < len(parts):
            raise ValueError(f"param must name each setting and each value once, got {text!r}")
        found[name] = parts
    if not found:
        raise ValueError("param must be given at least once, such as --param beta=0.03,0.1,0.3")
    return found


def combinations_of(params: Mapping[str, Sequence[str]], num_random: int | None = None, seed: int = 0) -> list[Params]:
    """All combinations of the values, or `num_random` different ones drawn at random, in the grid's order.

    Raises:
        ValueError: num_random is below 1.
    """
    grid = [dict(zip(params, values, strict=True)) for values in itertools.product(*params.values())]
    if num_random is None:
        return grid
    if num_random < 1:
        raise ValueError(f"random must be at least 1, got {num_random}")
    places = sorted(random.Random(seed).sample(range(len(grid)), min(num_random, len(grid))))
    return [grid[place] for place in places]


def name_of(params: Params) -> str:
    """The name of a run's folder, such as beta=0.1,loss_type=ipo."""
    return ",".join(f"{name}={value}" for name, value in params.items()).replace("/", "_")


def finished(output: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The results in the file, by name of the run.

    Raises:
        ValueError: they are of other settings.
    """
    path = output / RESULTS_FILE
    lines = read_lines(path)
    for line in lines:
        check_same(line["settings"], settings, path, "use another output_dir")
    return {name_of(line["params"]): line for line in lines}


def sweep(
    runs: Sequence[Params], output: Path, run_one: Callable[[Params, Path], dict[str, Any]], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The results of all runs, in order. Runs with results in the file are not repeated.

    Args:
        run_one: trains and measures one run in a folder. It is called again if it was stopped.
        settings: the common settings of all runs. They must be those of the results in the file.
    Raises:
        ValueError: the folder has results of other settings.
    """
    now, done = as_stored(settings), finished(output, settings)
    for params in runs:
        name = name_of(params)
        if name not in done:
            line = {"params": params, **run_one(params, output / name), "settings": now}
            append_lines(output / RESULTS_FILE, [line])
            done[name] = line
    return [done[name_of(params)] for params in runs]
