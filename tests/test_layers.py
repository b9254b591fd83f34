"""Imports point left only, and `import fastdpo` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# left to right; the names on one line are one layer and do not import each other
LAYERS = [
    ["children", "files", "locks", "types"],
    ["kernels"],
    ["ops"],
    ["losses", "metrics"],
    ["data"],
    ["modeling"],
    ["references"],
    ["training"],
    ["report"],
    ["rewards"],
    ["alignment", "evidence", "inspection", "integrations", "ranking"],
    ["rounds"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# inside two subpackages, in the same way: their folders and their own modules
INSIDE = {
    "data": [
        ["values", "visible", "depth"],
        ["terminal"],
        ["sources"],
        ["forms"],
        ["tokens"],
        ["batches"],
        ["rows"],
        ["streaming", "synthetic"],
        ["prepare"],
        ["mixture"],
    ],
    "training": [
        ["updates"],
        ["settings"],
        ["setup"],
        ["inputs"],
        ["run"],
        ["memory"],
        ["saving"],
        ["resuming"],
        ["updating"],
        ["callbacks"],
        ["evaluation", "token_means", "trl_attributes"],
        ["stepping"],
        ["base"],
        ["dpo", "sft", "precompute"],
    ],
}
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


@pytest.mark.parametrize("package", INSIDE)
def test_the_parts_of_a_subpackage_import_only_from_parts_to_their_left(package):
    rank = {name: number for number, names in enumerate(INSIDE[package]) for name in names}
    root, prefix = ROOT / "fastdpo" / package, f"fastdpo.{package}."
    for path in sorted(root.rglob("*.py")):
        part = path.relative_to(root).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert part in rank, f"{part} has no place in the order of {package}"
        for name in sorted(MODULES[module_name(path)]):
            if name.startswith(prefix):
                imported = name.removeprefix(prefix).split(".")[0]
                assert imported == part or rank[imported] < rank[part], f"{path.relative_to(ROOT)} imports {name}"


def module_name(path):
    """The name that a module is imported by; of the benchmarks, whose folder is on the path, without it."""
    for root, package in {ROOT / "fastdpo": "fastdpo", ROOT / "kernels" / "fused": "fastdpo.kernels"}.items():
        if root in path.parents:
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            break
    else:
        parts = path.relative_to(ROOT / "benchmarks").with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports_by_module(sources):
    """For each module the modules that it imports, wherever in it that stands."""
    names = {module_name(path): path for path in sources}
    found = {}
    for name, path in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    imported.add(inner if inner in names else node.module)
            elif isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
        found[name] = (imported & names.keys()) - {name}
    return found


MODULES = imports_by_module([*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py"))])


def circle(modules):
    """Modules that import each other in a circle, with those that lead to it; or none."""
    left = dict(modules)
    while done := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in done:
            del left[name]
    return sorted(left)


def test_no_modules_import_each_other_in_a_circle():
    """Also not inside a function or under TYPE_CHECKING."""
    assert circle(MODULES) == []


def test_the_check_for_circles_sees_one():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]  # a leads to one


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
