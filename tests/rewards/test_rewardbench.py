"""RewardBench's and RewardBench 2's scores, against numbers worked out by hand."""

import pytest

from fastdpo.rewards.rewardbench import benchmark_rows, benchmark_scores, best_of, ties_score
from fastdpo.rewards.scores import RowScores


def scored(number, rewards, num_right=1):
    pairs = tuple((i, j) for i in range(num_right) for j in range(num_right, len(rewards)))
    return RowScores(number, tuple(rewards), tuple(rewards), None, (1,) * len(rewards), pairs, (), 0)


def pair(subset, **more):
    return {"prompt": "2+2?", "chosen": "4", "rejected": "5", "subset": subset, **more}


def test_sections_are_means_over_rows_with_math_as_much_as_code():
    examples = [
        pair("alpacaeval-easy"),
        pair("alpacaeval-easy"),
        pair("mt-bench-med"),
        pair("math-prm"),
        pair("hep-go"),
    ]
    rows = [scored(0, (1, 0)), scored(1, (0, 0)), scored(2, (1, 0)), scored(3, (1, 0)), scored(4, (0, 1))]
    found = {line.name: line.score for line in benchmark_scores("rewardbench", examples, rows)}
    assert found["alpacaeval-easy"] == 0.5  # a tie is wrong
    assert found["Chat"] == pytest.approx(2 / 3)
    assert found["Reasoning"] == pytest.approx((984 / 447) / (984 / 447 + 1))
    assert found["overall"] == pytest.approx((found["Chat"] + found["Reasoning"]) / 2)


def test_rewards_per_token_may_change_who_wins():
    rows = [RowScores(0, (2.0, 1.5), (2.0, 1.5), None, (4, 1), ((0, 1),), (0.5,), 0)]
    examples = [pair("alpacaeval-easy")]
    assert benchmark_scores("rewardbench", examples, rows)[0].score == 1.0
    assert benchmark_scores("rewardbench", examples, rows, per_token=True)[0].score == 0.0


def test_the_best_of_four_is_shared_with_those_that_tie_with_it():
    assert best_of((3.0, 1.0, 2.0, 0.0), 1) == 1.0
    assert best_of((3.0, 3.0, 2.0, 0.0), 1) == 0.5
    assert best_of((1.0, 3.0, 3.0, 0.0), 1) == 0.0


def test_ties_are_scored_by_accuracy_and_margins():
    """Of two twos: both kinds right in the first, the tied one wrong in the second.

    First: gap among the right 1, to the wrong 2 (tied) and 3 (ref): both margins hold, tanh(2/1 - 1).
    Second: the tied item's worst right is below its wrong one: gap -1, among the right 2, tanh(-1/2 - 1).
    """
    rows = [
        ({"id": "ref:1"}, [4.0, 1.0], 1),
        ({"id": "tied:1"}, [5.0, 4.0, 2.0], 2),
        ({"id": "ref:2"}, [2.0, 1.0], 1),
        ({"id": "tied:2"}, [3.0, 1.0, 2.0], 2),
    ]
    margins = (0.7615941559557649 - 0.9051482536448664) / 2
    by_hand = 0.3 * 0.5 + 0.3 * 1.0 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margins
    assert ties_score(rows) == pytest.approx(by_hand)


def test_a_subset_of_ties_stands_beside_the_others():
    examples = [
        {"id": "7", "prompt": "?", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"},
        {"id": "ref:1", "prompt": "?", "chosen": ["a"], "rejected": ["b"], "subset": "Ties"},
    ]
    rows = [scored(0, (2, 2, 1, 0)), scored(1, (1, 0))]
    found = {line.name: line.score for line in benchmark_scores("rewardbench2", examples, rows)}
    assert found == {"Math": 0.5, "Ties": pytest.approx(0.3), "overall": pytest.approx(0.4)}


def test_rows_become_forms_that_are_read():
    (first,) = benchmark_rows("rewardbench", [pair("donotanswer")])
    assert first["prompt"] == [{"role": "user", "content": "2+2?"}]
    assert first["chosen"] == [{"role": "assistant", "content": "4"}]
    (second,) = benchmark_rows("rewardbench2", [pair("Math", chosen=["4"], rejected=["5", "6"], id="1")])
    assert second["scores"] == [1.0, 0.0, 0.0]


def test_a_file_of_something_else_is_refused():
    with pytest.raises(ValueError, match=r"rewardbench2.*got a file without subset, id"):
        benchmark_rows("rewardbench2", [{"prompt": "", "chosen": "", "rejected": ""}])
    with pytest.raises(ValueError, match="benchmark must be one of rewardbench"):
        benchmark_rows("mtbench", [])
    with pytest.raises(ValueError, match="id must be ref:N or tied:N"):
        ties_score([({"id": "5"}, [1.0, 0.0], 1)])
