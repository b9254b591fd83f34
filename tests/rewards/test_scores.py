"""Rewards are the trainer's, credits sum to them, and the function for other trainers gives the same numbers."""

import pytest
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import make_lora, tiny_trainer

from fastdpo import DPOConfig
from fastdpo.rewards.credits import token_credits
from fastdpo.rewards.implicit import implicit_reward
from fastdpo.rewards.intervals import wilson
from fastdpo.rewards.scores import RowScores, score, summarize, summarize_per_token

ROWS = make_rows(8)


def config(tmp_path, **settings):
    settings = {"use_cpu": True, "ref_cache_dir": str(tmp_path / "cache"), **settings}
    return DPOConfig(str(tmp_path / "out"), **settings)


def scored(tmp_path, **settings):
    policy, reference = make_llama(seed=1), make_llama(seed=2)
    args = config(tmp_path, **settings)
    return score(policy, reference, ROWS, args, beta=0.5, processing_class=make_tokenizer())


def test_rewards_and_accuracy_are_those_that_the_trainer_logs(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        make_llama(seed=1),
        ref_model=make_llama(seed=2),
        eval_dataset=ROWS,
        beta=0.5,
        per_device_eval_batch_size=3,
    )
    logged = trainer.evaluate()
    found = scored(tmp_path)
    summary = summarize(found.rows)
    assert summary.mean_margin == pytest.approx(logged["eval_rewards/margins"], rel=1e-5)
    assert summary.accuracy == pytest.approx(logged["eval_rewards/accuracies"], abs=1e-6)
    chosen = sum(row.rewards[0] for row in found.rows) / len(found.rows)
    assert chosen == pytest.approx(logged["eval_rewards/chosen"], rel=1e-5)


def test_credits_of_a_response_sum_to_its_reward(tmp_path):
    found = scored(tmp_path)
    tokenizer, args = make_tokenizer(), config(tmp_path)
    credits = token_credits(make_llama(seed=1), make_llama(seed=2), found.dataset, tokenizer, args, beta=0.5)
    for row, of_row in zip(found.rows, credits, strict=True):
        assert [one.reward for one in of_row] == pytest.approx(list(row.rewards), rel=1e-4, abs=1e-5)
        assert [len(one.tokens) for one in of_row] == list(row.lengths)
        assert "".join(of_row[0].tokens[:-1]) == ROWS[row.row]["chosen"]


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_function_for_other_trainers_gives_the_same_rewards(tmp_path, packing):
    reward = implicit_reward(
        make_llama(seed=1), make_llama(seed=2), make_tokenizer(), 0.5, args=config(tmp_path, packing=packing)
    )
    prompts = [row["prompt"] for row in ROWS for _ in range(2)]
    completions = [row[side] for row in ROWS for side in ("chosen", "rejected")]
    given = reward(prompts, completions, trainer_state=None)  # TRL hands further columns over
    expected = [value for row in scored(tmp_path).rows for value in row.rewards]
    assert given == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert reward.__name__ == "implicit_reward"  # TRL logs rewards by it


def test_a_completion_of_nothing_has_no_reward_and_costs_no_other(tmp_path):
    reward = implicit_reward(make_llama(seed=1), None, make_tokenizer(), 0.5, args=config(tmp_path))
    alone = reward(["the cat "], ["sees"])
    assert reward(["the cat ", "the cat ", "a dog "], ["", "sees", ""]) == [None, pytest.approx(alone[0]), None]
    assert reward([], []) == []
    with pytest.raises(ValueError, match="completions must have one entry per prompt"):
        reward(["the cat "], [])


def test_messages_are_scored_through_the_chat_template(tmp_path):
    reward = implicit_reward(make_llama(seed=1), make_llama(seed=2), make_tokenizer(), 0.5, args=config(tmp_path))
    asked, said = [{"role": "user", "content": "the cat"}], [{"role": "assistant", "content": "sees a dog"}]
    data = [{"prompt": asked, "chosen": said, "rejected": [{"role": "assistant", "content": "never"}]}]
    args = config(tmp_path)
    found = score(make_llama(seed=1), make_llama(seed=2), data, args, beta=0.5, processing_class=make_tokenizer())
    assert reward([asked], [said]) == pytest.approx([found.rows[0].rewards[0]], rel=1e-4)


def test_rewards_per_token_are_means(tmp_path):
    args = config(tmp_path)
    whole, mean = (
        implicit_reward(make_llama(seed=1), make_llama(seed=2), make_tokenizer(), 0.5, per_token=flag, args=args)
        for flag in (False, True)
    )
    given = ["the cat "], ["sees a dog"]
    assert mean(*given)[0] == pytest.approx(whole(*given)[0] / 4)  # three words and EOS


def test_log_probs_that_the_rows_bring_are_not_taken_for_the_models(tmp_path):
    rows = [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in ROWS]
    args = config(tmp_path)
    found = score(make_llama(seed=1), None, rows, args, beta=0.5, processing_class=make_tokenizer())
    assert all(logp not in (-1.0, -2.0) for row in found.rows for logp in row.logps)


def test_an_adapters_reference_is_its_base_model(tmp_path):
    """Fresh adapters change nothing: all rewards are 0."""
    base = tmp_path / "base"
    make_llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), make_lora())
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    found = score(str(tmp_path / "adapter"), None, ROWS, config(tmp_path), beta=0.5)
    assert found.rows[0].ref_logps is not None
    assert [abs(reward) for row in found.rows for reward in row.rewards] == pytest.approx([0.0] * 16, abs=1e-6)


def row(rewards, lengths=(1, 1), preferences=((0, 1),)):
    margins = tuple(rewards[a] - rewards[b] for a, b in preferences)
    return RowScores(0, rewards, rewards, None, lengths, preferences, margins, rewards.index(max(rewards)))


def test_ties_count_half_and_length_is_divided_out():
    rows = [row((2.0, 1.0)), row((1.0, 1.0)), row((0.0, 3.0)), row((4.0, 3.0), lengths=(4, 1))]
    whole, mean = summarize(rows), summarize_per_token(rows)
    assert (whole.num_pairs, whole.num_ties, whole.accuracy) == (4, 1, 2.5 / 4)
    assert whole.mean_margin == pytest.approx((1 + 0 - 3 + 1) / 4)
    assert mean.accuracy == 1.5 / 4  # 1 per token against 3


def test_wilsons_interval_contains_the_share_also_at_0_and_1():
    """Rounding left it 1e-16 short for 5 of 5, and a plot's bar of negative length is an error."""
    for trials in range(1, 200):
        assert wilson(trials, trials)[1] == 1.0
        assert wilson(0, trials)[0] == 0.0


def test_wilsons_interval():
    """Solves (p - 0.8)^2 = z^2 p (1 - p) / 10 with z = 1.959964; and Newcombe's table (1998)."""
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-7)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_what_cannot_be_scored_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"beta must be > 0, got 0\.0"):
        implicit_reward(make_llama(), None, make_tokenizer(), 0.0)
    with pytest.raises(ValueError, match="beta must be > 0, got -1"):
        score(make_llama(), None, ROWS, config(tmp_path), beta=-1, processing_class=make_tokenizer())


def test_a_dataset_that_is_tokenized_already_is_scored_the_same(tmp_path):
    """Its log-probs are another model's: those of the reference."""
    found = scored(tmp_path)
    again = score(
        make_llama(seed=1), None, found.dataset, config(tmp_path), beta=0.5, processing_class=make_tokenizer()
    )
    assert [row.logps for row in again.rows] == [row.logps for row in found.rows]
