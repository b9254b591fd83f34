"""docs/gpu.md shows what the GPU suite has left in benchmarks/results/gpu, and nothing else."""

import json
import runpy
from pathlib import Path

import gpu_page
import pytest

ROOT = Path(__file__).parents[2]


def left_by_the_suite(folder, **facts):
    folder.mkdir(parents=True)
    known = {"gpu": "NVIDIA H200", "capability": [9, 0], "torch": "2.11.0", "triton": "3.6.0", "is_dry": False}
    (folder / "machine.json").write_text(json.dumps({**known, **facts}))
    results = [{"name": "GPU tests", "verdict": "ok"}, {"name": "fastdpo verify", "verdict": "FAILED"}]
    (folder / "results.json").write_text(json.dumps(results))


def rows(text):
    return {line.split(" | ")[0].strip("| "): line for line in text.splitlines()[2:]}


def test_without_results_every_architecture_is_not_yet_run(tmp_path):
    filled = rows(gpu_page.table(gpu_page.read(tmp_path)))
    assert list(filled) == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    assert all(line.count("not yet run") == 5 for line in filled.values())


def test_a_run_fills_the_row_of_its_card_with_the_verdicts(tmp_path):
    left_by_the_suite(tmp_path / "h200")
    filled = rows(gpu_page.table(gpu_page.read(tmp_path)))
    assert filled["sm_90"] == (
        "| sm_90 | NVIDIA H200, torch 2.11.0, Triton 3.6.0 | yes"
        " | ok | not yet run | FAILED | not yet run | not yet run |"
    )
    assert filled["sm_80"].count("not yet run") == 5


def test_a_card_whose_architecture_nobody_compiled_for_says_so(tmp_path):
    left_by_the_suite(tmp_path / "thor", gpu="Thor", capability=[11, 0])
    assert rows(gpu_page.table(gpu_page.read(tmp_path)))["sm_110"].startswith(
        "| sm_110 | Thor, torch 2.11.0, Triton 3.6.0 | no |"
    )


@pytest.mark.parametrize("facts", [{"is_dry": True}, {"gpu": None, "capability": None}])
def test_dry_runs_and_machines_without_a_gpu_do_not_count(tmp_path, facts):
    left_by_the_suite(tmp_path / "cpu", **facts)
    assert gpu_page.read(tmp_path) == []


def test_a_folder_of_something_else_is_named(tmp_path):
    left_by_the_suite(tmp_path / "bad")
    (tmp_path / "bad" / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"bad must be a folder of gpu_suite\.sh, got TypeError"):
        gpu_page.read(tmp_path)


def test_the_page_shows_what_the_results_hold():
    assert gpu_page.main(["--check"]) == 0


def test_the_architectures_are_those_that_tests_compile_for():
    aot_table = runpy.run_path(str(ROOT / "tests" / "kernels" / "aot_table.py"))
    assert tuple(gpu_page.ARCHITECTURES) == aot_table["ARCHITECTURES"]
