"""From prompts to rows of preferences: the pairs that were asked for, the labels' bias, runs that were stopped."""

import json
import random
from dataclasses import replace

import pytest
from tiny import make_byte_tokenizer, make_llama, make_tokenizer

from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.rounds import generate
from fastdpo.rounds.generate import (
    Pairing,
    Sampling,
    generate_scored,
    make_rows,
    prompt_ids,
    read_prompts,
    sample_ids,
    summary_of,
)
from fastdpo.rounds.judges import make_judge
from fastdpo.rounds.selection import (
    Candidates,
    Counted,
    balanced,
    choose_pairs,
    distinct,
    length_correlation,
)

OF = Candidates(("a", "bb", "ccc", "d"), (1.0, 3.0, 2.0, 3.0))
SAMPLING = Sampling(num_responses=3, max_new_tokens=5, batch_size=4)


def pairs(way, margin=0.0):
    counted = Counted()
    return choose_pairs(OF, way, margin, random.Random(0), counted), counted


def test_the_pairs_of_each_way():
    assert pairs("best_worst")[0] == [(1, 0)]
    assert pairs("best_random")[0][0][0] == 1
    every, counted = pairs("all")
    assert every == [(1, 2), (1, 0), (3, 2), (3, 0), (2, 0)]
    assert counted.num_ties == 1  # of the two that score 3
    assert pairs("all", margin=2.0)[0] == [(1, 0), (3, 0)]


def test_equal_responses_count_once_and_those_without_a_score_not_at_all():
    counted = Counted()
    of = distinct(["a", "a", "b", "c"], [1.0, 1.0, None, float("nan")], counted)
    assert of == Candidates(("a",), (1.0,))
    assert (counted.num_responses, counted.num_duplicates, counted.num_unscored) == (4, 1, 2)


def test_balance_drops_the_least_certain_of_the_larger_kind():
    lengths = [(5, 1), (5, 2), (5, 3), (1, 5), (2, 2)]
    assert balanced(lengths, [3.0, 1.0, 2.0, 9.0, 9.0]) == [0, 3, 4]


def test_the_correlation_of_length_and_score():
    assert length_correlation([1, 2, 3], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert length_correlation([1, 1], [1.0, 2.0]) == 0.0


def test_ties_only_give_no_row_and_are_counted():
    scored = [{"prompt": "p ", "responses": ["a", "b"], "scores": [1.0, 1.0]}]
    rows, counted = make_rows(scored, Pairing(), {})
    assert rows == []
    assert (counted.num_ties, counted.num_prompts_without_pair) == (1, 1)


def test_a_continuation_of_text_keeps_its_blanks_and_a_message_has_none_at_its_ends(monkeypatch):
    """ " sees" and "sees" are different tokens for most tokenizers, and different text after the prompt."""
    tokenizer = make_byte_tokenizer()
    ids = tokenizer(" sees it ,")["input_ids"]
    monkeypatch.setattr(generate, "generate_ids", lambda model, prompts, **kwargs: [ids for _ in prompts])
    model, message = make_llama(len(tokenizer)), [{"role": "user", "content": "the cat"}]
    said = [of.texts for of in generate.sample(model, tokenizer, ["the cat", message], Sampling(2, 16), seed=0)]
    assert said == [[" sees it ,"] * 2, ["sees it ,"] * 2]
    scored = [{"prompt": "the cat", "responses": [" sees it ,", " sees"], "scores": [1.0, 0.0]}]
    (row,), _ = make_rows(scored, Pairing(), {})
    assert row["prompt"] + row["chosen"] == "the cat sees it ,"


def test_rows_are_read_by_the_trainer_with_where_they_come_from():
    scored = [{"prompt": "the cat ", "responses": ["sees", "a dog"], "scores": [1.0, 2.0]}]
    (row,), counted = make_rows(scored, Pairing(), {"model": "m", "judge": "length"})
    assert (row["chosen"], row["rejected"], row["score_chosen"], row["judge"]) == ("a dog", "sees", 2.0, "length")
    assert counted.longer_chosen[0] == 1.0
    (ranking,), _ = make_rows(scored, Pairing("ranking"), {"model": "m"})
    for made in (row, ranking):
        dataset, _ = prepare_preference_dataset([made], make_tokenizer(), TokenizationSettings())
        assert len(dataset) == 1


def made(tmp_path, prompts, judge, progress=lambda done: None):
    model, tokenizer = make_llama(), make_tokenizer()
    path = tmp_path / "samples.jsonl"
    return generate_scored(model, tokenizer, prompts, judge, SAMPLING, path, key={"model": "m"}, progress=progress)


PROMPTS = ["the cat ", "a dog sees the small ", "today ", "the old river ", "never "]


def test_a_run_that_was_stopped_goes_on_with_the_same_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 2)
    whole = made(tmp_path / "whole", PROMPTS, make_judge("length"))

    def stop(done):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "stopped", PROMPTS, make_judge("length"), stop)
    path = tmp_path / "stopped" / "samples.jsonl"
    path.write_text(path.read_text()[:-7])  # killed while it wrote
    calls = []

    def judge(prompts, completions):
        calls.append(len(completions))
        return [float(len(said)) for said in completions]

    again = made(tmp_path / "stopped", PROMPTS, judge)
    assert [line["responses"] for line in again] == [line["responses"] for line in whole]
    assert calls == [6, 3]  # the first chunk was there


