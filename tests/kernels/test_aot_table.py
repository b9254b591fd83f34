"""`make aot`: the table of compiled kernels for several releases of Triton."""

import json
import subprocess

import aot_table
import pytest

FACT = {
    "kernel": "partials, plain", "sm": 90, "operand": "bf16", "triton": "3.6.0", "blocks": [128, 128, 64, 8, 3],
    "registers": 188, "stack": 0, "shared": 98304, "spills": 0, "matrix": {"HGMMA": 4, "UTCHMMA": 0, "HMMA": 0},
}  # fmt: skip


def finished(code=0, stdout="", stderr=""):
    return subprocess.CompletedProcess([], code, stdout, stderr)


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """pip that has nothing but 3.6.0, and a compiler that knows one kernel."""

    def pip(*arguments):
        known = arguments[0] == "index" or arguments[-1] == "triton==3.6.0"
        return finished(0, "triton (9.9.9)\n") if known else finished(1, "", "ERROR: No matching distribution\n")

    monkeypatch.setattr(aot_table, "pip", pip)
    monkeypatch.setattr(aot_table, "ROOT", tmp_path)
    monkeypatch.setattr(aot_table, "compile_all", lambda folder, architecture, operand: ([FACT], None))


def test_a_row_names_blocks_and_only_the_instructions_that_are_there():
    assert aot_table.row(FACT) == ("partials, plain", "90", "bf16", "128x128x64x8x3", "188", "0", "0", "96", "4 HGMMA")


def test_a_release_that_cannot_be_installed_is_reported_and_not_fatal(installed, capsys, tmp_path):
    out = tmp_path / "facts.jsonl"
    code = aot_table.main(["--versions", "3.6.0", "newest", "--architectures", "90", "--out", str(out)])
    printed = capsys.readouterr().out
    assert code == 0
    assert "left out: triton 9.9.9 cannot be installed: ERROR: No matching distribution" in printed
    assert "partials, plain" in printed
    assert [json.loads(line) for line in out.read_text().splitlines()] == [FACT, FACT]  # bf16 and fp32


def test_a_kernel_that_does_not_compile_is_an_error(installed, monkeypatch, capsys):
    monkeypatch.setattr(aot_table, "compile_all", lambda *job: ([], "sm_90 bf16: PassManager::run failed"))
    assert aot_table.main(["--versions", "3.6.0"]) == 1
    assert "failed: Triton 3.6.0, sm_90 bf16: PassManager::run failed" in capsys.readouterr().out


def test_another_triton_than_the_one_asked_for_is_noticed(installed, monkeypatch):
    monkeypatch.setattr(aot_table, "compile_all", lambda *job: ([FACT | {"triton": "3.7.1"}], None))
    with pytest.raises(AssertionError, match="in place of"):
        aot_table.main(["--versions", "3.6.0"])
