"""Every recipe is in the index, has its files, and states the table of the results that lie beside it."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from fastdpo.training.callbacks.json_lines import read_lines

ROOT = Path(__file__).parents[2]
INDEX = (ROOT / "recipes" / "README.md").read_text()
FOLDERS = sorted(path for path in (ROOT / "recipes").iterdir() if (path / "run.py").is_file())
PAGES = sorted((ROOT / "recipes").rglob("README.md"))
HEADINGS = ["## Run", "## Expected", "## How to read it", "## Time"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_a_recipe_has_its_files_and_a_row_in_the_index(folder):
    page = (folder / "README.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == HEADINGS
    assert f'run.sh" {folder.name} "$@"' in (folder / "run.sh").read_text()
    assert f"bash recipes/{folder.name}/run.sh" in page
    assert f"]({folder.name}/README.md) |" in INDEX
    assert (ROOT / "tests" / "recipes" / f"test_{folder.name}.py").is_file()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_expected_table_is_that_of_the_expected_results(folder):
    from recipes.shared import markdown

    lines = read_lines(folder / "expected" / "results.jsonl")
    page = (folder / "README.md").read_text()
    assert lines
    assert '"/' not in (folder / "expected" / "results.jsonl").read_text()  # no path of the machine that measured
    assert markdown(import_module(f"recipes.{folder.name}.run").table(lines)) in page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_links_and_images_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_package_imports_no_recipe():
    for path in (ROOT / "fastdpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module or ""]
            assert not [name for name in names if name.split(".")[0] == "recipes"], path
