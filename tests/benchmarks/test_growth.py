"""docs/growth.md shows what the records of sweeps say, and slopes are those of the numbers in its tables."""

import growth as bench
import pytest
from shared.pages import names_in, part

from fastdpo.cli.bench import SWEEPS
from fastdpo.evidence.bench.records import read

RECORDS = read(bench.RESULTS)
MACHINE = {"device": "a CPU", "num_threads": 1, "torch": "2.13", "commit": "abc", "runs": 3, "sweep": "responses"}


def record(method, x, ms, peak, unique):
    sizes = {"raw_tokens": 170 * x, "unique_tokens": unique, "results_mib": 10.0}
    return {**MACHINE, "workload": "w", "method": method, "x": x, "cpu_ms": ms, "peak_mib": peak, **sizes}


def test_a_table_has_every_size_and_the_slope_through_them():
    records = [record("fastdpo", 2, 100.0, 14.0, 220), record("fastdpo", 4, 400.0, 26.0, 320)]
    text = bench.table(records, "step")
    assert "| CPU ms | fastdpo | 100 | 400 | 2.00 |" in text  # four times as long at twice the size
    assert "| MiB | gradients alone | 10.0 | 10.0 | 0.00 |" in text
    assert "without gradients" not in text
    assert "| MiB without gradients | fastdpo | 4.0 | 16.0 | 2.00 |" in bench.table(records, "head")
    assert text.startswith("a CPU, 1 threads, torch 2.13, commit abc, 3 runs\n")


def test_the_line_through_the_speed_ups_is_the_one_that_fits_them():
    ours = [record(bench.OURS, 2, 100.0, 1.0, 170), record(bench.OURS, 4, 100.0, 1.0, 170)]
    plain = [record(bench.PLAIN, 2, 300.0, 1.0, 170), record(bench.PLAIN, 4, 500.0, 1.0, 170)]
    assert bench.speed_ups(plain + ours) == [(2.0, 3.0), (4.0, 5.0)]
    assert "`1.00 + 1.00 x raw/unique`" in bench.predicted(plain + ours)


def test_the_page_says_what_the_records_say():
    page, parts = bench.PAGE.read_text(), bench.parts_of(RECORDS)
    assert set(parts) == set(names_in(page))
    for name, text in parts.items():
        assert part(page, name) == text


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_has_four_sizes_of_every_method(sweep):
    steps = [record for record in RECORDS if record["sweep"] == sweep and "workload" in record]
    assert len(steps) == 4 * 3
    assert len({(record["x"], record["method"]) for record in steps}) == 4 * 3
