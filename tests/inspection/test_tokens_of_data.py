"""What the tokenizer sees: cuts, special tokens, lost content, and tokens counted by hand."""

import pytest
from tiny import make_byte_tokenizer, make_rows, make_tokenizer

from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.rows.report import TokenStats
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.inspection import inspect_data
from fastdpo.inspection.source import Source
from fastdpo.inspection.tokens import survey_tokens

THINKS = (  # leaves reasoning_content out
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENS = (  # begins a thought when a model is asked
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def words():
    """One token a word, a BOS before every text, an EOS at its end."""
    return make_tokenizer(chat_template=None)


def tokens_of(rows, tokenizer, **settings):
    settings = TokenizationSettings(**settings)
    return survey_tokens(Source(rows, settings), tokenizer, settings)


def pair(chosen, rejected, prompt="the cat "):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# tokens of <s> the cat = 3, and an EOS behind each answer
ROWS = [
    pair("sees a dog", "sees never"),  # 4 and 3
    pair("sees a big red old dog", "likes"),  # 7 and 2
    pair("a a a a a a a", "the the the the the the"),  # 8 and 7
]


def test_lengths_and_cuts_are_those_of_the_run(words):
    tokens = tokens_of(ROWS, words, max_length=8)
    assert (tokens.one_cut, tokens.ends_cut, tokens.prompts_cut) == ([1], [1, 2], [])
    assert tokens.longest == [7, 10, 11]
    assert (tokens.prompts, tokens.chosen, tokens.rejected) == ([3, 3, 3], [4, 5, 5], [3, 2, 5])
    assert tokens.stats()["chosen"] == TokenStats(mean=pytest.approx(14 / 3), median=5, p95=5, max=5, total=14)
    whole = tokens_of(ROWS, words, max_length=None)
    assert (whole.one_cut, whole.ends_cut, whole.chosen) == ([], [], [4, 7, 8])


def test_keep_end_cuts_no_end(words):
    tokens = tokens_of(ROWS, words, max_length=8, truncation_mode="keep_end")
    assert (tokens.one_cut, tokens.ends_cut) == ([], [])


def test_cut_prompts_and_rows_without_room_are_told(words):
    rows = [pair("a", "the", "the cat sees a big red dog "), pair("a", "the", "the cat ")]
    tokens = tokens_of(rows, words, max_length=6)
    assert dict(tokens.dropped) == {"prompt fills max_length": [0]}
    assert tokens_of(rows, words, max_length=6, max_prompt_length=4).prompts_cut == [0]


def test_checks_of_cuts_judge_and_name_a_length_that_keeps_the_rows_whole(words):
    rows = [pair(f"{'a ' * (i % 3)}a", "the") for i in range(98)]  # 5 to 7 tokens
    rows += [pair("a " * 20, "the"), pair("a " * 20, "the " * 20)]
    found = inspect_data(rows, tokenizer=words, settings=TokenizationSettings(max_length=10), look_for_near=False)
    check = found.check("one side cut")
    assert (check.verdict, check.examples) == ("look", ((98,),))
    assert "1 of 100 (1.0%) rows lose the end of only one answer at max_length 10" in check.finding
    assert "--max_length 24 keeps 99 % of the rows whole" in check.remedy  # <s> the cat, 20 words, </s>
    assert found.check("ends cut").verdict == "look"
    assert found.check("ends cut").examples == ((98,), (99,))
    assert found.check("length bias").numbers["unit"] == "tokens"


def test_tokens_to_compute_are_counted_by_hand(words):
    """<s> the cat is computed once a row, `sees` too, and once for both rows of the prompt in a batch."""
    tokens = tokens_of([pair("sees a dog", "sees never"), pair("likes", "finds")], words)
    # sequences: 3 + 4, 3 + 3, 3 + 2, 3 + 2; `likes </s>` and `finds </s>` share nothing
    assert tokens.num_raw == 23
    assert tokens.num_padded == 4 * 7
    assert tokens.num_unique == 3 + 4 + 2 + 2 + 2
    assert tokens.num_together == tokens.num_unique


def test_a_prompt_that_comes_back_in_a_later_batch_would_be_saved_by_regrouping(words):
    rows = [pair("likes", "finds"), *(pair("likes", "finds", f"{w} ") for w in ("dog", "bird", "house", "tree"))]
    rows += [pair("likes", "finds", f"{w} ") for w in ("river", "small", "big")]
    rows.append(pair("sees", "eats"))  # the ninth: the first of the second batch
    tokens = tokens_of(rows, words)
    assert tokens.num_unique - tokens.num_together == 3
    found = inspect_data(rows, tokenizer=words, look_for_near=False)
    assert "with --regroup_dataset" in found.check("savings").finding
    assert found.check("savings").numbers["regrouped"] == tokens.num_together


def test_special_tokens_in_text_are_control_tokens_and_in_messages_are_not():
    tokenizer = make_byte_tokenizer()
    rows = [pair("yes</s>", "no"), pair("a</s>b", "no"), pair("plain", "no")]
    tokens = tokens_of(rows, tokenizer)
    assert tokens.spelled == {1: ("</s>",)}  # at the end of an answer it is where it belongs
    assert tokens.spelled_as_tokens == [1]
    said = [{"role": "assistant", "content": "a</s>b"}]
    messages = {"prompt": [{"role": "user", "content": "Q"}], "chosen": said, "rejected": "no"}
    found = inspect_data([messages, *[{**messages, "chosen": f"yes {i}"} for i in range(4)]], tokenizer=tokenizer)
    check = found.check("special tokens")
    assert (check.verdict, check.examples) == ("look", ((0,),))
    assert check.numbers["names"] == {"</s>": 1}
    assert check.numbers["num_as_control_tokens"] == 0
    assert "tokenized as plain characters" in check.finding


def thinking(thought, i):
    message = {"role": "assistant", "content": f"yes {i}", **({"reasoning_content": thought} if thought else {})}
    return {"prompt": [{"role": "user", "content": f"Q {i}"}], "chosen": [message], "rejected": "no"}


def test_thoughts_that_the_template_loses_are_lost_content():
    tokenizer = make_byte_tokenizer(THINKS)
    rows = [thinking("First I think it over carefully." if i < 2 else None, i) for i in range(10)]
    check = inspect_data(rows, tokenizer=tokenizer, look_for_near=False).check("lost content")
    assert (check.verdict, check.examples) == ("bad", ((0,), (1,)))
    assert check.numbers["num_found"] == 2
    assert "the chat template leaves out thoughts: 2 of 10 chosen" in check.finding
    kept = inspect_data(rows[2:], tokenizer=tokenizer, look_for_near=False).check("lost content")
    assert (kept.verdict, kept.finding) == ("ok", "none: the tokens hold the rows' whole content")


def test_a_prompt_that_ends_otherwise_in_generation_is_worth_a_look():
    rows = [thinking(None, i) for i in range(4)]
    check = inspect_data(rows, tokenizer=make_byte_tokenizer(OPENS), look_for_near=False).check("prompt ends")
    assert check.verdict == "look"
    assert "end in '<think>' in generation" in check.finding
    assert inspect_data(rows, tokenizer=make_byte_tokenizer()).check("prompt ends").verdict == "ok"


def test_plain_text_for_a_chat_model_is_worth_a_look():
    """LLMs-from-scratch's rows are read as "### Instruction: ..." text; SmolLM2-Instruct was never asked like that."""
    rows = [
        {"instruction": f"Add {i}.", "input": "", "output": "", "chosen": f"{i} is", "rejected": "no"} for i in range(4)
    ]
    check = inspect_data(rows, tokenizer=make_byte_tokenizer(), look_for_near=False).check("chat template")
    assert (check.verdict, check.numbers["num_found"], check.examples[0]) == ("look", 4, (0,))
    assert "fastdpo data convert" in check.remedy
    messages = [
        {"prompt": [{"role": "user", "content": row["instruction"]}], "chosen": row["chosen"], "rejected": "no"}
        for row in rows
    ]
    assert inspect_data(messages, tokenizer=make_byte_tokenizer()).check("chat template").verdict == "ok"
    assert inspect_data(rows, tokenizer=make_byte_tokenizer(None)).check("chat template").verdict == "ok"
    templated = [{"prompt": f"Add {i}. </s>Answer: ", "chosen": "yes", "rejected": "no"} for i in range(4)]
    assert inspect_data(templated, tokenizer=make_byte_tokenizer()).check("chat template").verdict == "ok"


def test_unknown_characters_are_lost_content(words):
    check = inspect_data([pair("zebra", "a")], tokenizer=words, look_for_near=False).check("lost content")
    assert check.verdict == "bad"
    assert "the tokenizer does not know some characters" in check.finding


def test_messages_without_a_chat_template_are_refused_with_the_row(words):
    asked = {"role": "user", "content": "the cat"}
    row = {side: [asked, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    with pytest.raises(ValueError, match=r"chat template.*row 0"):
        inspect_data([row], tokenizer=words)


def test_counts_agree_with_the_report_of_training(words):
    rows = [*make_rows(40, seed=3), pair("a", "a")]
    settings = TokenizationSettings(max_length=9)
    _, report = prepare_preference_dataset(rows, words, settings)
    tokens = tokens_of(rows, words, max_length=9)
    assert {reason: tuple(numbers) for reason, numbers in tokens.dropped.items()} == report.dropped
    assert (tokens.num_kept, tokens.num_pairs) == (report.num_kept, report.num_pairs)
    assert len(tokens.one_cut) == report.num_one_cut > 0
    assert len({*tokens.ends_cut, *tokens.prompts_cut}) == report.num_truncated > 0
    assert tokens.stats() == report.tokens
