"""kernels/ is installed as fastdpo.kernels and never stands in the way of Hugging Face's `kernels`."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
IMPORT_TRANSFORMERS = "from transformers import AutoModelForCausalLM, Trainer; print('imported')"


def run_from_the_root(code, *arguments, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, path)])}
    return subprocess.run(
        [sys.executable, *arguments, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow  # `python -m pytest`, at the root, has it every time
@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="HF's kernels is not installed")
def test_transformers_imports_from_the_checkouts_root_beside_hf_kernels():
    result = run_from_the_root("import kernels; print(kernels.__file__); " + IMPORT_TRANSFORMERS)
    assert result.stdout.endswith("imported\n"), result.stderr
    assert "site-packages" in result.stdout


def test_transformers_imports_from_the_checkouts_root_without_hf_kernels(tmp_path):
    """All installed packages but HF's kernels, through links, and no other site directory (-S)."""
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith("kernels"):
            (tmp_path / entry.name).symlink_to(entry)
    code = "import importlib.util as u; print(u.find_spec('kernels').origin); " + IMPORT_TRANSFORMERS
    result = run_from_the_root(code, "-S", path=[tmp_path])
    assert result.stdout == "None\nimported\n", result.stderr  # only our folder without __init__.py is left


def test_the_kernels_folder_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    import fastdpo.kernels

    assert Path(fastdpo.kernels.__file__).parent.name in ("fused", "kernels")


def test_a_wheel_holds_the_kernels_under_fastdpo(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    source = tmp_path / "source"
    for name in ("fastdpo", "kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", str(ROOT / name), str(target)], check=True)
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    if "setuptools" in built.stderr and "No module named" in built.stderr:
        pytest.skip("setuptools is not installed here")
    assert built.returncode == 0, built.stderr
    assert "would be ignored" not in built.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "fastdpo/kernels/launch.py" in names
    assert {"fastdpo/cli/options/options.json", "fastdpo/cli/launch/fsdp2.yaml"} <= set(names)
    assert "fastdpo/data/tokens/chat/jinja-files/qwen3.jinja" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]
    assert "fastdpo/py.typed" in names


# Where a package is called otherwise than its module; what only a user's own choice brings in, as report_to does
DISTRIBUTIONS = {"yaml": "pyyaml", "flash_attn": "flash-attn", "liger_kernel": "liger-kernel"}
DISTRIBUTIONS |= {"cut_cross_entropy": "cut-cross-entropy"}
BROUGHT_BY_USERS = {"wandb", "trackio", "vllm"}


def imported_modules():
    for path in [*ROOT.glob("fastdpo/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            yield from (name.split(".")[0] for name in names)


def declared(section):
    lines = re.search(rf"^{section} = \[\n(.*?)^\]", PYPROJECT, re.DOTALL | re.MULTILINE)[1]
    return {re.split(r"[><=; \[]", item)[0] for item in re.findall(r'^  "(.+?)"', lines, re.MULTILINE)}


def extras():
    section = PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return {re.split(r"[><=; \[]", item)[0] for item in re.findall(r'"([^"]+)"', section)}


def test_every_package_that_is_imported_is_declared_and_no_other():
    modules = set(imported_modules()) - set(sys.stdlib_module_names) - {"fastdpo"} - BROUGHT_BY_USERS
    packages = {DISTRIBUTIONS.get(name, name) for name in modules}
    assert packages <= declared("dependencies") | extras()
    assert declared("dependencies") <= packages


def test_triton_is_asked_for_by_an_extra_only():
    assert "triton" not in declared("dependencies")
    assert "triton" in extras()


def test_fastdpo_trains_on_a_cpu_without_triton(tmp_path):
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else find_spec(name, *rest)
sys.modules["triton"] = None
from tiny_runs import losses, tiny_trainer
print(losses(tiny_trainer({str(tmp_path)!r}))[0])
try:
    tiny_trainer({str(tmp_path)!r}, impl="triton")
except ValueError as error:
    print(error)
"""
    result = run_from_the_root(code)
    lines = result.stdout.splitlines()
    assert float(next(line for line in lines if line.startswith("0."))) == pytest.approx(0.693147, abs=1e-5), (
        result.stderr
    )
    assert 'impl="triton" needs the triton package, which is not installed (pip install "fastdpo[triton]")' in lines[-1]
