"""`fastdpo verify`: checks the kernels on this machine, and prints a table. Exit code 1 if a check fails.

With --model it also checks a whole step of that model, with every attention backend, against plain PyTorch in fp64.
With --json it prints one JSON object on stdout instead: "passed", "complete", "machine", and "lines" with impl, dtype,
check, verdict, error, bound, unit and note of each check. It also prints each line on stderr as it comes. After an
interrupt (SIGINT) the object has the lines so far.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

from fastdpo.children import child_environment
from fastdpo.cli.options.parser import RaisingParser
from fastdpo.evidence.checks import MIB, Line
from fastdpo.evidence.problems import Shape
from fastdpo.evidence.verify import ALL_DTYPES, DTYPES, default_shape, machine, verify

STYLES = {"ok": "green", "FAILED": "bold red", "skipped": "dim"}


def main(argv: list[str]) -> int:
    """Runs the checks and reports; returns 1 if a check fails.

    Raises:
        ValueError: an invalid option.
    """
    options = _parser().parse_args(argv)
    if options.sanitize:
        return _sanitized([word for word in argv if word != "--sanitize"])
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}") from None
    lines: list[Line] = []
    complete = True
    model = _load(options) if options.model else None

    def each(line: Line) -> None:
        _take_down(line, lines, options.json)

    try:
        verify(device, options.dtype, _shape(options, device), each)
        if model is not None:
            from fastdpo.evidence.step import verify_step

            for dtype in options.dtype or DTYPES[torch.device(device).type]:
                verify_step(model, dtype, torch.device(device), each)
    except KeyboardInterrupt:
        if not options.json:
            raise
        complete = False
    failed = [line for line in lines if line.verdict == "FAILED"]
    if options.json:
        report = {"passed": complete and not failed, "complete": complete, "machine": machine(device)}
        print(json.dumps({**report, "lines": [asdict(line) for line in lines]}, indent=2))
    else:
        _print(lines, failed, machine(device))
    return 1 if failed or not complete else 0


def _take_down(line: Line, lines: list[Line], aloud: bool) -> None:
    lines.append(line)
    if aloud:
        error = _number(line.error, line.unit)
        print(
            f"{line.verdict}: {line.impl}, {line.dtype}, {line.check} {error} {line.note}", file=sys.stderr, flush=True
        )


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = RaisingParser(prog="fastdpo verify", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is a GPU, else cpu")
    parser.add_argument(
        "--dtype", action="append", choices=ALL_DTYPES, help="may be repeated; default: the usual dtypes of the device"
    )
    for name, what in (("rows", "tokens"), ("hidden", "hidden size"), ("vocab", "vocabulary size")):
        parser.add_argument(f"--{name}", type=int, help=f"{what} in the comparisons with fp64")
    parser.add_argument("--model", help="also check a whole step of this model, a folder or name")
    parser.add_argument(
        "--trust_remote_code", "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    parser.add_argument("--sanitize", action="store_true", help="run under compute-sanitizer, on a GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def _load(options: argparse.Namespace) -> Any:
    from fastdpo.training.setup.models import load_config, load_model

    init_kwargs = {"trust_remote_code": True} if options.trust_remote_code else {}
    load_config(options.model, init_kwargs)
    return load_model(options.model, init_kwargs)


def _sanitized(argv: list[str]) -> int:
    """The same command as a child of compute-sanitizer, whose exit code is 1 for its own findings too.

    Raises:
        ValueError: there is no compute-sanitizer.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise ValueError(
            "--sanitize must find compute-sanitizer on the PATH, got a machine without it; it comes with the CUDA"
            " toolkit (package cuda-sanitizer-api, folder /usr/local/cuda/bin)"
        )
    start = "import sys; from fastdpo.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [tool, "--error-exitcode", "1", sys.executable, "-c", start, "verify", *argv]
    return subprocess.run(command, env=child_environment(), check=False).returncode


def _shape(options: argparse.Namespace, device: str) -> Shape | None:
    """The shape of the checks: None for the default; a given size replaces that part of this device's default."""
    given: dict[str, Any] = {name: getattr(options, name) for name in ("rows", "hidden", "vocab")}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(default_shape("tiled", device), **given) if given else None


def _print(lines: list[Line], failed: list[Line], facts: dict[str, str | None]) -> None:
    from rich.table import Table

    from fastdpo.cli.console import make_console

    table = Table(title=", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    for header in ("impl", "dtype", "check"):
        table.add_column(header, no_wrap=True)
    for header in ("error", "bound"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("verdict", "note"):
        table.add_column(header)
    for line in lines:
        error, bound = _number(line.error, line.unit), _number(line.bound, line.unit)
        table.add_row(
            line.impl, line.dtype, line.check, error, bound, line.verdict, line.note, style=STYLES[line.verdict]
        )
    console = make_console()
    console.print(table)
    for line in failed:
        console.print(
            f"FAILED: {line.impl}, {line.dtype}: {line.check} {line.note}", style=STYLES["FAILED"], markup=False
        )
    num_ok = sum(line.verdict == "ok" for line in lines)
    console.print(f"{num_ok} checks passed, {len(failed)} failed, {len(lines) - num_ok - len(failed)} skipped")


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "bytes":
        return f"{value / MIB:.1f} MiB"
    return f"{value:.0f}" if unit == "elements" else f"{value:.1e}" if unit == "relative" else f"{value:.3f}"
