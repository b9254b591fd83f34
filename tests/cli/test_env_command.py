"""`fastdpo env`: the facts that a bug report needs, also where something is broken."""

import json
import sys
from importlib import metadata

import pytest
import torch
from cli_runs import run

from fastdpo.cli import env


@pytest.fixture(scope="module")
def facts():
    return env.environment()


def test_versions_and_machine_are_those_of_this_process(facts):
    assert facts["packages"]["torch"] == metadata.version("torch")
    assert facts["packages"]["transformers"] == metadata.version("transformers")
    assert facts["machine"]["python"].startswith(sys.version.split()[0])
    assert sys.executable in facts["machine"]["python"]
    assert facts["machine"]["cores"] >= 1
    assert len(facts["gpus"]) == torch.cuda.device_count()


def test_what_a_run_would_take_is_said_with_the_reasons(facts):
    assert facts["self-check"]["verdict"] == "packed rows are exact"
    assert float(facts["self-check"]["relative error"]) < 1e-2
    assert facts["head op"]["reference"] == "can run"
    assert set(facts["attention"]) == {"flash2", "flash3", "flash4", "varlen", "sdpa", "mask"}
    assert facts["attention"]["sdpa"].startswith("can run")
    if not torch.cuda.is_available():
        assert facts["head op"]["auto"] == "tiled on cpu"
        assert facts["attention"]["varlen"] == "runs on cuda only"
        assert facts["self-check"]["attention taken"][0].startswith("sdpa (")


def test_json_is_one_object_with_the_same_facts(capsys, monkeypatch, facts):
    monkeypatch.setattr(env, "environment", lambda: facts)
    code, out, _ = run(capsys, "env", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(facts))


def test_the_lines_have_every_section(capsys, monkeypatch, facts):
    monkeypatch.setattr(env, "environment", lambda: facts)
    code, out, _ = run(capsys, "env")
    assert code == 0
    torch_line = f"  torch: {metadata.version('torch')}"
    for line in ("packages:", torch_line, "self-check:", "  verdict: packed rows are exact"):
        assert f"{line}\n" in out
    assert "not installed: " in out


def test_a_broken_part_does_not_keep_the_rest_from_being_told(monkeypatch):
    def broken():
        raise OSError("libcuda.so.1: cannot open shared object file")

    for name in ("_torch", "_gpus", "_head_op", "_attention", "_self_check"):
        monkeypatch.setattr(env, name, broken)
    facts = env.environment()
    assert facts["self-check"] == {"failed": "OSError: libcuda.so.1: cannot open shared object file"}
    assert "  failed: OSError: libcuda.so.1: cannot open shared object file" in env.lines_of(facts)
    assert facts["packages"]["torch"] == metadata.version("torch")


def test_vector_units_and_variables_are_read(monkeypatch):
    monkeypatch.setattr(env, "_cpu", lambda: {"model name": "Some CPU", "flags": "fpu sse4_2 avx avx2 rdrand"})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine = env._machine()
    assert (machine["cpu"], machine["vector units"]) == ("Some CPU", ["sse4_2", "avx", "avx2"])
    for name in ("_torch", "_gpus", "_head_op", "_attention", "_self_check"):
        monkeypatch.setattr(env, name, dict)
    assert env.environment()["variables"]["OMP_NUM_THREADS"] == "3"


def test_an_unknown_option_is_refused(capsys):
    code, _, err = run(capsys, "env", "--jsn")
    assert code == 2
    assert "--jsn" in err
