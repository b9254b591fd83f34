"""What a GPU machine has to tell about this project, in less than nine minutes and in order of worth.

    bash benchmarks/gpu_suite.sh OUT [--seconds N] [--resume] [--only PART ...]

What does not fit in one run goes on in the next: `--resume` keeps what OUT has, and runs what was not finished. In: a
source tree and a Python with torch; nothing has to be installed, no network is used. Out: in OUT the JSON lines,
the tuned blocks, log.txt and SUMMARY.md. SUMMARY.md is written anew around every part, so that it tells of a run that
was stopped early too. Exit code 1 if a part failed. Without a GPU it says so and runs the parts that need none. Only
the standard library is used here: a broken torch is a finding, not a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS, TESTS = ROOT / "benchmarks", ROOT / "tests"
SECONDS = 520  # under nine minutes with what starting and ending takes
LEAST_SECONDS = 10  # that a part is started with
SECONDS_OF_A_TURN = 30  # that a benchmark is left for what it has begun, models and compilers included
TAIL_LINES = 25  # of a failed part's log, in the summary
# Folders whose tests import nothing beyond torch, Triton and transformers; all tests where datasets is installed
HEAD_TESTS = ["ops", "kernels", "evidence", "modeling"]
RESULTS = "results.json"  # of the parts, for --resume
UNFINISHED = 3  # exit code of a part that had to leave something out, and goes on with what it has
PROBE = """
import importlib.util, json, platform, sys
names = ("torch", "triton", "transformers", "datasets", "pytest", "accelerate")
facts = {"python": platform.python_version()}
facts["missing"] = [name for name in names if importlib.util.find_spec(name) is None]
for name in set(names[:3]) - set(facts["missing"]):
    facts[name] = __import__(name).__version__
if "torch" in facts:
    import torch
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps(facts))
"""


@dataclass(frozen=True)
class Part:
    """One command, in which "{seconds}" stands for the time after which it should begin nothing new."""

    key: str  # for --only
    name: str
    command: list[str]
    seconds: float  # the most it may take
    needs: tuple[str, ...] = ()  # modules
    output: str | None = None  # file in OUT that it writes
    stdout: bool = False  # what it prints is its output
    script: Path | None = None  # left out where it does not exist
    takes_the_rest: bool = False  # may also take the time that the parts after it do not need
    goes_on: bool = False  # with what its output holds already


@dataclass
class Result:
    """What became of a part."""

    name: str
    verdict: str  # "ok", "unfinished", "FAILED", "stopped after N s", "left out: ..." or "running"
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)


def gpu_parts(out: Path, facts: dict[str, Any]) -> list[Part]:
    """The most valuable first."""
    folders = [TESTS] if "datasets" not in facts["missing"] else [TESTS / name for name in HEAD_TESTS]
    tuning = ROOT / "kernels" / "fused" / "tuning.py"
    sizes = ["--hidden-size", "4096", "--vocab-size", "128256", "--dtype", "bfloat16", "--seconds", "70"]
    op, skipping, training = (BENCHMARKS / f"bench_{name}.py" for name in ("linear_logps", "skipping", "training_step"))
    return [
        Part("tests", "GPU tests", pytest_command(*folders, "-m", "gpu and not slow"), 120, needs=("pytest",)),
        verify_part(),
        Part(
            "tuning",
            "tuning of the blocks",
            ["-m", "fastdpo.kernels.tuning", *sizes, "--cache", f"{out}/blocks.json"],
            90,
            needs=("triton",),
            output="blocks.json",
            script=tuning,
        ),
        bench_part(op, out, 150, "--runs", "5", "--max-seconds", "{seconds}"),
        replace(
            bench_part(training, out, 120, "--max-seconds", "{seconds}", "--resume"),
            needs=("datasets", "accelerate"),
            takes_the_rest=True,
            goes_on=True,
        ),
        bench_part(skipping, out, 50, "--quick"),
        Part(
            "other_tests",
            "the head op's other tests, on the GPU where there is a choice",
            pytest_command(TESTS / "ops", TESTS / "kernels", "-m", "not gpu and not slow"),
            120,
            needs=("pytest",),
        ),
    ]


def cpu_parts(out: Path, facts: dict[str, Any]) -> list[Part]:
    """What a machine without a GPU can say: the CPU's numbers, and what the kernels compile to for one architecture."""
    small = ["--dtype", "float32", "--rows", "67", "--hidden", "40", "--vocab", "1021"]
    script = TESTS / "kernels" / "ahead_of_time.py"
    ahead = {"output": "ahead_of_time.jsonl", "stdout": True, "script": script}
    return [
        verify_part("--device", "cpu", *small),
        Part("ahead_of_time", "ahead of time, sm_90", [str(script), "90", "bf16"], 120, ("triton",), **ahead),
    ]


