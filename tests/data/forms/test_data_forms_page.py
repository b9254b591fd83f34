"""docs/data_forms.md is what the registry of forms gives, and every row on it is read by the form it stands under."""

from pathlib import Path

import pytest
from data_forms_page import page

from fastdpo.data.forms.columns import structured
from fastdpo.data.forms.examples import EXAMPLES
from fastdpo.data.forms.formats import FORMAT_NAMES, choose_format, read_row, regrouped

PAGE = Path(__file__).parents[3] / "docs" / "data_forms.md"
WRITTEN = [(name, written) for name, examples in EXAMPLES.items() for written in examples]
BY_NAME_ONLY = {"hh": "implicit", "hh_chat": "implicit", "ultrafeedback_binarized": "explicit"}


def test_the_page_is_generated_from_the_registry():
    assert PAGE.read_text() == page(), "run: python tests/data/forms/data_forms_page.py > docs/data_forms.md"


def test_every_form_has_an_example():
    assert set(EXAMPLES) == set(FORMAT_NAMES)


@pytest.mark.parametrize(("name", "written"), WRITTEN, ids=[f"{name}-{w.by[:20]}" for name, w in WRITTEN])
def test_every_row_on_the_page_is_read_by_its_form_named_or_not(name, written):
    cells = structured(written.row)[0]
    assert choose_format(cells, "auto", is_sft=written.is_sft).name == BY_NAME_ONLY.get(name, name)
    grouped = regrouped([written.row], written.row, "auto", is_sft=written.is_sft)
    for row in [written.row] if grouped is None else grouped:
        for dataset_format in ("auto", name):
            read, _ = read_row(row, dataset_format, is_sft=written.is_sft)
            texts = [r if isinstance(r, str) else r[-1]["content"] for r in read.responses]
            assert texts[0].strip() in ("4", "2+2=4")
            assert all(text.strip() != texts[0].strip() for text in texts[1:])
            asked = read.prompt if isinstance(read.prompt, str) else "".join(m["content"] for m in read.prompt)
            assert "2+2" in asked or "Add." in asked or name == "text"
