"""`fastdpo verify` as a user meets it: table, JSON, exit code."""

import json
import os
import subprocess
import sys

import pytest

from fastdpo import linear_logps
from fastdpo.cli.main import main
from fastdpo.evidence import checks, verify

SMALL = ("--device", "cpu", "--dtype", "float32", "--rows", "40", "--hidden", "24", "--vocab", "131")


@pytest.fixture(autouse=True)
def _without_memory(monkeypatch):
    monkeypatch.setattr(verify, "CHECKS", [check for check in checks.CHECKS if check is not checks.memory])


@pytest.fixture
def wrong_tiled(monkeypatch):
    def patched(hidden_states, lm_head_weight, labels, *, impl, **kwargs):
        shifted = labels.roll(-1) if impl == "tiled" else labels
        return linear_logps(hidden_states, lm_head_weight, shifted, impl=impl, **kwargs)

    monkeypatch.setattr(checks, "linear_logps", patched)


def test_the_table_has_error_bound_and_verdict_of_every_check(capsys):
    assert main(["verify", *SMALL]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "tiled" in line and "grad lm_head_weight " in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:3] == ["tiled", "float32", "grad lm_head_weight"]
    assert 0 < float(cells[3]) <= float(cells[4]) < 1e-5
    assert cells[5] == "ok"
    assert " 0 failed" in out
    assert "torch" in out.splitlines()[0]


def test_a_wrong_implementation_is_named_and_the_exit_code_is_1(capsys, wrong_tiled):
    assert main(["verify", *SMALL]) == 1
    out = capsys.readouterr().out
    assert "FAILED: tiled, float32: log-probs" in out
    assert "FAILED: reference" not in out


def test_json_on_stdout_says_the_same(capsys, wrong_tiled):
    assert main(["verify", *SMALL, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    assert report["machine"]["torch"]
    wrong = [line for line in report["lines"] if line["verdict"] == "FAILED"]
    assert {line["impl"] for line in wrong} == {"tiled"}
    first = wrong[0]
    assert (first["check"], first["unit"]) == ("log-probs", "relative")
    assert first["error"] > first["bound"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--rows", "0"), "rows must be at least 1, got 0"),
        (("--device", "meta"), "device must be cpu or cuda, got 'meta'"),
        (("--rows", "31"), "rows must be at least 32"),
        (("--row", "40"), "unrecognized arguments: --row 40"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(capsys, options, message):
    assert main(["verify", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_it_starts_without_transformers_datasets_and_rich():
    """As on a machine that has only torch and triton; --json needs nothing else."""
    code = (
        "import sys\n"
        "for name in ('transformers', 'datasets', 'rich', 'accelerate'): sys.modules[name] = None\n"
        "from fastdpo.evidence import checks, verify\n"
        "verify.CHECKS = [checks.determinism]\n"
        "from fastdpo.cli.main import main\n"
        f"sys.exit(main(['verify', '--json', *{SMALL!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