def verify_part(*options: str) -> Part:
    command = ["-m", "fastdpo.cli.main", "verify", "--json", *options]
    return Part("verify", "fastdpo verify", command, 60, output="verify.json", stdout=True)


def bench_part(script: Path, out: Path, seconds: float, *options: str) -> Part:
    name = script.stem.removeprefix("bench_")
    output = f"{name}.jsonl"
    return Part(
        name, script.name, [str(script), "--out", f"{out}/{output}", *options], seconds, output=output, script=script
    )


def pytest_command(*arguments: str | Path) -> list[str]:
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q"]
    return ["-m", "pytest", *config, *map(str, arguments)]


@contextlib.contextmanager
def importable_tree() -> Iterator[Path]:
    """A folder that has fastdpo as pip would install it: links to the sources, kernels/fused among them as kernels."""
    with tempfile.TemporaryDirectory(prefix="fastdpo-suite-") as folder:
        package = Path(folder) / "fastdpo"
        package.mkdir()
        for entry in (ROOT / "fastdpo").iterdir():
            if entry.name != "__pycache__":
                (package / entry.name).symlink_to(entry)
        (package / "kernels").symlink_to(ROOT / "kernels" / "fused")
        yield Path(folder)


class Suite:
    """Runs parts one after the other against one clock, and keeps SUMMARY.md up to date."""

    def __init__(self, out: Path, seconds: float, tree: Path):
        self.out, self.deadline = out, time.monotonic() + seconds
        self.log = out / "log.txt"
        self.tree, self.facts = tree, {}
        self.results: list[Result] = []

    def probe(self) -> None:
        """Versions, the GPU's name, and what is not installed."""
        command = [sys.executable, "-c", PROBE]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **self._surroundings())
        if done.returncode == 0:
            self.facts = json.loads(done.stdout)
        else:
            self.facts = {"missing": ["torch"], "error": (done.stderr.strip().splitlines() or ["?"])[-1]}

    def begin(self, parts: list[Part], only: list[str] | None, resume: bool) -> list[Part]:
        """The parts that are to be run, after what they replace has been removed; what else OUT has stays."""
        if (self.out / RESULTS).exists():
            self.results = [Result(**result) for result in json.loads((self.out / RESULTS).read_text())]
        done = {result.name for result in self.results if resume and result.verdict == "ok"}
        chosen = [part for part in parts if (not only or part.key in only) and part.name not in done]
        for part in chosen:
            if part.output is not None and not (resume and part.goes_on):
                (self.out / part.output).unlink(missing_ok=True)
        return chosen

    def run(self, part: Part, reserved: float = 0.0) -> Result:
        """Runs the part, or says why not.

        Args:
            reserved: seconds that the parts after it may need.
        """
        result = Result(part.name, "running")
        self.results = [*(r for r in self.results if r.name != part.name), result]
        left = self.deadline - time.monotonic()
        missing = [name for name in part.needs if name in self.facts["missing"]]
        if part.script is not None and not part.script.exists():
            result.verdict = f"left out: this checkout has no {part.script.relative_to(ROOT)}"
        elif missing:
            result.verdict = f"left out: {', '.join(missing)} is not installed"
        elif left < LEAST_SECONDS:
            result.verdict = "left out: no time was left"
        else:
            print(f"{part.name} ...", flush=True)
            self.write_summary()
            limit = max(part.seconds, left - reserved) if part.takes_the_rest else part.seconds
            self._run(part, result, min(limit, left))
        print(f"{part.name}: {result.verdict} ({result.seconds:.0f} s)", flush=True)
        self.write_summary()
        return result

    def _run(self, part: Part, result: Result, limit: float) -> None:
        start = time.monotonic()
        begin_until = f"{max(limit - SECONDS_OF_A_TURN, 1):.0f}"
        command = [sys.executable, *(word.replace("{seconds}", begin_until) for word in part.command)]
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self.log.open("ab"))
            log.write(f"\n===== {part.name}: {' '.join(command[1:])}\n".encode())
            log.flush()
            offset = log.tell()
            stdout = log
            if part.stdout:
                assert part.output is not None
                stdout = stack.enter_context((self.out / part.output).open("wb"))
            # A session of its own: what the part has started ends with it.
            process = subprocess.Popen(
                command, stdout=stdout, stderr=log, start_new_session=True, **self._surroundings()
            )
            try:
                code = process.wait(timeout=limit)
                result.verdict = {0: "ok", UNFINISHED: "unfinished"}.get(code, "FAILED")
            except subprocess.TimeoutExpired:
                result.verdict = f"stopped after {limit:.0f} s"
            finally:
                _end(process)
                result.seconds = time.monotonic() - start
        if result.verdict not in ("ok", "unfinished"):
            result.tail = self.log.read_bytes()[offset:].decode(errors="replace").splitlines()[-TAIL_LINES:]

    def _surroundings(self) -> dict[str, Any]:
        """Run outside the checkout: there `python -m` would find fastdpo without its kernels."""
        path = os.pathsep.join(filter(None, [str(self.tree), os.environ.get("PYTHONPATH")]))
        offline = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return {"env": {**inherited, **offline, "PYTHONPATH": path}, "cwd": self.tree}

    def write_summary(self, note: str = "") -> None:
        """SUMMARY.md, whole, from what is known by now."""
        text = ["# GPU suite", "", *machine_lines(self.facts), "", "| part | result | s |", "|---|---|---|"]
        text += [f"| {r.name} | {r.verdict} | {r.seconds:.0f} |" for r in self.results]
        text += ["", note] if note else []
        text += verify_lines(self.out / "verify.json")
        for result in self.results:
            if result.tail:
                text += ["", f"## {result.name}: {result.verdict}", "", "```", *result.tail, "```"]
        for path in sorted(self.out.glob("*.jsonl")):
            text += table_lines(path)
        for name, content in (("SUMMARY.md", "\n".join(text)), (RESULTS, json.dumps(list(map(asdict, self.results))))):
            unfinished = self.out / f"{name}.new"
            unfinished.write_text(content + "\n")
            unfinished.replace(self.out / name)


