"""The generated world: its true reward by hand, its prompts, its labels."""

import math
import random
import re

import pytest

from fastdpo.data.synthetic import (
    MODIFIERS,
    REWARD_SCALE,
    VALENCES,
    bradley_terry_rows,
    review_pairs,
    review_prompts,
    review_response,
    true_reward,
)

BY_HAND = [
    (" was perfect.", 4.0),
    (" was not good and the pool seemed utterly awful.", 4 * (-0.5 * 0.4 + 1.5 * -1.0) / 2),
    (" was ordinary. Overall it was very nice.", 4 * (0.0 + 1.25 * 0.4) / 2),
    (" was not. Good bread.", 4 * -0.5 * 0.4),  # punctuation separates nothing: a modifier belongs to the next word
    (" was very late but good.", 4 * 0.4),  # "very" belongs to "late", which is no opinion
    (" starts at seven.", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("text", "reward"), BY_HAND)
def test_the_true_reward_is_what_arithmetic_by_hand_gives(text, reward):
    assert true_reward(text) == pytest.approx(reward, abs=1e-12)


def test_the_true_reward_does_not_depend_on_length():
    text = " was great and the bed felt somewhat slow."
    assert true_reward(text * 5) == pytest.approx(true_reward(text), abs=1e-12)


def test_no_text_leaves_the_stated_range_of_rewards():
    bound = REWARD_SCALE * max(map(abs, VALENCES.values())) * max(map(abs, MODIFIERS.values()))
    rows = review_pairs(review_prompts(500, 0, seed=1)[0], seed=1)
    rewards = [true_reward(row[side]) for row in rows for side in ("chosen", "rejected")]
    assert bound == 6
    assert max(map(abs, rewards)) <= bound
    assert min(rewards) < -2
    assert max(rewards) > 2


def test_train_and_heldout_prompts_are_distinct_and_depend_on_nothing_but_the_seed():
    train, heldout = review_prompts(2000, 1000, seed=3)
    assert (len(train), len(heldout)) == (2000, 1000)
    assert len({*train, *heldout}) == 3000
    assert review_prompts(2000, 1000, seed=3) == (train, heldout)
    assert review_prompts(2000, 1000, seed=4) != (train, heldout)


def test_more_prompts_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"num_train \+ num_heldout must lie in \[0, 6912\].*got 6912 \+ 1"):
        review_prompts(6912, 1, seed=0)


def test_responses_go_on_where_the_prompt_ends_and_keep_to_its_topic():
    rng = random.Random(0)
    for prompt in review_prompts(300, 0, seed=0)[0]:
        response = review_response(prompt, rng)
        assert re.fullmatch(r" (was|seemed|felt) [^.]+\.( [A-Z][^.]+\.)+", response), response
        if "film" in prompt or "drama" in prompt:
            assert not re.search(r"soup|dessert|bed|breakfast", response)


def test_a_prompt_from_elsewhere_is_refused():
    with pytest.raises(ValueError, match="prompt must be one of review_prompts, got 'Once upon a time'"):
        review_response("Once upon a time", random.Random(0))


@pytest.mark.parametrize("difference", [-2.0, 0.0, 0.7, 3.0])
def test_labels_follow_bradley_terry(difference):
    rewards = {"first": difference, "second": 0.0}
    num_pairs = 4000
    rows = bradley_terry_rows(
        ["p"] * num_pairs, ["first"] * num_pairs, ["second"] * num_pairs, seed=0, reward_fn=rewards.__getitem__
    )
    share = sum(row["chosen"] == "first" for row in rows) / num_pairs
    expected = 1 / (1 + math.exp(-difference))
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / num_pairs)


def test_extreme_reward_differences_do_not_overflow():
    rewards = {"good": 1e6, "bad": -1e6}
    rows = bradley_terry_rows(["p", "p"], ["good", "bad"], ["bad", "good"], seed=0, reward_fn=rewards.__getitem__)
    assert [row["chosen"] for row in rows] == ["good", "good"]


def test_pairs_of_equal_texts_are_left_out():
    rows = bradley_terry_rows(["p", "q"], ["same", "a"], ["same", "b"], seed=0)
    assert [row["prompt"] for row in rows] == ["q"]


def test_columns_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="must have equal lengths, got 2, 1 and 2"):
        bradley_terry_rows(["p", "q"], ["a"], ["a", "b"], seed=0)


def test_equal_seeds_give_equal_pairs():
    prompts = review_prompts(50, 0, seed=0)[0]
    assert review_pairs(prompts, seed=5) == review_pairs(prompts, seed=5)
    assert review_pairs(prompts, seed=5) != review_pairs(prompts, seed=6)