def test_samples_of_another_run_are_refused(tmp_path):
    made(tmp_path, PROMPTS[:2], make_judge("length"))
    with pytest.raises(ValueError, match=r"model must be 'm', as in .*, got 'another'; delete the file"):
        generate_scored(
            make_llama(),
            make_tokenizer(),
            PROMPTS[:2],
            make_judge("length"),
            SAMPLING,
            tmp_path / "samples.jsonl",
            key={"model": "another"},
        )


def test_progress_is_told_after_every_batch_of_a_chunk(tmp_path):
    """32 prompts may take minutes."""
    told = []
    made(tmp_path, PROMPTS, make_judge("length"), told.append)
    assert told == [1, 2, 4, 5, 5]  # 3 responses to each of 5 prompts, 4 at a time; 5 again when they are scored


def test_responses_without_an_end_are_counted(monkeypatch):
    """Trained on, they teach the model to stop in mid-sentence."""
    tokenizer, model = make_tokenizer(), make_llama()
    drawn = iter([[7, 8, 9], [7, 8, tokenizer.eos_token_id], [7, tokenizer.eos_token_id], [9, 8, 7]])
    monkeypatch.setattr(generate, "generate_ids", lambda model, prompts, **kwargs: [next(drawn) for _ in prompts])
    first, second = generate.sample(model, tokenizer, ["the ", "a "], Sampling(2, 3), seed=0)
    assert (first.num_cut, second.num_cut) == (1, 1)
    scored = [
        {"prompt": "the ", "responses": of.texts, "scores": [1.0, 2.0], "num_cut": of.num_cut} for of in (first, second)
    ]
    made_ = summary_of(scored, [], make_rows(scored, Pairing(), {})[1])
    assert made_.num_cut == 2
    assert made_.as_facts()["cut_share"] == 0.5


@pytest.mark.parametrize(
    ("judge", "word"),
    [(lambda prompts, completions: [1.0], "a score for each of 6"), (lambda p, c: ["good"] * 6, "numbers or None")],
)
def test_a_judge_that_gives_nonsense_is_refused(tmp_path, judge, word):
    with pytest.raises(ValueError, match=word):
        made(tmp_path, PROMPTS[:2], judge)


def test_prompts_of_a_column_or_of_any_form_each_once():
    pair = {"prompt": "p ", "chosen": "a", "rejected": "b"}
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert read_prompts([{"prompt": "x"}, {"prompt": "x"}, pair, chat]) == ["x", "p ", chat["messages"][:1]]
    with pytest.raises(ValueError, match="prompts must hold at least one prompt"):
        read_prompts([])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (Sampling(num_responses=1), "num_responses must be at least 2"),
        (Sampling(temperature=0.0), "temperature must be > 0"),
        (Sampling(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (Pairing("best"), "pairs must be one of"),
        (Pairing(margin=-1.0), "margin must be >= 0"),
        (Pairing("ranking", balance_lengths=True), "balance_lengths must be off"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        settings.check()


def test_lines_hold_prompt_responses_and_scores(tmp_path):
    made(tmp_path, PROMPTS[:1], make_judge("length"))
    head, line = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert head["settings"]["model"] == "m"
    assert head["settings"]["max_new_tokens"] == SAMPLING.max_new_tokens
    assert set(line) == {"number", "prompt", "responses", "num_cut", "scores"}
    assert line["scores"] == [float(len(said)) for said in line["responses"]]


def test_prompts_of_messages_are_rendered_with_the_variables_of_the_template(monkeypatch):
    said = "{{ messages[-1]['content'] }}"
    template = f"{{% if short %}}{said}{{% else %}}<user> {said} <assistant>{{% endif %}}"
    tokenizer, prompt = make_tokenizer(chat_template=template), [{"role": "user", "content": "the cat"}]
    whole, short = (prompt_ids(tokenizer, prompt, kwargs) for kwargs in (None, {"short": True}))
    assert whole == [4, *short, 5]  # <user> and <assistant>
    asked = []
    monkeypatch.setattr(generate, "generate_ids", lambda model, ids, **options: asked.append(ids) or ids)
    sample_ids(make_llama(), tokenizer, [prompt], replace(SAMPLING, chat_template_kwargs={"short": True}), 0)
    assert asked == [[short] * SAMPLING.num_responses]
