"""docs/code_tour.md names files and functions that exist, and README links to it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "code_tour.md").read_text()
LINK = re.compile(r"\[[^\]]+\]\(\.\./([^)]+)\)")


def named(page):
    """(file, name) for every name in code quotes behind a file's link, up to the next link, cell or step."""
    for found in LINK.finditer(page):
        rest = re.split(r"\]\(| \| |\n\d+\. |\n\n", page[found.end() :], maxsplit=1)[0]
        yield found[1], None
        for name in re.findall(r"`([A-Za-z_][\w.]*)`", rest):
            yield found[1], name


def names_in(path):
    """Functions, classes and methods of a module, as `name` or `Class.name`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("file", "name"), dict.fromkeys(named(PAGE)), ids=lambda part: str(part).replace("/", "."))
def test_a_file_or_function_on_the_tour_exists(file, name):
    path = ROOT / file
    assert path.is_file()
    if name is not None:
        assert name in names_in(path)


def test_the_tour_stops_at_every_layer():
    files = {file for file, _ in named(PAGE)}
    for layer in ("data", "modeling", "ops", "references", "losses", "training", "cli"):
        assert any(file.startswith(f"fastdpo/{layer}/") for file in files), layer
    assert len([name for _, name in named(PAGE) if name is not None]) > 30


def test_a_name_that_is_gone_is_found(tmp_path):
    page = "1. **Pack.** → [a](../fastdpo/types.py) `PackedBatch`, `PackedBatch.to`, `Gone`\n2. next `Other`"
    assert list(named(page)) == [("fastdpo/types.py", name) for name in (None, "PackedBatch", "PackedBatch.to", "Gone")]
    assert {"PackedBatch", "PackedBatch.to"} <= names_in(ROOT / "fastdpo" / "types.py")
    assert "Gone" not in names_in(ROOT / "fastdpo" / "types.py")


def test_the_readme_links_to_the_tour():
    assert "(docs/code_tour.md)" in (ROOT / "README.md").read_text()
