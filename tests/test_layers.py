"""Imports point left only, and `import fastdpo` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# left to right; the names on one line are one layer and do not import each other
LAYERS = [
    ["types"],
    ["kernels"],
    ["ops"],
    ["losses", "metrics"],
    ["data"],
    ["modeling"],
    ["references"],
    ["training"],
    ["alignment", "evidence", "integrations", "report"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SOURCES = [*sorted((ROOT / "fastdpo").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]


def layer_of(path):
    if ROOT / "kernels" in path.parents:
        return "kernels"
    return path.relative_to(ROOT / "fastdpo").parts[0].removesuffix(".py")


def imported_layers(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if node.module != "fastdpo":
                names = names[:1]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastdpo" and len(parts) > 1 and parts[1] in RANK:
                yield parts[1]


def imports_to_the_right(layer, path):
    return sorted({name for name in imported_layers(path) if name != layer and RANK[name] >= RANK[layer]})


def test_modules_import_only_from_layers_to_their_left():
    wrong = {}
    for path in SOURCES:
        layer, name = layer_of(path), str(path.relative_to(ROOT))
        if layer == "__init__":  # the package itself loads names lazily, from anywhere
            continue
        assert layer in RANK, f"{name} has no place in the order of layers"
        if found := imports_to_the_right(layer, path):
            wrong[name] = found
    assert wrong == {}
    assert len(SOURCES) > 200


def test_the_layer_check_sees_an_import_that_points_right(tmp_path):
    source = tmp_path / "wrong.py"
    source.write_text("from fastdpo.training.dpo import DPOTrainer\nfrom fastdpo import modeling\nimport fastdpo.cli\n")
    assert set(imported_layers(source)) == {"training", "modeling", "cli"}
    assert imports_to_the_right("references", source) == ["cli", "training"]


def test_importing_fastdpo_loads_no_heavy_package():
    heavy = ("torch", "triton", "transformers", "datasets", "peft")
    code = f"import sys, fastdpo; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_resolves():
    import fastdpo

    for name in fastdpo.__all__:
        assert getattr(fastdpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'DPOTrainr'"):
        fastdpo.DPOTrainr  # noqa: B018
