"""What a GPU machine has to tell about this project, in less than nine minutes and in order of worth.

    bash benchmarks/gpu_suite.sh OUT [--seconds N] [--resume] [--only PART ...] [--wheels DIR] [--dry-run]

What does not fit in one run goes on in the next: `--resume` keeps what OUT has, and runs what was not finished. In: a
source tree and a Python with torch; nothing has to be installed, no network is used. What that Python lacks is taken
from wheels that gpu_wheels.sh has downloaded. Out: in OUT the JSON lines, the tuned blocks, a profiler's trace, log.txt
and SUMMARY.md, which is written anew around every part, so that it tells of a run that was stopped early too, and a
part that runs out of time is interrupted first, as by Ctrl-C, so that it says what it has found.
Exit code 1 if a part failed. Without a GPU it says so and runs the parts that need none; with --dry-run those that need
one, up to the launch: tests are collected, kernels compiled, benchmarks run small on the CPU. Only the standard library
is used here: a broken torch is a finding, not a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS, TESTS = ROOT / "benchmarks", ROOT / "tests"
SECONDS = 520  # under nine minutes with what starting and ending takes
LEAST_SECONDS = 10  # that a part is started with
SECONDS_OF_A_TURN = 30  # that a benchmark is left for what it has begun, models and compilers included
SECONDS_TO_SAY = 8  # that a part which is interrupted has for its last words
TAIL_LINES = 25  # of a failed part's log, in the summary
# Folders whose tests import nothing beyond torch, Triton and transformers; all tests where datasets is installed
HEAD_TESTS = ["modeling", "ops", "kernels", "evidence"]
# What would be wrong first, in this order: attention, products in fp32, verify's checks, the head op
FIRST_TESTS = ["modeling", "ops/test_matmul.py", "evidence", "ops", "kernels"]
MEMORY_TESTS = ["ops/test_peak_memory.py", "evidence/test_memory.py"]  # measure a GPU that nobody else uses
TEST_PROCESSES = 8  # most of their time is compiling
DRY_SECONDS = 3600
DRY_METHODS = ("plain, response rows", "fastdpo", "fastdpo, cached")  # each is a process that imports everything
RESULTS = "results.json"  # of the parts, for --resume
MACHINE = "machine.json"  # the GPU and the versions, for gpu_page.py
UNFINISHED = 3  # exit code of a part that had to leave something out, and goes on with what it has
PROBE = """
import importlib, importlib.util, json, platform, sys
names = ("torch", "triton", "transformers", "datasets", "pytest", "accelerate", "xdist", "trl", "liger_kernel")
facts = {"python": platform.python_version(), "broken": {}}
facts["missing"] = [name for name in names if importlib.util.find_spec(name) is None]
for name in {"datasets", "trl"} - set(facts["missing"]):  # wheels may want other versions of what is there
    try:
        importlib.import_module(name)
    except Exception as error:
        facts["broken"][name] = f"{type(error).__name__}: {error}"[:300]
        facts["missing"].append(name)
for name in set(names[:3]) - set(facts["missing"]):
    facts[name] = __import__(name).__version__
if "torch" in facts:
    import torch
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts["capability"] = list(torch.cuda.get_device_capability()) if facts["gpu"] else None
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
    dry: tuple[str, ...] | None = None  # the command of a dry run; None: the same


@dataclass
class Result:
    """What became of a part."""

    name: str
    verdict: str  # "ok", "unfinished", "FAILED", "stopped after N s", "left out: ..." or "running"
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)


