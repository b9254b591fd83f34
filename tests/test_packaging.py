"""kernels/ is installed as fastdpo.kernels and never stands in the way of Hugging Face's `kernels`."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT_TRANSFORMERS = "from transformers import AutoModelForCausalLM, Trainer; print('imported')"


def run_from_the_root(code, *arguments, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, path)])}
    return subprocess.run(
        [sys.executable, *arguments, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


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
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "fastdpo/kernels/launch.py" in names
    assert "fastdpo/data/chat/templates/qwen3.jinja" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]
