"""docs/migrating.md says of TRL what TRL does: its table of rows is printed by trying them."""

from pathlib import Path

from peers import peer
from trl_rows_page import ROWS, ours, page

PAGE = Path(__file__).parents[3] / "docs" / "migrating.md"


def test_the_table_of_rows_is_what_both_make_of_them():
    peer("trl")
    text = PAGE.read_text()
    assert [line for line in page() if line not in text] == [], "run: python tests/data/tokens/trl_rows_page.py"


def test_every_row_of_the_table_but_three_trains_on_its_question_and_two_answers():
    results = list(map(ours, ROWS))
    assert [result.split(":")[0] for result in results].count("refused") == 3
    for result in results:
        if not result.startswith("refused"):
            prompt, _, answers = result.partition("` then ")
            assert "Q" in prompt
            assert "`G`, `B`" in answers or '"arguments": {"x": null}' in answers, result