def gpu_parts(out: Path, facts: dict[str, Any]) -> list[Part]:
    """The most valuable first."""
    tuning = ROOT / "kernels" / "fused" / "tuning.py"
    sizes = ["--hidden-size", "4096", "--vocab-size", "128256"]
    tune = ["-m", "fastdpo.kernels.tuning", *sizes, "--dtype", "bfloat16", "--seconds", "60"]
    blocks, tiny = f"{out}/blocks.json", ["--quick", "--shapes", "T64-R64-H32-V2100-float32"]
    op, skipping, training = (BENCHMARKS / f"bench_{name}.py" for name in ("linear_logps", "skipping", "training_step"))
    compiling = ["-m", "fastdpo.kernels.precompile", *sizes]
    dry_tune = ["--hidden-size", "128", "--vocab-size", "512", "--num-rows", "256", "--capability", "8.0"]
    trace = [str(BENCHMARKS / "profile_step.py"), "--out", f"{out}/trace.json.gz", "--record", f"{out}/profile.json"]
    return [
        Part(
            "compile",
            "compiling of what follows",
            compiling,
            60,
            needs=("triton",),
            dry=("-m", "fastdpo.kernels.precompile", *dry_tune[:4], "--capability", "9.0"),
        ),
        verify_part("--dtype", "bfloat16"),
        *test_parts(facts),
        Part(
            "tuning",
            "tuning of the blocks",
            [*tune, "--cache", blocks],
            75,
            needs=("triton",),
            output="blocks.json",
            script=tuning,
            dry=("-m", "fastdpo.kernels.tuning", *dry_tune),
        ),
        replace(
            bench_part(op, out, 120, "--runs", "5", "--max-seconds", "{seconds}", "--tuned", blocks),
            dry=(str(op), "--out", f"{out}/linear_logps.jsonl", *tiny, "--tuned", blocks),
        ),
        Part(
            "profile",
            "profiler trace of ten steps",
            trace,
            40,
            needs=("datasets", "accelerate"),
            output="profile.json",
            script=BENCHMARKS / "profile_step.py",
            dry=(*trace, "--quick"),
        ),
        replace(
            bench_part(training, out, 120, "--max-seconds", "{seconds}", "--resume"),
            needs=("datasets", "accelerate"),
            takes_the_rest=True,
            goes_on=True,
            dry=(
                str(training),
                "--out",
                f"{out}/training_step.jsonl",
                "--resume",
                "--quick",
                "--methods",
                *DRY_METHODS,
            ),
        ),
        verify_part(
            "--dtype", "float32", "--dtype", "float16", key="verify_others", name="fastdpo verify, other dtypes"
        ),
        replace(
            bench_part(skipping, out, 50, "--quick"),
            dry=(str(skipping), "--out", f"{out}/skipping.jsonl", *tiny, "--tolerances", "0", "0.01"),
        ),
        Part(
            "other_tests",
            "the head op's other tests, on the GPU where there is a choice",
            pytest_command(TESTS / "ops", TESTS / "kernels", "-m", "not gpu and not slow", *_processes(facts)),
            120,
            needs=("pytest",),
            dry=tuple(pytest_command(TESTS / "ops", TESTS / "kernels", "-m", "not gpu and not slow", "--collect-only")),
        ),
    ]


def test_parts(facts: dict[str, Any]) -> list[Part]:
    """GPU tests in processes beside each other, those of memory alone."""
    first = [TESTS / name for name in FIRST_TESTS]
    others = [] if "datasets" in facts["missing"] else [TESTS]
    apart = [f"--ignore={TESTS / name}" for name in MEMORY_TESTS]
    is_gpu = ("-m", "gpu and not slow")
    memory = [TESTS / name for name in MEMORY_TESTS]
    return [
        Part(
            "tests",
            "GPU tests",
            pytest_command(*first, *others, *is_gpu, *apart, *_processes(facts)),
            120,
            needs=("pytest",),
        ),
        Part("memory_tests", "GPU tests of memory", pytest_command(*memory, *is_gpu), 40, needs=("pytest",)),
    ]


def _processes(facts: dict[str, Any]) -> list[str]:
    """Of pytest-xdist, where it is installed; tests of a module stay together, in the order of the modules."""
    return (
        []
        if "xdist" in facts["missing"]
        else ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1)), "--dist", "loadfile"]
    )


