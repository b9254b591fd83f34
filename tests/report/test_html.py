"""Reports are one file that needs nothing else, and show text as text."""

import base64
import re

import pytest

from fastdpo.report import Figure, Response, Sample, SampleList, Table, Text, write_report
from fastdpo.report.plots import Point, frontier


def one_of_each():
    points = [Point("Reference", 0.0, 1.0), Point("DPO", 1.0, 2.0, 0.1, 0.1)]
    return [
        Text("Words", ["first paragraph", "second <b>paragraph</b>"]),
        Table("Figures", ["Model", "KL"], [["a & b", "1.0 ± 0.1"]], note="in nats"),
        Figure("Plot", frontier(points), alt='the "frontier"'),
        SampleList("Samples", [Sample("A prompt", [Response("m", "<script>alert(1)</script>", "+1.0")])], "Reward"),
    ]


def test_a_report_is_one_file_that_asks_for_nothing_from_outside(tmp_path):
    path = write_report(tmp_path / "new" / "report.html", "Title", one_of_each(), subtitle="sub")
    page = path.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 1
    assert all(source.startswith("data:") for source in sources)
    assert "<link" not in page
    assert "url(" not in page
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_sections_come_in_their_order_under_their_titles(tmp_path):
    page = write_report(tmp_path / "r.html", "Title", one_of_each()).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Words", "Figures", "Plot", "Samples"]


def test_text_of_users_and_models_never_becomes_markup(tmp_path):
    page = write_report(tmp_path / "r.html", "<i>Title</i>", one_of_each()).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "<b>" not in page
    assert "<i>" not in page
    for shown in ("&lt;script&gt;", "a &amp; b", "&lt;i&gt;Title", "the &quot;frontier&quot;"):
        assert shown in page


def test_equal_figures_give_equal_reports(tmp_path):
    first, second = (write_report(tmp_path / name, "T", one_of_each()).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_a_figure_is_an_svg_inside_the_page():
    body = one_of_each()[2].body()
    data = re.search(r"data:image/svg\+xml;base64,([^\"]+)", body).group(1)
    assert b"<svg" in base64.b64decode(data)


def test_a_failing_section_leaves_the_earlier_report(tmp_path):
    path = write_report(tmp_path / "r.html", "T", [Text("Words", ["kept"])])
    with pytest.raises(AttributeError):
        write_report(path, "T", [Text("Words", ["new"]), object()])
    assert "kept" in path.read_text(encoding="utf-8")


def test_a_row_with_a_cell_too_few_is_refused():
    with pytest.raises(ValueError, match=r"rows must have 2 cells each, got \['x'\]"):
        Table("Figures", ["Model", "KL"], [["a", "b"], ["x"]])
