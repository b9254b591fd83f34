"""The recipe of sampling temperatures end to end at its tiny size."""

import pytest

from fastdpo.training.callbacks.json_lines import read_lines
from recipes.sampling_temperature.run import METHODS, main, table


@pytest.mark.slow
def test_every_method_is_sampled_at_every_temperature_and_cold_answers_are_the_likeliest(tmp_path):
    main(["--size", "tiny", "--output_dir", str(tmp_path)])
    results = read_lines(tmp_path / "results.jsonl")
    found = [(line["params"]["method"], line["params"]["temperature"]) for line in results]
    assert found == 2 * [(method, temperature) for method in METHODS for temperature in ("0", "1")]
    assert len(table(results).rows) == 2 * len(METHODS)
    of = {(line["params"]["method"], line["params"]["temperature"], line["params"]["seed"]): line for line in results}
    for seed in "01":
        reference, best = of["Reference", "0", seed], of["Best of 4", "0", seed]
        assert (best["reward"], best["win_rate"]) == (reference["reward"], reference["win_rate"])  # all 4 are equal
        assert reference["distinct"] < of["Reference", "1", seed]["distinct"] == 1
        assert all(0 <= of[method, "1", seed]["win_rate"] <= 1 for method in METHODS)
    assert "Win rates. Reference:" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "plot_3.svg").is_file()
