"""The frontier recipe end to end at its tiny size, and its comparison at equal KL."""

import math

import pytest

from fastdpo.training.callbacks.json_lines import read_lines
from recipes.sentiment_frontier import run
from recipes.sentiment_frontier.run import BEST_OF_N, METHODS, main, table, values_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    main(["--size", "tiny", "--output_dir", str(folder)])
    return folder


@pytest.mark.slow
def test_every_method_is_run_at_every_value_and_seed(folder):
    results = read_lines(folder / "results.jsonl")
    assert len(results) == 2 * sum(len(values_of(method, "tiny")) for method in METHODS)
    assert len(table(results).rows) == len(results) / 2
    for line in results:
        assert line["kl"] > -1e-6  # rounding, where nothing has moved
        assert -6 <= line["reward"] <= 6
    by_true_reward = [line for line in results if line["params"]["method"] == BEST_OF_N][:2]  # of the first seed
    assert [line["params"]["value"] for line in by_true_reward] == ["2", "4"]
    assert by_true_reward[0]["reward"] < by_true_reward[1]["reward"]
    assert by_true_reward[0]["kl"] == pytest.approx(math.log(2) - 1 / 2)


def test_the_page_has_table_plot_and_claims(folder):
    page = (folder / "page.html").read_text()
    assert "DPO above Preferred-FT, rate = 0.0003 in reward at equal KL" in page
    assert page.count("<img") == 1
    assert (folder / "plot.svg").read_text().count("<svg") == 1
    assert (folder / "task_seed_1" / "pairs.jsonl").is_file()


def test_a_second_call_runs_nothing_again(folder, monkeypatch):
    before = (folder / "results.jsonl").read_bytes()
    monkeypatch.setattr(run, "_figures", None)
    main(["--size", "tiny", "--output_dir", str(folder)])
    assert (folder / "results.jsonl").read_bytes() == before


def line(method, value, seed, kl, reward, **more):
    params = {"method": method, "value": value, "seed": seed}
    return {"params": params, "kl": kl, "reward": reward, **more}


def test_rewards_are_compared_at_equal_kl_within_a_seed():
    """Seed 0: DPO goes from reward 1 at KL 0 to reward 3 at KL 4, so halfway in the root of the KL, at KL 1, it has 2.
    Seed 1: DPO does not reach KL 1."""
    results = [
        line("Reference", "0", "0", 0.0, 1.0),
        line("DPO", "0.1", "0", 4.0, 3.0),
        line("Preferred-FT", "0.001", "0", 1.0, 1.5),
        line("Reference", "0", "1", 0.0, 1.0),
        line("DPO", "0.1", "1", 0.5, 3.0),
        line("Preferred-FT", "0.001", "1", 1.0, 1.5),
    ]
    assert run.above_preferred_ft(results, "DPO", "0.001") == [pytest.approx(0.5)]
