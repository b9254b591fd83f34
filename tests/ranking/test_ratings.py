"""Ratings are strengths on Arena's scale, written whole and in order."""

import json
import math

import numpy as np
import pytest

from fastdpo.cli.records import write_records
from fastdpo.ranking.bradley_terry import fit_bradley_terry
from fastdpo.ranking.comparisons import Comparisons
from fastdpo.ranking.ratings import rating_records, short_names

# B wins 10 of 11 comparisons with A: odds of 10 to 1
GIVEN = Comparisons(("A", "B"), np.zeros(11, int), np.ones(11, int), np.array([1.0] + [0.0] * 10))


def test_odds_of_ten_to_one_are_400_points():
    best, worst = rating_records(GIVEN, fit_bradley_terry(GIVEN))
    assert (best["model"], worst["model"]) == ("B", "A")
    assert (best["rating"], worst["rating"]) == pytest.approx((1200, 800))
    assert best["strength"] == pytest.approx(math.log(10) / 2)
    reach = 1.959964 * best["strength_stderr"] * 400 / math.log(10)
    assert (best["rating_lower"], best["rating_upper"]) == pytest.approx((1200 - reach, 1200 + reach), rel=1e-6)
    assert [best[name] for name in ("wins", "ties", "losses", "rank_best", "rank_worst")] == [10, 0, 1, 1, 1]


def test_the_anchor_has_1000_points_and_no_interval():
    best, worst = rating_records(GIVEN, fit_bradley_terry(GIVEN), anchor="A")
    assert [worst[name] for name in ("rating", "rating_lower", "rating_upper")] == [1000, 1000, 1000]
    assert best["rating"] == pytest.approx(1400)


def test_a_wider_confidence_gives_wider_intervals():
    [narrow, _], [wide, _] = (rating_records(GIVEN, fit_bradley_terry(GIVEN), confidence=c) for c in (0.5, 0.99))
    assert wide["rating_lower"] < narrow["rating_lower"] < narrow["rating_upper"] < wide["rating_upper"]


def test_without_strengths_there_are_counts_only():
    first, second = rating_records(GIVEN, None)
    assert (first["model"], first["rating"], first["rank_best"], first["losses"]) == ("A", None, None, 10)
    assert second["wins"] == 10


def test_records_are_written_one_a_line(tmp_path):
    records = rating_records(GIVEN, fit_bradley_terry(GIVEN))
    path = write_records(tmp_path / "new" / "ratings.jsonl", records)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert [file.name for file in path.parent.iterdir()] == ["ratings.jsonl"]


def test_folders_that_all_models_share_are_left_out_of_their_names():
    assert list(short_names(["runs/a/checkpoint-10", "runs/a/checkpoint-20/"]).values()) == [
        "checkpoint-10",
        "checkpoint-20",
    ]
    assert list(short_names(["org/x", "other/x"]).values()) == ["org/x", "other/x"]
    assert list(short_names(["run/checkpoint-5", "run"]).values()) == ["run/checkpoint-5", "run"]