def cpu_parts(out: Path, facts: dict[str, Any]) -> list[Part]:
    """What a machine without a GPU can say: the CPU's numbers, and what the kernels compile to for one architecture."""
    small = ["--dtype", "float32", "--rows", "67", "--hidden", "40", "--vocab", "1021"]
    script = TESTS / "kernels" / "ahead_of_time.py"
    ahead = {"output": "ahead_of_time.jsonl", "stdout": True, "script": script}
    return [
        verify_part("--device", "cpu", *small),
        Part("ahead_of_time", "ahead of time, sm_90", [str(script), "90", "bf16"], 120, ("triton",), **ahead),
    ]


def verify_part(*options: str, key: str = "verify", name: str = "fastdpo verify") -> Part:
    command = ["-m", "fastdpo", "verify", "--json", *options]
    small = ("--device", "cpu", "--rows", "67", "--hidden", "40", "--vocab", "1021")
    return Part(key, name, command, 50, output=f"{key}.json", stdout=True, dry=(*command, *small))


def bench_part(script: Path, out: Path, seconds: float, *options: str) -> Part:
    name = script.stem.removeprefix("bench_")
    output = f"{name}.jsonl"
    return Part(
        name, script.name, [str(script), "--out", f"{out}/{output}", *options], seconds, output=output, script=script
    )


def pytest_command(*arguments: str | Path) -> list[str]:
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    config += ["-v", "--tb=line"]  # a line as each test ends: what is stopped has said something
    return ["-m", "pytest", *config, *map(str, arguments)]


def missing_wheels(folder: Path) -> list[Path]:
    """The wheels of a folder that fit this Python, and whose modules it does not have."""
    own = {
        "py3",
        "py2.py3",
        f"py{sys.version_info[0]}{sys.version_info[1]}",
        f"cp{sys.version_info[0]}{sys.version_info[1]}",
    }
    found = []
    for wheel in sorted(folder.glob("*.whl")):
        tag = wheel.stem.split("-")[-3]
        with zipfile.ZipFile(wheel) as archive:
            tops = {name.split("/")[0].removesuffix(".py") for name in archive.namelist()}
        modules = [top for top in tops if not top.endswith((".dist-info", ".data", ".libs")) and top.isidentifier()]
        if tag in own and not any(importlib.util.find_spec(module) for module in modules):
            found.append(wheel)
    return found


@contextlib.contextmanager
def importable_tree(wheels: Path | None = None) -> Iterator[Path]:
    """A folder that has fastdpo as pip would install it: links to the sources, kernels/fused among them as kernels;
    and beside it what is taken out of `wheels`."""
    with tempfile.TemporaryDirectory(prefix="fastdpo-suite-") as folder:
        package = Path(folder) / "fastdpo"
        package.mkdir()
        for entry in (ROOT / "fastdpo").iterdir():
            if entry.name != "__pycache__":
                (package / entry.name).symlink_to(entry)
        (package / "kernels").symlink_to(ROOT / "kernels" / "fused")
        for wheel in missing_wheels(wheels) if wheels is not None and wheels.is_dir() else ():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        yield Path(folder)


class Suite:
    """Runs parts one after the other against one clock, and keeps SUMMARY.md up to date."""

    def __init__(self, out: Path, seconds: float, tree: Path, *, is_dry: bool = False):
        self.is_dry = is_dry
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
            if self.is_dry:  # on fewer cores
                part, limit = replace(part, command=list(part.dry or part.command)), left
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
                command, stdout=stdout, stderr=log, start_new_session=True, preexec_fn=_listen, **self._surroundings()
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
        text = [
            "# GPU suite, dry run" if self.is_dry else "# GPU suite",
            "",
            *machine_lines(self.facts),
            "",
            "| part | result | s |",
            "|---|---|---|",
        ]
        text += [f"| {r.name} | {r.verdict} | {r.seconds:.0f} |" for r in self.results]
        text += ["", note] if note else []
        for name in ("verify.json", "verify_others.json"):
            text += verify_lines(self.out / name)
        text += profile_lines(self.out / "profile.json")
        for result in self.results:
            if result.tail:
                text += ["", f"## {result.name}: {result.verdict}", "", "```", *result.tail, "```"]
        for path in sorted(self.out.glob("*.jsonl")):
            text += table_lines(path)
        results = json.dumps(list(map(asdict, self.results)))
        for name, content in (
            ("SUMMARY.md", "\n".join(text)),
            (RESULTS, results),
            (MACHINE, json.dumps({**self.facts, "is_dry": self.is_dry})),
        ):
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
    lines += [f"{name} cannot be imported: {reason}" for name, reason in facts.get("broken", {}).items()]
    return lines + ([f"Importing them failed: {facts['error']}"] if "error" in facts else [])


