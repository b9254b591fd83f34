"""The READMEs that show all tables of their page state those of the results that lie beside them."""

from importlib import import_module
from pathlib import Path

import pytest

from fastdpo.report import Table
from fastdpo.training.callbacks.json_lines import read_lines
from recipes.shared import markdown

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["iterated_rounds", "multi_turn", "plackett_luce"])
def test_every_table_of_the_page_is_in_the_readme(name):
    sections = import_module(f"recipes.{name}.run").sections(read_lines(RECIPES / name / "expected" / "results.jsonl"))
    tables = [section for section in sections if isinstance(section, Table)]
    page = (RECIPES / name / "README.md").read_text()
    assert len(tables) >= 2
    for table in tables:
        assert table.rows
        assert markdown(table) in page, table.title
