"""`fastdpo report RUN`: writes the page of a training run again, from the files in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from fastdpo.cli.options.parser import RaisingParser


def main(argv: list[str]) -> None:
    """Writes the page.

    Raises:
        ValueError: the folder does not contain a run.
    """
    parser = RaisingParser(prog="fastdpo report", description="Writes the HTML report of a training run again.")
    parser.add_argument("run", metavar="RUN", help="Output folder of a training run, which may be unfinished.")
    options = parser.parse_args(argv)
    from fastdpo.report.compare import flat_options
    from fastdpo.report.run import write_run_report

    settings = flat_options(Path(options.run))
    print(f"wrote {write_run_report(options.run, not_default(settings))}")


def not_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run of `fastdpo train` or `sft` without those that have their default: 30 of 200."""
    from fastdpo.cli.arguments import TYPES

    defaults: dict[str, Any] = {}
    for of in TYPES["sft" if str(settings.get("command", "")).startswith("fastdpo sft") else "train"]:
        for field in fields(of):
            if field.default is not MISSING:
                defaults[field.name] = field.default
            elif field.default_factory is not MISSING:
                defaults[field.name] = field.default_factory()
    stored = json.loads(json.dumps(defaults, default=str))
    return {name: value for name, value in settings.items() if name not in stored or stored[name] != value}