def verify_lines(path: Path) -> list[str]:
    """How many checks passed, and a line for each that did not."""
    try:
        report = json.loads(path.read_text())
        lines = report["lines"]
    except (OSError, ValueError, KeyError):  # not there yet, or stopped half-way
        return []
    failed = [line for line in lines if line["verdict"] == "FAILED"]
    num_ok = sum(line["verdict"] == "ok" for line in lines)
    stopped = "" if report.get("complete", True) else " It was stopped before its end."
    text = ["", f"`fastdpo verify`: {num_ok} checks passed, {len(failed)} failed.{stopped}"]
    for line in failed:
        numbers = f"{line['error']:.2e}, bound {line['bound']:.2e}" if line["error"] is not None else line["note"]
        text.append(f"- {line['impl']}, {line['dtype']}, {line['check']}: {numbers}")
    return text


def profile_lines(path: Path) -> list[str]:
    """What the host did in a training step."""
    try:
        found = json.loads(path.read_text())
        counts = f"{found['waits']:.1f} host waits, {found['launches']:.0f} launches, {found['copies']:.1f} copies"
        return ["", f"A step of {found['workload']} under the profiler: {found['step_ms']:.1f} ms, {counts}."]
    except (OSError, ValueError, KeyError):
        return []


def table_lines(path: Path) -> list[str]:
    """The tables that table.py makes of a benchmark's lines; other lines are counted."""
    if path.stem == "ahead_of_time":
        return ["", f"{path.name}: {len(path.read_text().splitlines())} kernels compiled."]
    command = [sys.executable, str(BENCHMARKS / "table.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    tables = done.stdout if done.returncode == 0 else f"No table: {done.stderr.strip().splitlines()[-1:]}"
    return ["", f"## {path.name}", "", tables.strip()]


def _listen() -> None:
    """A shell that has put the suite in the background makes its processes deaf to interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a part and everything that it has started; interrupted first, it prints what it has found by then."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SECONDS_TO_SAY)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results; old results in it are replaced")
    parser.add_argument("--seconds", type=float, help=f"for everything together (default {SECONDS}, dry {DRY_SECONDS})")
    parser.add_argument(
        "--wheels", type=Path, default=BENCHMARKS / "wheels", help="folder of gpu_wheels.sh (default benchmarks/wheels)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="where there is no GPU: every part up to the launch, small, on the CPU"
    )
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
    seconds = options.seconds or (DRY_SECONDS if options.dry_run else SECONDS)
    with importable_tree(options.wheels) as tree:
        suite = Suite(out, seconds, tree, is_dry=options.dry_run)
        try:
            suite.probe()
            print("\n".join(machine_lines(suite.facts)), flush=True)
            if "torch" in suite.facts["missing"]:
                suite.write_summary("Nothing was run: torch cannot be imported.")
                return 1
            if suite.facts["gpu"] and suite.is_dry:
                parser.error(f"--dry-run is for machines without a GPU, this one has {suite.facts['gpu']}")
            parts = (gpu_parts if suite.facts["gpu"] or suite.is_dry else cpu_parts)(out, suite.facts)
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
