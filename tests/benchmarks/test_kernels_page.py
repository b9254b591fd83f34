"""kernels/README.md shows the registers and spills of the record, and names every kernel that spills."""

import kernels_page as bench
from shared.pages import part


def test_the_page_says_what_the_record_says():
    assert part(bench.PAGE.read_text(), bench.RESULTS.name) == bench.table(bench.read())


def test_only_what_the_page_says_spills():
    spilling = {(r["triton"], r["sm"]) for r in bench.read() if r["spills"]}
    assert spilling == {("3.9.0", 90)}
    assert "The spills of 3.9.0 on sm_90" in bench.PAGE.read_text()


def test_of_two_lines_of_a_kernel_the_last_one_counts(tmp_path, monkeypatch):
    line = '{{"kernel": "products, dW", "sm": 90, "operand": "bf16", "triton": "3.6.0", "registers": {}}}\n'
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "kernels.jsonl")
    bench.RESULTS.write_text(line.format(5) + line.format(7))
    assert [record["registers"] for record in bench.read()] == [7]
