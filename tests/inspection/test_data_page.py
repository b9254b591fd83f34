"""The HTML page of an inspection."""

import re

from peers import peer
from tiny import make_byte_tokenizer

from fastdpo.inspection import inspect_data, write_data_page


def pair(chosen="yes", rejected="no", prompt="Q"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


ROWS = [
    pair("a", "b"),
    pair("b", "a"),
    pair("<script>alert(1)</script>", "long " * 400, "P"),
    pair("same", "same", "dropped"),
    {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], "chosen": "x", "rejected": "y"},
    pair("a", "b"),
]


def test_the_page_shows_verdicts_statistics_and_the_rows_behind_each_finding(tmp_path):
    peer("matplotlib")
    found = inspect_data(ROWS, eval_data=[pair("n", "m", "P")], tokenizer=make_byte_tokenizer())
    page = write_data_page(tmp_path / "page.html", found).read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:5] == ["Verdict", "Checks", "Length of answers", "Tokens", "The first row, as fastdpo reads it"]
    assert titles[5:] == [
        *("Rows", "Duplicates", "Contradictions", "Train and eval", "One side cut", "Ends cut", "Chat template"),
        "When a check is not ok",
    ]
    for shown in ("row 0: Q", "row 5: Q", "row 3: chosen equals rejected", "evaluation row 0: P", "row 2: P"):
        assert f'<p class="prompt">{shown}</p>' in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "long long  ... long long" in page  # the middle of a long text is left out
    assert ">2,000</td>" in page  # and its length is not
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 1
    assert sources[0].startswith("data:")


def test_the_number_of_examples_is_that_which_is_asked_for(tmp_path):
    rows = [pair("yes", "not", f"Q {i}") for i in range(8)] * 2
    found = inspect_data(rows, look_for_near=False)
    page = write_data_page(tmp_path / "page.html", found, num_examples=2).read_text(encoding="utf-8")
    assert re.findall(r'<p class="prompt">(row \d+)', page) == ["row 0", "row 8", "row 1", "row 9"]


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.inspection.page.importlib.util.find_spec", lambda name: None)
    page = write_data_page(tmp_path / "page.html", inspect_data([pair()], look_for_near=False)).read_text()
    assert "No plot: matplotlib is missing" in page


def test_a_page_of_data_without_a_usable_row_is_written(tmp_path):
    found = inspect_data([pair("same", "same")], look_for_near=False)
    page = write_data_page(tmp_path / "page.html", found).read_text(encoding="utf-8")
    assert "There is no usable pair." in page
    assert "row 0: chosen equals rejected" in page
