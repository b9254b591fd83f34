"""`fastdpo report RUN`: writes the page of a training run again, from the files in the run's folder."""

from __future__ import annotations

from pathlib import Path

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
    print(f"wrote {write_run_report(options.run, settings)}")
