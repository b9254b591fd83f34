"""`fastdpo verify` as a user meets it: table, JSON, exit code."""

import json
import os
import subprocess
import sys

import pytest
import wrong_heads
from tiny import make_llama

from fastdpo import linear_logps
from fastdpo.cli.main import main
from fastdpo.evidence import checks, step, verify
from fastdpo.types import TokenLogps

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


CHEAP = ("off_by_one_shift", "missing_last_tile")
MISTAKES = [
    "off_by_one_shift", "ignored_row_counted", "missing_last_tile", "unmasked_vocab_tail", "wrong_merge",
    "bf16_accumulation", "weight_grad_summed_in_bf16", "softcap_slope_forgotten", "bias_after_scale",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CHEAP else pytest.mark.slow) for name in MISTAKES]
)
def test_every_mistake_of_a_head_is_a_red_line_and_exit_code_1(capsys, monkeypatch, name):
    mistake = getattr(wrong_heads, name)

    def patched(*args, impl, **kwargs):
        if impl != "tiled" or not kwargs.keys() <= {"bias", "logit_scale", "softcap"}:
            return linear_logps(*args, impl=impl, **kwargs)
        return TokenLogps(mistake(*args, **kwargs))

    monkeypatch.setattr(checks, "linear_logps", patched)
    assert main(["verify", *SMALL]) == 1
    assert "FAILED: tiled, float32: " in capsys.readouterr().out


def test_all_mistakes_are_tried():
    defined = {f.__name__ for f in vars(wrong_heads).values() if getattr(f, "__module__", "") == "wrong_heads"}
    assert {name for name in defined if name[0].islower()} == set(MISTAKES)


def test_a_models_step_has_its_lines_in_the_table_and_decides_the_exit_code(tmp_path, capsys, monkeypatch):
    make_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(verify, "CHECKS", [])
    command = ["verify", "--device", "cpu", "--dtype", "float32", "--model", str(tmp_path / "model"), "--json"]
    assert main(command) == 0
    lines = [line for line in json.loads(capsys.readouterr().out)["lines"] if line["impl"] == "step"]
    assert "loss (sdpa, shared prompts)" in {line["check"] for line in lines}
    right = step.packed_loss
    monkeypatch.setattr(step, "packed_loss", lambda *args: (2 * right(*args)[0], right(*args)[1]))
    assert main(command) == 1
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert "loss (sdpa, shared prompts)" in {line["check"] for line in lines if line["verdict"] == "FAILED"}


def test_sanitize_is_refused_without_the_tool(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert main(["verify", "--sanitize"]) == 2
    assert "--sanitize must find compute-sanitizer on the PATH" in capsys.readouterr().err


def test_sanitize_runs_the_same_command_under_the_tool(tmp_path, monkeypatch):
    tool, said = tmp_path / "compute-sanitizer", tmp_path / "said"
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {said}\nexit 1\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["verify", "--dtype", "float32", "--sanitize"]) == 1
    words = said.read_text().splitlines()
    assert words[:2] == ["--error-exitcode", "1"]
    assert words[-3:] == ["verify", "--dtype", "float32"]
