"""Tables and plots say what the JSON lines say, and the README is in step with them."""

import json

import pytest
import table
from shared import pages

MACHINE = {
    "device": "Abacus",
    "num_threads": 2,
    "torch": "2.13.0",
    "triton": "3.7.1",
    "cuda": None,
    "commit": "abc1234",
}
SHAPE = {"num_tokens": 2048, "num_rows": 1024, "hidden_size": 512, "vocab_size": 32000, "dtype": "float32"}
# 3e12 FLOPs in 1 s are 3 TFLOP/s, half of the matmul's 6
PLAIN = {
    "pass": "forward+backward",
    "method": "plain, response rows",
    "ms": 1000.0,
    "ms_min": 990.0,
    "ms_max": 1010.0,
    "plain_ms": 1000.0,
    "peak_mib": 400.0,
    "results_mib": 64.0,
    "flops": 3e12,
    "flops_needed": 3e12,
    "runs": 3,
    "matmul_tflops": 6.0,
    "errors": {"values": 1e-7, "dH": 3e-7, "dW": 2e-7},
}
OURS = {**PLAIN, "method": "fastdpo", "ms": 2000.0, "ms_min": 1900.0, "ms_max": 2500.0, "flops": 4e12, "peak_mib": 99.5}
WRONG = {
    "pass": "forward+backward",
    "method": "Peer",
    "flops": 1,
    "flops_needed": 1,
    "error": "AssertionError: dW is off by 3e-1",
}
SKIPPING = {
    "order": "permuted",
    "zipf_exponent": 1.2,
    "mean_entropy": 1.7,
    "labels_outside_top": 0.1,
    "mean_largest": 0.7,
    "mass_outside_own_top": 0.02,
    "exact_ms": 10.0,
    "promised_ms": 8.0,
    "ms": 9.0,
    "ms_min": 8.5,
    "ms_max": 9.5,
    "runs": 3,
    "kept_share": 0.7,
    "kept_share_unordered": 0.9,
    "dH_error": 1e-3,
    "dW_error": 2e-3,
    "dH_of_bound": 0.5,
    "dW_of_bound": 0.25,
}


def lines(*records):
    return "".join(json.dumps({**MACHINE, **SHAPE, **record}) + "\n" for record in records)


@pytest.fixture
def head_op(tmp_path):
    path = tmp_path / "linear_logps.jsonl"
    path.write_text(lines(PLAIN, OURS, WRONG))
    return path


@pytest.fixture
def skipping(tmp_path):
    path = tmp_path / "skipping.jsonl"
    path.write_text(lines(*({**SKIPPING, "tolerance": 2.0**-k} for k in (5, 9)), {**SKIPPING, "tolerance": 0.0}))
    return path


def test_the_readme_is_what_the_json_lines_say():
    assert table.main(["--check"]) == 0


def test_a_row_has_the_figures_of_its_record(head_op):
    rows = table.tables(table.read(head_op)).splitlines()
    assert (
        rows[0]
        == "**T2048-R1024-H512-V32000-float32** on Abacus, 2 threads, torch 2.13.0, Triton 3.7.1, commit abc1234"
    )
    assert "| fastdpo | 2000.0 | 1900.0 to 2500.0 | 2.00 | 99.5 | 35.5 | 33% | 25% | 3e-07 |" in rows
    assert "| plain, response rows | 1000.0 | 990.0 to 1010.0 | 1.00 | 400.0 | 336.0 | 50% | 50% | 3e-07 |" in rows


def test_what_failed_stays_in_the_table_with_its_reason(head_op):
    (row,) = [row for row in table.tables(table.read(head_op)).splitlines() if row.startswith("| Peer")]
    assert "dW is off by 3e-1" in row


def test_the_last_record_of_a_measurement_counts(head_op):
    head_op.write_text(lines(OURS, PLAIN, {**OURS, "ms": 1500.0}))
    text = table.tables(table.read(head_op))
    assert "1500.0" in text
    assert "2000.0" not in text


def test_every_row_of_a_table_has_as_many_cells_as_its_heading(head_op, skipping):
    for path in (head_op, skipping):
        counts = {row.count("|") for row in table.tables(table.read(path)).splitlines() if row.startswith("|")}
        assert len(counts) == 1


def test_skipping_tables_run_from_the_exact_gradient_upwards(skipping):
    text = table.tables(table.read(skipping))
    assert text.index("0, exact") < text.index("2^-9") < text.index("2^-5")
    assert "mean entropy 1.70 nats, 10.0% of labels outside" in text
    assert "| 2^-9 | 9.0 | 8.5 to 9.5 | 0.90 | 0.80 | 70.0% | 90.0% | 1e-03 | 2e-03 | 0.50 |" in text


def test_check_fails_until_the_readme_is_written_anew(head_op, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- table: linear_logps.jsonl -->\n{table.NOTHING}<!-- end -->\nafter\n")
    monkeypatch.setattr(table, "README", readme)
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert table.main(["--check"]) == 1
    assert "--write" in capsys.readouterr().err
    assert table.main(["--write"]) == 0
    assert table.main(["--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "| fastdpo |" in text
    head_op.unlink()
    assert table.main(["--write"]) == 0
    assert readme.read_text().count(table.NOTHING) == 1


def test_plots_are_written_for_both_kinds_and_are_the_same_each_time(head_op, skipping, tmp_path):
    pytest.importorskip("matplotlib")
    from shared.plots import write_plots

    records = table.read(head_op) + table.read(skipping)
    paths = write_plots(records, tmp_path / "plots")
    assert [path.name for path in paths] == [
        "linear_logps-abacus-T2048-R1024-H512-V32000-float32.png",
        "skipping-abacus-T2048-R1024-H512-V32000-float32.png",
    ]
    first = [path.read_bytes() for path in paths]
    assert all(content.startswith(b"\x89PNG") for content in first)
    assert [path.read_bytes() for path in write_plots(records, tmp_path / "plots")] == first
