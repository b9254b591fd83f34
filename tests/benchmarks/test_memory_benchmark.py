"""The pages say how far the estimate of memory is off, and what LoRA on the head costs, by the record."""

import bench_memory as bench
import pytest
from shared.pages import part

from fastdpo.evidence.bench.records import read

RECORDS = read(bench.RESULTS)


def test_the_pages_say_what_the_record_says():
    assert part(bench.PAGE.read_text(), bench.RESULTS.name) == bench.table(RECORDS)
    assert bench.words_of_adapter(RECORDS) in bench.ADAPTERS.read_text()
    assert {(r["method"], r["workload"]) for r in RECORDS if "steps" in r} == {
        (kind, bench.workload_of(rows)) for kind in bench.KINDS for rows in bench.ROWS
    }


def test_recorded_steps_are_within_five_percent_unless_rows_are_padded():
    for record in RECORDS:
        if "steps" in record and "padded" not in record["method"]:
            assert record["estimated_bytes"] == pytest.approx(record["measured_bytes"], rel=0.05), record["method"]


@pytest.mark.parametrize("kind", ["all weights, fp32", "all weights, bf16, updates in backward"])
def test_a_step_is_measured_and_estimated(kind):
    record = bench.error_of_estimate(kind, (2, 40, 20))
    assert record["workload"] == "2 pairs, 40 + 2 x 20 tokens"
    assert record["estimated_bytes"] == pytest.approx(
        record["measured_bytes"], rel=0.1
    )  # so small, single tensors count


def test_columns_beside_the_head_take_less_than_a_copy_of_it(monkeypatch):
    monkeypatch.setattr(bench, "HEAD", {"tokens": 64, "hidden": 128, "vocab": 8000, "r": 4})
    peaks = {way: bench.cost_of_adapter(way)["peak_mib"] for way in (bench.ALONE, bench.COLUMNS, bench.COPY)}
    assert peaks[bench.ALONE] <= peaks[bench.COLUMNS] < peaks[bench.COPY] - 8000 * 128 * 4 / 2**20


def test_an_unknown_kind_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["LoRA on 3 bits"])
    assert "KIND must be among 'all weights, fp32'" in capsys.readouterr().err
