"""recipes/sizes/README.md shows what `fastdpo plan` says of the settings there, and they fit."""

from dataclasses import asdict

import pytest
import recipe_plans as bench
import yaml
from shared.pages import part

from fastdpo.evidence.bench.records import read
from fastdpo.training.memory.card.estimates import pair_tokens
from fastdpo.training.memory.card.settings import CANDIDATES

RECORDS = {record["workload"]: record for record in read(bench.RESULTS)}


def test_the_page_says_what_the_records_say():
    page = (bench.FOLDER / "README.md").read_text()
    assert part(page, bench.RESULTS.name) == bench.table(list(RECORDS.values()))
    assert set(RECORDS) == set(bench.FILES)


@pytest.mark.parametrize("name", bench.FILES)
def test_the_plan_was_asked_for_the_settings_of_the_file_and_they_fit(name):
    settings, record = yaml.safe_load(bench.FILES[name].read_text()), RECORDS[name]
    assert record["plan"] == bench.command_of(name)
    assert record["settings"] == asdict(bench.settings_of(name))
    asked = settings["max_tokens_per_microbatch"]
    assert record["longest_pair_tokens"] >= max(pair_tokens(settings["max_length"]), 0 if asked == "auto" else asked)
    assert sum(size for part, size in record["bytes"].items() if part != "total") == record["bytes"]["total"]


@pytest.mark.parametrize("name", bench.FILES)
def test_a_plan_has_a_line_with_the_settings_of_the_file(name):
    assert bench.settings_of(name) in CANDIDATES


@pytest.mark.slow
def test_the_plan_still_says_so():
    """Within 2%: what other releases of torch and transformers keep for backward may differ a little."""
    found = bench.record_of("hh_0.5b_24gb")
    assert found["longest_pair_tokens"] == pytest.approx(RECORDS["hh_0.5b_24gb"]["longest_pair_tokens"], rel=0.02)
