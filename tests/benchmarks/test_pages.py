"""A part of a page that a script writes is replaced by name, and nothing else of the page."""

import pytest
from shared.pages import filled, names_in, part

PAGE = "a\n<!-- table: one.jsonl -->\nold\n<!-- end -->\nb\n<!-- table: two -->\n<!-- end -->\nc\n"


def test_only_the_named_part_changes():
    page = filled(PAGE, {"two": "| x \\1 |\n"})
    assert page == PAGE.replace("two -->\n", "two -->\n| x \\1 |\n")
    assert names_in(page) == ["one.jsonl", "two"]
    assert [part(page, name) for name in names_in(page)] == ["old\n", "| x \\1 |\n"]
    assert filled(page, {"two": ""}) == PAGE


def test_a_name_that_the_page_lacks_is_refused():
    with pytest.raises(ValueError, match="no place for three"):
        filled(PAGE, {"three": "", "two": ""})
    with pytest.raises(KeyError, match="three"):
        part(PAGE, "three")
