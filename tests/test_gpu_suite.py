"""benchmarks/gpu_suite.sh on a machine that has torch, Triton and transformers, and neither a GPU nor fastdpo."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_suite.sh"
NOT_THERE = (
    "fastdpo",
    "__editable__",
    "datasets",
    "trl",
    "peft",
    "liger_kernel",
    "cut_cross_entropy",
    "rich",
    "kernels",
)


def load(name):
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu_suite = load("gpu_suite")


@pytest.fixture(scope="module")
def other_python(tmp_path_factory):
    """An environment with all installed packages but NOT_THERE, through links."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().startswith(NOT_THERE) and not entry.name.endswith(".pth"):
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def start(python, *arguments):
    environment = {**os.environ, "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_runs_what_needs_none(other_python, tmp_path):
    alone = subprocess.run([other_python, "-c", "import fastdpo"], cwd=tmp_path, capture_output=True, check=False)
    assert alone.returncode != 0  # nothing but the source tree has it
    suite = start(other_python, tmp_path / "out")
    printed, _ = suite.communicate(timeout=300)
    summary = (tmp_path / "out" / "SUMMARY.md").read_text()
    assert suite.returncode == 0, printed + summary
    assert "No GPU" in printed
    assert "No GPU" in summary
    assert "Not installed: datasets" in summary
    assert "| fastdpo verify | ok |" in summary
    assert "| ahead of time, sm_90 | ok |" in summary
    report = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert report["passed"]
    assert {line["impl"] for line in report["lines"] if line["verdict"] == "ok"} == {"tiled", "reference"}
    kernels = [json.loads(line) for line in (tmp_path / "out" / "ahead_of_time.jsonl").read_text().splitlines()]
    assert any("partials" in kernel["kernel"] for kernel in kernels)


def test_stopped_early_it_leaves_a_summary(other_python, tmp_path):
    suite = start(other_python, tmp_path)
    for line in suite.stdout:
        if line.startswith("fastdpo verify ..."):
            break
    suite.send_signal(signal.SIGTERM)
    printed, _ = suite.communicate(timeout=60)
    assert suite.returncode == 130, printed
    summary = (tmp_path / "SUMMARY.md").read_text()
    assert "| fastdpo verify | stopped with the suite |" in summary
    assert "The suite was stopped before its end." in summary


def test_tests_for_a_gpu_are_found_without_datasets(other_python, tmp_path):
    with gpu_suite.importable_tree() as tree:
        parts = gpu_suite.gpu_parts(tmp_path, {"missing": ["datasets"]})
        command = [other_python, *next(part for part in parts if part.name == "GPU tests").command, "--collect-only"]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        found = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    assert "test_error_on_a_gpu_is_at_most_twice_that_of_plain_pytorch" in found.stdout
    assert "test_everything_passes_on_a_gpu" in found.stdout


def test_the_benchmarks_know_the_options_that_they_are_given(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    seen = []
    for part in gpu_suite.gpu_parts(tmp_path, {"missing": []}):
        if part.script is not None and part.script.name.startswith("bench_"):
            words = [word.replace("{seconds}", "7") for word in part.command[1:]]
            options = importlib.import_module(part.script.stem).parse_args(words)
            seen.append((Path(options.out).name, getattr(options, "max_seconds", None)))
            assert Path(options.out).name == part.output
    assert seen == [("linear_logps.jsonl", 7.0), ("training_step.jsonl", 7.0), ("skipping.jsonl", seen[2][1])]


def test_tuning_knows_the_options_that_it_is_given(tmp_path):
    tuning = next(p for p in gpu_suite.gpu_parts(tmp_path, {"missing": []}) if p.name == "tuning of the blocks")
    with gpu_suite.importable_tree() as tree:
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        command = [sys.executable, *tuning.command[:2], "--help"]
        said = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True).stdout
    options = [word for word in tuning.command[2:] if word.startswith("--")]
    assert len(options) > 3
    assert [option for option in options if option not in said] == []


@pytest.fixture
def suite(tmp_path):
    made = gpu_suite.Suite(tmp_path, 60.0, tmp_path)
    made.facts = {"missing": ["datasets"], "gpu": None}
    return made


def part(code, seconds=30, **more):
    return gpu_suite.Part("key", "a part", ["-c", code], seconds, **more)


def test_a_part_that_fails_is_in_the_summary_with_the_end_of_its_log(suite):
    assert suite.run(part("print('fine')")).verdict == "ok"
    assert suite.run(part("print('before'); raise SystemExit('the reason')")).verdict == "FAILED"
    summary = (suite.out / "SUMMARY.md").read_text()
    assert "before\nthe reason" in summary
    assert "fine" not in summary
    assert "fine" in suite.log.read_text()


def test_a_part_past_its_limit_is_ended_with_its_children(suite):
    child = "import time; print(1, flush=True); time.sleep(99)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    result = suite.run(part(code, seconds=2))
    assert result.verdict == "stopped after 2 s"
    assert time.monotonic() - begin < 20
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert child not in running


@pytest.mark.parametrize(
    ("more", "verdict"),
    [
        ({"needs": ("datasets",)}, "left out: datasets is not installed"),
        ({"script": ROOT / "benchmarks" / "none.py"}, "left out: this checkout has no benchmarks/none.py"),
    ],
)
def test_what_cannot_run_is_left_out_with_the_reason(suite, more, verdict):
    assert suite.run(part("raise SystemExit(1)", **more)).verdict == verdict


def test_no_part_starts_when_the_time_is_used_up(tmp_path):
    suite = gpu_suite.Suite(tmp_path, 0.0, tmp_path)
    suite.facts = {"missing": []}
    assert suite.run(part("raise SystemExit(1)")).verdict == "left out: no time was left"


def named(key, code="pass", seconds=30, **more):
    return gpu_suite.Part(key, f"part {key}", ["-c", code], seconds, output=f"{key}.jsonl", **more)


def verdicts(suite):
    return {result.name.removeprefix("part "): result.verdict for result in suite.results}


def test_what_was_not_finished_goes_on_and_what_was_is_not_run_again(tmp_path):
    leaves = "import sys; open(sys.argv[1], 'a').write('{}\\n'); sys.exit(int(sys.argv[2]))"
    parts = [named("fine"), named("broken", "raise SystemExit(1)"), named("long", leaves, goes_on=True)]
    first = gpu_suite.Suite(tmp_path, 60.0, tmp_path)
    first.facts = {"missing": []}
    parts[2].command.extend([str(tmp_path / "long.jsonl"), "3"])
    for one in first.begin(parts, None, resume=False):
        first.run(one)
    assert verdicts(first) == {"fine": "ok", "broken": "FAILED", "long": "unfinished"}
    (tmp_path / "fine.jsonl").write_text("{}\n")
    (tmp_path / "broken.jsonl").write_text("{}\n")
    second = gpu_suite.Suite(tmp_path, 60.0, tmp_path)
    second.facts = {"missing": []}
    parts[2].command[-1] = "0"
    left = second.begin(parts, None, resume=True)
    assert [one.key for one in left] == ["broken", "long"]
    assert not (tmp_path / "broken.jsonl").exists()
    for one in left:
        second.run(one)
    assert verdicts(second) == {"fine": "ok", "broken": "FAILED", "long": "ok"}
    assert (tmp_path / "fine.jsonl").exists()
    assert len((tmp_path / "long.jsonl").read_text().splitlines()) == 2
    assert "| part fine | ok |" in (tmp_path / "SUMMARY.md").read_text()


def test_one_part_alone_replaces_its_own_results_only(tmp_path):
    parts = [named("one"), named("other", goes_on=True)]
    suite = gpu_suite.Suite(tmp_path, 60.0, tmp_path)
    suite.facts = {"missing": []}
    for one in suite.begin(parts, None, resume=False):
        suite.run(one)
    for one in parts:
        (tmp_path / one.output).write_text("{}\n")
    again = gpu_suite.Suite(tmp_path, 60.0, tmp_path)
    assert [one.key for one in again.begin(parts, ["other"], resume=False)] == ["other"]
    assert not (tmp_path / "other.jsonl").exists()
    assert (tmp_path / "one.jsonl").exists()
    assert verdicts(again) == {"one": "ok", "other": "ok"}


def test_a_part_may_take_the_time_that_those_after_it_do_not_need(tmp_path):
    says = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
    told = tmp_path / "told"
    for seconds, reserved, expected in ((1000, 100, 870), (1000, 990, 60), (200, 0, 170)):
        suite = gpu_suite.Suite(tmp_path, seconds, tmp_path)
        suite.facts = {"missing": []}
        one = named("a", says, seconds=90, takes_the_rest=True)
        one.command.extend([str(told), "{seconds}"])
        assert suite.run(one, reserved=reserved).verdict == "ok"
        assert int(told.read_text()) == pytest.approx(expected, abs=2)


def test_a_part_past_its_limit_is_interrupted_and_says_what_it_has(suite):
    code = """
import time
try:
    print("found by now", flush=True)
    time.sleep(99)
except KeyboardInterrupt:
    print("last words", flush=True)
    raise SystemExit(1)
"""
    begin = time.monotonic()
    result = suite.run(part(code, seconds=2))
    assert result.verdict == "stopped after 2 s"
    assert result.tail[-2:] == ["found by now", "last words"]
    assert time.monotonic() - begin < 20


def test_a_part_that_does_not_listen_is_ended_all_the_same(suite, monkeypatch):
    monkeypatch.setattr(gpu_suite, "SECONDS_TO_SAY", 1)
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(99)"
    begin = time.monotonic()
    assert suite.run(part(code, seconds=2)).verdict == "stopped after 2 s"
    assert time.monotonic() - begin < 20


def test_a_test_run_that_is_stopped_has_named_what_failed(suite, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import time\n\ndef test_wrong():\n    assert 1 == 2\n\ndef test_endless():\n    time.sleep(99)\n"
    )
    command = [*gpu_suite.pytest_command(tmp_path / "test_some.py"), "--rootdir", str(tmp_path)]
    for seconds in (8, 60):  # a busy machine may need longer to start pytest
        result = suite.run(gpu_suite.Part("key", "tests", command, seconds))
        assert result.verdict == f"stopped after {seconds} s"
        if "test_some.py::test_wrong" in suite.log.read_text():
            break
    assert "test_some.py::test_wrong FAILED" in suite.log.read_text()
    assert "assert 1 == 2" in "\n".join(result.tail)


@pytest.mark.slow
def test_verify_that_is_stopped_keeps_its_lines(suite):
    verify = gpu_suite.verify_part("--device", "cpu", "--vocab", "32003")  # a minute: most is left at the stop
    with gpu_suite.importable_tree() as tree:
        suite.tree = tree
        process = subprocess.Popen(
            [sys.executable, *verify.command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **suite._surroundings(),
        )
        first = [process.stderr.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        report = json.loads(process.communicate(timeout=300)[0])  # the check under way may take a minute
    assert all(line.startswith(("ok: ", "skipped: ")) for line in first)
    assert report["complete"] is False
    assert report["passed"] is False
    assert len(report["lines"]) >= 3
    (suite.out / "verify.json").write_text(json.dumps(report))
    assert "It was stopped before its end." in "\n".join(gpu_suite.verify_lines(suite.out / "verify.json"))


def wheel(folder, name, modules, tag="py3-none-any"):
    path = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for module in modules:
            archive.writestr(f"{module}/__init__.py", "found = True\n")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\n")
    return path


def test_wheels_bring_what_is_missing_and_nothing_else(tmp_path):
    wheel(tmp_path, "brought", ["brought_along"])
    wheel(tmp_path, "json_again", ["json"])  # this Python has it
    wheel(tmp_path, "other", ["of_another_python"], "cp39-cp39-manylinux2014_x86_64")
    assert [path.name for path in gpu_suite.missing_wheels(tmp_path)] == ["brought-1.0-py3-none-any.whl"]
    with gpu_suite.importable_tree(tmp_path) as tree:
        code = "import brought_along, fastdpo, json; print(brought_along.found, hasattr(json, 'dumps'))"
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True, check=True
        )
    assert done.stdout.split() == ["True", "True"]


def test_a_package_that_does_not_import_is_missing_with_its_reason(tmp_path, suite):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("raise ImportError('pyarrow>=24 is required')\n")
    suite.probe()
    assert "datasets" in suite.facts["missing"]
    said = "\n".join(gpu_suite.machine_lines(suite.facts))
    assert "datasets cannot be imported: ImportError: pyarrow>=24 is required" in said


def test_tests_run_beside_each_other_and_those_of_memory_alone(tmp_path):
    first, memory = gpu_suite.test_parts({"missing": []})
    assert "-n" in first.command
    assert "-n" not in memory.command
    assert [word for word in first.command if "memory" in word] == [
        f"--ignore={ROOT / 'tests' / name}" for name in gpu_suite.MEMORY_TESTS
    ]
    assert all(str(ROOT / "tests" / name) in memory.command for name in gpu_suite.MEMORY_TESTS)
    assert "-n" not in gpu_suite.test_parts({"missing": ["xdist"]})[0].command
    order = [first.command.index(str(ROOT / "tests" / name)) for name in gpu_suite.FIRST_TESTS]
    assert order == sorted(order)


def test_the_riskiest_shapes_come_first_for_fastdpo_and_plain_pytorch_alone(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench = importlib.import_module("bench_linear_logps")
    problem = importlib.import_module("fastdpo.evidence.bench.heads.problem")
    assert [shape.hidden_size for shape in problem.GPU_SHAPES[:2]] == [1024, 2048]
    options = bench.parse_args([])
    methods = [bench.Method(name, {}) for name in ("plain, response rows", "Liger", "fastdpo")]
    of_first, of_third = (
        [m.name for m in methods if bench.fits_shape(m, problem.GPU_SHAPES[i], options)] for i in (0, 2)
    )
    assert of_first == ["plain, response rows", "fastdpo"]
    assert of_third == ["plain, response rows", "Liger", "fastdpo"]
    asked = bench.parse_args(["--shapes", str(problem.GPU_SHAPES[0])])
    assert bench.fits_shape(methods[1], problem.GPU_SHAPES[0], asked)


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part_of_a_gpus_run(tmp_path):
    command = ["bash", str(SCRIPT), str(tmp_path), "--dry-run"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    summary = (tmp_path / "SUMMARY.md").read_text()
    parts = gpu_suite.gpu_parts(tmp_path, {"missing": []})
    assert done.returncode == 0, done.stdout + summary
    of_parts, *_ = summary.split("\n## ")  # before the tables of the results
    assert [line.split(" | ")[1] for line in of_parts.splitlines() if line.startswith("| ")][1:] == ["ok"] * len(parts)
    assert "0.0 host waits" in summary
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000


def test_output_that_is_a_result_goes_to_its_own_file(suite):
    suite.run(part("import sys; print('{}'); print('noise', file=sys.stderr)", output="result.json", stdout=True))
    assert (suite.out / "result.json").read_text() == "{}\n"
    assert "noise" in suite.log.read_text()


def test_parts_fit_into_nine_minutes():
    assert gpu_suite.SECONDS <= 9 * 60 - 15


def test_the_summary_names_what_verify_found_wrong(suite):
    line = {
        "impl": "triton",
        "dtype": "bfloat16",
        "check": "log-probs",
        "verdict": "FAILED",
        "error": 2.0,
        "bound": 1.0,
    }
    (suite.out / "verify.json").write_text(json.dumps({"lines": [line]}))
    suite.write_summary()
    assert "- triton, bfloat16, log-probs: 2.00e+00, bound 1.00e+00" in (suite.out / "SUMMARY.md").read_text()
