"""docs/memory.md shows what `fastdpo plan` says of usual models on GPUs of 8 to 80 GB."""

import pytest
import what_fits as bench
from shared.pages import part

from fastdpo.evidence.bench.records import read

RECORDS = {(r["workload"], r["method"], r["x"]): r for r in read(bench.RESULTS)}


def test_the_page_says_what_the_records_say():
    page, records = bench.PAGE.read_text(), read(bench.RESULTS)
    assert part(page, bench.RESULTS.name) == bench.table(records)
    assert set(RECORDS) == {(model, way, card) for model in bench.MODELS for way in bench.WAYS for card in bench.CARDS}


def test_a_cell_has_the_longest_pair_with_the_plain_settings_and_with_any():
    def record(plain, most):
        return {"workload": "Qwen3-0.6B", "plain": plain, "longest": most}

    assert bench.cell(record(0, 0)) == "no"
    assert bench.cell(record(2048, 2048)) == "2,048"
    assert bench.cell(record(2048, 16384)) == "2,048 / 16,384"
    assert bench.cell(record(0, 16384)) == "no / 16,384"
    # 40,960 tokens of prompt and response are at most 54,614 of a pair
    assert bench.cell(record(54613, 54614)) == "54,613 / any"
    assert bench.cell(record(60000, 70000)) == "any"


def test_more_memory_and_more_settings_never_take_shorter_pairs():
    for (model, way, card), record in RECORDS.items():
        assert record["plain"] <= record["longest"]
        larger = [c for c in bench.CARDS if c > card]
        for key in ("plain", "longest"):
            assert all(RECORDS[model, way, c][key] >= record[key] for c in larger)


@pytest.mark.slow
def test_the_plan_still_says_so():
    """Within 2%: what other releases of torch and transformers keep for backward may differ a little."""
    for record in bench.records_of("Qwen3-0.6B", bench.MODELS["Qwen3-0.6B"], [24]):
        known = RECORDS[record["workload"], record["method"], record["x"]]
        for key in ("plain", "longest"):
            assert record[key] == pytest.approx(known[key], rel=0.02)