def machine_lines(facts: dict[str, Any]) -> list[str]:
    versions = ", ".join(
        f"{name} {facts[name]}" for name in ("python", "torch", "triton", "transformers") if name in facts
    )
    lines = [f"{facts.get('gpu') or 'No GPU that torch can use: only the parts that need none'}; {versions}"]
    if facts.get("missing"):
        lines.append(f"Not installed: {', '.join(facts['missing'])}.")
    return lines + ([f"Importing them failed: {facts['error']}"] if "error" in facts else [])


def verify_lines(path: Path) -> list[str]:
    """How many checks passed, and a line for each that did not."""
    try:
        lines = json.loads(path.read_text())["lines"]
    except (OSError, ValueError, KeyError):  # not there yet, or stopped half-way
        return []
    failed = [line for line in lines if line["verdict"] == "FAILED"]
    num_ok = sum(line["verdict"] == "ok" for line in lines)
    text = ["", f"`fastdpo verify`: {num_ok} checks passed, {len(failed)} failed."]
    for line in failed:
        numbers = f"{line['error']:.2e}, bound {line['bound']:.2e}" if line["error"] is not None else line["note"]
        text.append(f"- {line['impl']}, {line['dtype']}, {line['check']}: {numbers}")
    return text


def table_lines(path: Path) -> list[str]:
    """The tables that table.py makes of a benchmark's lines; other lines are counted."""
    if path.stem == "ahead_of_time":
        return ["", f"{path.name}: {len(path.read_text().splitlines())} kernels compiled."]
    command = [sys.executable, str(BENCHMARKS / "table.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    tables = done.stdout if done.returncode == 0 else f"No table: {done.stderr.strip().splitlines()[-1:]}"
    return ["", f"## {path.name}", "", tables.strip()]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and everything that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results; old results in it are replaced")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything together (default {SECONDS})")
    parser.add_argument(
        "--resume", action="store_true", help="keep what OUT has, and run the parts that are not ok yet"
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts alone, and keep the others' results")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    if out.exists() and not out.is_dir():
        parser.error(f"OUT must be a folder, {out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    if not options.resume and not options.only:
        for old in [out / "log.txt", out / "SUMMARY.md", out / RESULTS, *out.glob("*.json"), *out.glob("*.jsonl")]:
            old.unlink(missing_ok=True)

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with importable_tree() as tree:
        suite = Suite(out, options.seconds, tree)
        try:
            suite.probe()
            print("\n".join(machine_lines(suite.facts)), flush=True)
            if "torch" in suite.facts["missing"]:
                suite.write_summary("Nothing was run: torch cannot be imported.")
                return 1
            parts = (gpu_parts if suite.facts["gpu"] else cpu_parts)(out, suite.facts)
            unknown = sorted(set(options.only or ()) - {part.key for part in parts})
            if unknown:
                parser.error(f"--only must name some of {', '.join(part.key for part in parts)}, got {unknown[0]}")
            parts = suite.begin(parts, options.only, options.resume)
            for number, part in enumerate(parts):
                suite.run(part, reserved=sum(later.seconds for later in parts[number + 1 :]))
        except KeyboardInterrupt:
            if suite.results and suite.results[-1].verdict == "running":
                suite.results[-1].verdict = "stopped with the suite"
            suite.write_summary("The suite was stopped before its end.")
            return 130
    print(f"\n{out / 'SUMMARY.md'}")
    return 1 if any(result.verdict == "FAILED" for result in suite.results) else 0


if __name__ == "__main__":
    sys.exit(main())
