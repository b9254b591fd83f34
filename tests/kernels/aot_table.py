"""Prints what every kernel compiles to, for each GPU architecture and each of three Triton releases; needs no GPU.

    python tests/kernels/aot_table.py [--versions 3.6.0 3.7.1 newest] [--architectures 90 100] [--operands bf16]

In: releases of Triton. Those that this environment lacks are installed with pip into folders `.venv-triton-<version>`,
which come before this environment's triton. Out: a table per release on stdout, and JSON lines with `--out`. A release
that cannot be installed is named and left out. Exit code 1 if a kernel did not compile. Hundreds of kernels: minutes
per release on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("ahead_of_time.py")
VERSIONS = ("3.6.0", "3.7.1", "newest")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
OPERANDS = ("bf16", "fp32")
COLUMNS = ("kernel", "sm", "operand", "blocks", "registers", "stack", "spills", "shared KiB", "instructions")


def newest_version() -> str:
    """The newest release on the package index. RuntimeError where it cannot be asked."""
    asked = pip("index", "versions", "triton")
    found = re.search(r"triton \((\S+)\)", asked.stdout)
    if found is None:
        raise RuntimeError(f"pip does not say which release of triton is the newest: {last_line(asked.stderr)}")
    return found[1]


def install(version: str) -> Path | None:
    """The folder with this release of triton alone, made where it is missing; None if this environment has it.

    RuntimeError if pip cannot.
    """
    if version == metadata.version("triton"):
        return None
    folder = ROOT / f".venv-triton-{version}"
    if not (folder / f"triton-{version}.dist-info").exists():
        done = pip("install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder), f"triton=={version}")
        if done.returncode != 0:
            raise RuntimeError(f"triton {version} cannot be installed: {last_line(done.stderr)}")
    return folder


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def compile_all(folder: Path | None, architecture: int, operand: str) -> tuple[list[dict], str | None]:
    """What ahead_of_time.py prints with the triton in `folder`, or this environment's, and why it stopped if it did."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
    command = [sys.executable, str(SCRIPT), str(architecture), operand]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    facts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return facts, None if done.returncode == 0 else f"sm_{architecture} {operand}: {last_line(done.stderr)}"


def row(fact: dict) -> tuple[str, ...]:
    """One line of the table, in the order of COLUMNS."""
    instructions = ", ".join(f"{count} {name}" for name, count in fact["matrix"].items() if count)
    numbers = (fact[name] for name in ("registers", "stack", "spills"))
    shared = f"{fact['shared'] / 1024:.0f}"
    blocks = "x".join(map(str, fact.get("blocks", ())))
    return fact["kernel"], str(fact["sm"]), fact["operand"], blocks, *map(str, numbers), shared, instructions or "-"


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for cells in (COLUMNS, tuple("-" * width for width in widths), *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")


def report(version: str, architectures: list[int], operands: list[str]) -> tuple[list[dict], list[str]]:
    """Prints the table of one release; returns its facts and what failed to compile."""
    version = newest_version() if version == "newest" else version
    folder = install(version)
    jobs = [(folder, architecture, operand) for operand in operands for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: compile_all(*job), jobs))
    facts = [fact for found, _ in done for fact in found]
    wrong = sorted({fact["triton"] for fact in facts} - {version})
    assert not wrong, f"compiled with triton {wrong} in place of {version}"
    print(f"\n## Triton {version}\n")
    print_table([row(fact) for fact in facts])
    return facts, [f"Triton {version}, {failure}" for _, failure in done if failure is not None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS))
    parser.add_argument("--architectures", nargs="+", type=int, choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--operands", nargs="+", choices=OPERANDS, default=list(OPERANDS))
    parser.add_argument("--out", type=Path, help="file for the facts as JSON lines")
    options = parser.parse_args(arguments)
    facts, failures = [], []
    for version in options.versions:
        try:
            found, failed = report(version, options.architectures, options.operands)
        except RuntimeError as error:
            print(f"\n## Triton {version}\n\nleft out: {error}")
            continue
        facts += found
        failures += failed
    if options.out is not None:
        options.out.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    spilling = sum(fact["spills"] > 0 for fact in facts)
    print(f"\n{len(facts)} kernels compiled, {spilling} of them spill, {len(failures)} runs failed")
    for failure in failures:
        print(f"failed: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
