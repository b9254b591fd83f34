"""Methods at equal KL, and the judge with Bradley-Terry's noise."""

import math

import pytest

from fastdpo.data.synthetic import true_reward
from recipes.frontiers import at_equal_kl, common_kls, differences, frontiers_of, policies_table, reward_at
from recipes.judges import bradley_terry


def line(method, seed, kl=0.0, reward=0.0, beta="1"):
    params = {"method": method, **({} if method == "reference" else {"beta": beta}), "seed": seed}
    return {"params": params, "kl": kl, "reward": reward, "accuracy": 0.5}


LINES = [
    line("reference", "0", reward=1.0),
    line("a", "0", kl=0.25, reward=2.0),
    line("a", "0", kl=1.0, reward=4.0, beta="0.1"),
    line("b", "0", kl=1.21, reward=2.1),
    line("reference", "1", reward=0.0),
    line("a", "1", kl=1.0, reward=2.0),
    line("b", "1", kl=1.44, reward=1.2),
]


def test_a_frontier_runs_from_the_reference_through_the_policies_in_the_order_of_their_kl():
    assert frontiers_of(LINES)["a"] == {"0": [(0.0, 1.0), (0.25, 2.0), (1.0, 4.0)], "1": [(0.0, 0.0), (1.0, 2.0)]}


def test_between_two_policies_the_reward_is_linear_in_the_root_of_kl():
    frontier = [(0.0, 1.0), (0.25, 2.0), (1.0, 4.0)]
    assert reward_at(frontier, 0.0) == 1.0
    assert reward_at(frontier, 0.0625) == pytest.approx(1.5)  # half of the way from 0 to 0.5
    assert reward_at(frontier, 0.5625) == pytest.approx(3.0)  # 0.75, half of the way from 0.5 to 1
    with pytest.raises(ValueError, match=r"kl must lie in \[0, 1\], the reach of the frontier, got 1.1"):
        reward_at(frontier, 1.1)


def test_methods_are_compared_where_all_of_their_seeds_have_policies_and_within_a_seed():
    assert common_kls(frontiers_of(LINES)) == [0.1, 0.2, 0.3, 0.5, 1.0]
    names = {"a": "first", "b": "second"}
    assert at_equal_kl(LINES, names).columns == ("KL", "first", "second")
    # at KL 1: a has 4 and 2; b has 1 + 1.1 / 1.1 = 2 and 1.2 / 1.2 = 1; the differences are -2 and -1
    assert at_equal_kl(LINES, names).rows[-1] == ["1", "3.00 ± 1.00", "1.50 ± 0.50"]
    assert differences(LINES, names, base="a").rows[-1] == ["1", "-1.50 ± 0.50"]


def test_the_table_of_policies_has_a_row_for_each_beta_and_no_kl_for_the_reference():
    twice = [*LINES, line("a", "1", kl=3.0, reward=6.0, beta="0.1"), line("b", "1", kl=3.0, reward=6.0)]
    rows = policies_table(twice, {"a": "first", "b": "second"}).rows
    assert rows[0] == ["the reference", "0.50 ± 0.50", "0", ""]
    assert rows[2] == ["first, beta 0.1", "5.00 ± 1.00", "2.00 ± 1.00", "0.500 ± 0.000"]


GOOD, BAD, PLAIN = " was good.", " was bland.", " was usual."


def test_the_judge_prefers_a_response_with_the_probability_of_bradley_terry():
    num_calls = 4000
    wins = 0
    for number in range(num_calls):
        first, second = bradley_terry([f"prompt {number}"] * 2, [GOOD, BAD])
        wins += first > second
    expected = 1 / (1 + math.exp(true_reward(BAD) - true_reward(GOOD)))
    assert true_reward(GOOD) - true_reward(BAD) == pytest.approx(3.2)
    assert abs(wins / num_calls - expected) < 4 * math.sqrt(expected * (1 - expected) / num_calls)


def test_the_judge_ranks_several_by_plackett_luce():
    texts, num_calls = [GOOD, PLAIN, BAD], 4000
    scores = [bradley_terry([f"prompt {number}"] * 3, texts) for number in range(num_calls)]
    orders = [tuple(sorted(range(3), key=[-s for s in of_call].__getitem__)) for of_call in scores]
    strengths = [math.exp(true_reward(text)) for text in texts]
    for order in ((0, 1, 2), (1, 0, 2), (0, 2, 1)):
        left = [strengths[i] for i in order]
        expected = left[0] / sum(left) * left[1] / sum(left[1:])
        stderr = math.sqrt(expected * (1 - expected) / num_calls)
        assert abs(orders.count(order) / num_calls - expected) < 4 * stderr


def test_the_same_call_gets_the_same_scores_and_a_text_that_comes_again_is_judged_anew():
    assert bradley_terry(["p"] * 2, [GOOD, GOOD]) == bradley_terry(["p"] * 2, [GOOD, GOOD])
    first, second = bradley_terry(["p"] * 2, [GOOD, GOOD])
    assert first != second
    assert bradley_terry(["p"], [GOOD]) != bradley_terry(["q"], [GOOD])
