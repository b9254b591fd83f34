"""Every adapter on a row of the schema that its dataset is published with; the ones at hand on the file itself."""

import json
from contextlib import suppress

import pytest
from tiny_tokenizers import byte_level_tokenizer

from fastdpo.data.forms import ranked_row
from fastdpo.data.forms.adapters.building import html_text, transcript_messages
from fastdpo.data.forms.formats import FORMAT_NAMES, choose_format, preference_row, sft_row
from fastdpo.data.prepare import group_from_columns, one_prompt_a_row, prepare_preference_dataset
from fastdpo.data.sources.loading import load_preference_dataset, raw_example
from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.data.values import BadRow


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


SHP = {
    "post_id": "itpf",
    "domain": "askacademia_train",
    "upvote_ratio": 0.98,
    "history": "May I ask?",
    "c_root_id_A": "a",
    "c_root_id_B": "b",
    "created_at_utc_A": 1,
    "created_at_utc_B": 2,
    "score_A": 6,
    "score_B": 14,
    "human_ref_A": "No.",
    "human_ref_B": "Yes.",
    "labels": 0,
    "seconds_difference": 1.0,
    "score_ratio": 2.3,
}
PAIRED = {"qid": 1, "question": "How?", "date": "2010", "metadata": [], "response_j": "So.", "response_k": "No."}
TLDR = {
    "info": {"id": "t3", "post": "I like it.", "title": "Me", "subreddit": "tifu", "site": None, "article": None},
    "summaries": [{"text": " Dull.", "policy": "sup1", "note": None}, {"text": "Short.", "policy": "ref", "note": ""}],
    "choice": 1,
    "worker": "w",
    "batch": "b",
    "split": "train",
    "extra": {"confidence": None},
}
HELPSTEER2 = {
    "split": "train",
    "prompt": "c#\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nmore",
    "response_1": "One.",
    "response_2": "Two.",
    "preference_strength": -2,
    "preference_statement": "Response 1 is better",
    "preference_elaboration": "",
    "three_most_similar_preferences": [],
    "all_preferences_unprocessed": [],
}
HELPSTEER3 = {
    "domain": "general",
    "language": "english",
    "context": [user("Hi?")],
    "response1": "One.",
    "response2": "Two.",
    "overall_preference": 1,
    "individual_preference": [],
}
ORCA = {"system": "Be kind.", "question": "Hi?", "chosen": "Hello!", "rejected": "Go."}
DISTILABEL_ORCA = {"system": "", "input": "Hi?", "chosen": "Hello!", "rejected": "Go.", "rating": [9, 4], "status": "x"}
BE_KIND = {"role": "system", "content": "Be kind."}
ORCA_IN_MESSAGES = {**ORCA, "chosen": [said("Hello!")], "rejected": [said("Go.")]}
ORCA_IN_CONVERSATIONS = {
    **ORCA,
    "chosen": [BE_KIND, user("Hi?"), said("Hello!")],
    "rejected": [BE_KIND, user("Hi?"), said("Go.")],
}
ALPACA = {"instruction": "Add.", "input": "1", "system": "Be kind.", "history": [], "chosen": "2", "rejected": "3"}
SHARE_GPT = {
    "conversations": [{"from": "human", "value": "Hi?"}],
    "chosen": [user("Hi?"), said("Hello!")],  # where it says the question again, it is not asked twice
    "rejected": [user("Hi?"), said("Go.")],
}
BINARIZED = {
    "prompt": "Hi?",
    "prompt_id": "0f",
    "chosen": [user("Hi?"), said("Hello!")],
    "rejected": [user("Hi?"), said("Go.")],
    "messages": [user("Hi?"), said("Hello!")],
    "score_chosen": 8.0,
    "score_rejected": 6.5,
}
EXPLICIT = {"prompt": "Hi?", "chosen": "Hello!", "rejected": "Go."}

PAIRS = [
    ("shp", SHP, [user("May I ask?")], [said("Yes.")], [said("No.")]),
    ("stack_exchange", PAIRED, [user("How?")], [said("So.")], [said("No.")]),
    ("tldr", TLDR, "SUBREDDIT: r/tifu\n\nTITLE: Me\n\nPOST: I like it.\n\nTL;DR:", " Short.", " Dull."),
    ("helpsteer", HELPSTEER2, [user("c#"), said("Yes?"), user("more")], [said("One.")], [said("Two.")]),
    ("helpsteer", HELPSTEER3, [user("Hi?")], [said("Two.")], [said("One.")]),
    ("orca", ORCA, [BE_KIND, user("Hi?")], [said("Hello!")], [said("Go.")]),
    ("orca", DISTILABEL_ORCA, [user("Hi?")], [said("Hello!")], [said("Go.")]),
    ("orca", ORCA_IN_CONVERSATIONS, [BE_KIND, user("Hi?")], [said("Hello!")], [said("Go.")]),
    ("orca", ORCA_IN_MESSAGES, [BE_KIND, user("Hi?")], [said("Hello!")], [said("Go.")]),
    ("llms_from_scratch", ALPACA, "Be kind.\n\n### Instruction:\nAdd.\n\n### Input:\n1\n\n### Response:\n", "2", "3"),
    ("llama_factory", SHARE_GPT, [user("Hi?")], [said("Hello!")], [said("Go.")]),
    ("ultrafeedback_binarized", BINARIZED, [user("Hi?")], [said("Hello!")], [said("Go.")]),
    ("explicit", EXPLICIT, "Hi?", "Hello!", "Go."),
]


@pytest.mark.parametrize(("name", "example", "prompt", "chosen", "rejected"), PAIRS)
@pytest.mark.parametrize("named", [True, False])
def test_a_pair_of_a_published_dataset_is_read_by_name_and_by_its_columns(
    name, example, prompt, chosen, rejected, named
):
    row = preference_row(example, name if named else "auto")
    assert (row.prompt, row.responses, row.preferences) == (prompt, (chosen, rejected), ((0, 1),))


def test_labels_and_strengths_of_the_other_sign_turn_the_pair_round():
    assert preference_row({**SHP, "labels": 1, "score_A": 30}).responses[0] == [said("No.")]
    assert preference_row({**HELPSTEER2, "preference_strength": 1}).responses[0] == [said("Two.")]
    assert preference_row({**HELPSTEER3, "overall_preference": -3}).responses[0] == [said("One.")]
    assert preference_row({**TLDR, "choice": 0}).responses == (" Dull.", " Short.")


def test_articles_of_the_tldr_evaluation_have_no_subreddit():
    info = {"id": "x", "post": None, "title": "News", "subreddit": None, "site": "cnn", "article": "It rained."}
    assert preference_row({**TLDR, "info": info}).prompt == "Title: News\n\nArticle: It rained.\n\nTL;DR:"


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ({**SHP, "score_B": 11}, "score ratio below 2"),
        ({**SHP, "score_A": -3, "score_B": 1}, "score ratio below 2"),  # both count as 1
        ({**HELPSTEER2, "preference_strength": 0}, "no response is better than another"),
        ({**HELPSTEER3, "overall_preference": 0}, "no response is better than another"),
        ({**TLDR, "choice": None}, "choice does not name one of the two summaries"),
        ({**SHP, "labels": None}, "no response is better than another"),
        (
            {**ALPACA, "history": [{"role": "tool", "content": "3"}]},
            "earlier turns of the role 'tool' beside an instruction",
        ),
    ],
)
def test_ties_and_nearly_equal_scores_are_left_out_with_a_reason(example, reason):
    with pytest.raises(BadRow) as caught:
        preference_row(example)
    assert caught.value.reason == reason


def test_a_reddit_pair_counts_from_a_ratio_of_two():
    assert preference_row({**SHP, "score_B": 12}).responses[0] == [said("Yes.")]


def completion(text, score, overall):
    return {
        "annotations": {},
        "custom_system_prompt": "You are.",
        "model": "m",
        "principle": "p",
        "response": text,
        "critique": "c",
        "fine-grained_score": score,
        "overall_score": overall,
    }


ULTRAFEEDBACK = {
    "source": "s",
    "instruction": "Hi?",
    "models": ["m"] * 4,
    "completions": [completion("c", 2.0, 10.0), completion("a", 4.75, 1.0), completion("b", 4.0, 7.5)],
    "correct_answers": [],
    "incorrect_answers": [],
}
NECTAR = {
    "prompt": "\n\nHuman: Hi? \n\nAssistant: Yes? \n\nHuman: Sing! \n\nAssistant: ",
    "answers": [{"answer": f"la{rank}", "model": "m", "rank": float(rank)} for rank in (3, 1, 2, 7, 5, 4, 6)],
    "turns": 2,
    "num_responses": 7,
    "source": ["lmsys-chat-1m"],
    "good_natured": True,
}
FINE_GRAINED = {
    "question": "Why?",
    "passages": [["It", "It rained.", "It poured."]],
    "gold": "g",
    **{f"prediction {i}": text for i, text in enumerate(("one", "two", "three", "four"), start=1)},
    "feedback": {},
    "preference": [2, 0, 1, 0, 1, 0],  # 2 before 1, 1 before 4, 2 before 4
}
STACK = {
    "qid": 5,
    "question": "<p>What is <code>x</code> &amp; y?</p>",
    "answers": [
        {
            "answer_id": 1,
            "author": "n",
            "pm_score": 1,
            "selected": False,
            "text": "<p>Two</p>\n<pre><code>y\n</code></pre>",
        },
        {"answer_id": 2, "author": "n", "pm_score": 3, "selected": True, "text": "<ul><li>One</li></ul>"},
        {"answer_id": 3, "author": "n", "pm_score": 1, "selected": False, "text": "<p>Three</p>"},
    ],
    "date": "2010",
    "metadata": [],
}


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (
            {**STACK, "answers": None},
            "the row does not fit the format stack_exchange (TypeError: 'NoneType' object is not iterable)",
        ),
        (
            {**ULTRAFEEDBACK, "completions": [{"response": "a"}]},
            "the row does not fit the format ultrafeedback (KeyError: 'fine-grained_score')",
        ),
        (
            {**NECTAR, "answers": [{"answer": "a", "rank": None}]},
            "the row does not fit the format nectar (TypeError: bad operand",
        ),
        ({**TLDR, "info": None}, "the row does not fit the format tldr (AttributeError: "),
    ],
)
def test_a_row_that_holds_something_else_than_its_format_is_bad_and_the_others_are_not(example, reason):
    with pytest.raises(BadRow) as caught:
        preference_row(example)
    assert caught.value.reason.startswith(reason)


def test_ultrafeedback_is_one_group_ranked_by_the_mean_of_its_ratings():
    row = preference_row(ULTRAFEEDBACK)
    assert row.prompt == [user("Hi?")]
    assert row.responses == ([said("a")], [said("b")], [said("c")])
    assert row.preferences == ((0, 1), (0, 2), (1, 2))


def test_nectar_is_one_group_of_seven_with_all_its_pairs():
    row = preference_row(NECTAR)
    assert row.prompt == [user("Hi?"), said("Yes?"), user("Sing!")]
    assert row.responses == tuple([said(f"la{rank}")] for rank in range(1, 8))
    assert row.preferences == tuple((i, j) for i in range(7) for j in range(i + 1, 7))


def test_stack_exchange_answers_are_ranked_by_votes_and_equal_votes_make_no_pair():
    row = preference_row(STACK)
    assert row.prompt == [user("What is x & y?")]
    assert row.responses == ([said("- One")], [said("Two\n\ny")], [said("Three")])
    assert row.preferences == ((0, 1), (0, 2))


def test_many_answers_of_a_question_are_thinned_out_to_five_from_the_best_to_the_worst():
    answers = [{**STACK["answers"][0], "pm_score": score, "text": f"<p>{score}</p>"} for score in range(30)]
    row = preference_row({**STACK, "answers": answers})
    assert [response[0]["content"] for response in row.responses] == ["29", "22", "15", "7", "0"]
    assert row.preferences == tuple((i, j) for i in range(5) for j in range(i + 1, 5))
    assert len(preference_row({**STACK, "answers": answers[:5]}).preferences) == 10


def test_the_choice_of_each_two_predictions_is_kept_as_it_was_made():
    row = preference_row(FINE_GRAINED)
    assert row.prompt == [user("It rained. It poured.\n\nWhy?")]
    assert row.responses == tuple([said(text)] for text in ("one", "two", "four"))
    assert row.preferences == ((1, 0), (0, 2), (1, 2))
    with pytest.raises(BadRow, match="preference"):
        preference_row({**FINE_GRAINED, "preference": [1, 2]})


def test_sft_takes_the_best_answer_of_a_group():
    assert sft_row(NECTAR).responses == ([said("la1")],)
    assert sft_row(FINE_GRAINED).responses == ([said("two")],)


def test_html_becomes_text():
    assert html_text("<p>a<br>b</p><p>c &lt; d</p>") == "a\nb\n\nc < d"


# --- formats in which a row of the file is not a prompt ---

SCORES = {"correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 2}
HELPSTEER = [
    {"prompt": "Hi?", "response": "Go.", "helpfulness": 1, **SCORES},
    {"prompt": "Hi?", "response": "Hello!", "helpfulness": 4, **SCORES},
    {"prompt": "1+1?", "response": "2", "helpfulness": 3, **SCORES},
    {"prompt": "1+1?", "response": "II", "helpfulness": 3, **SCORES},
]
TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "t",
        "text": "Hi?",
        "role": "prompter",
        "replies": [
            {"message_id": "a", "text": "Go.", "role": "assistant", "rank": 1, "replies": []},
            {
                "message_id": "b",
                "text": "Hello!",
                "role": "assistant",
                "rank": 0,
                "replies": [{"message_id": "c", "text": "Bye.", "role": "prompter", "rank": None, "replies": []}],
            },
            {"message_id": "d", "text": "spam", "role": "assistant", "rank": 2, "deleted": True, "replies": []},
        ],
    },
}
MESSAGES = [  # oasst1: the same tree, a message a row
    {"message_id": "t", "parent_id": None, "text": "Hi?", "role": "prompter", "rank": None, "message_tree_id": "t"},
    {"message_id": "a", "parent_id": "t", "text": "Go.", "role": "assistant", "rank": 1.0, "message_tree_id": "t"},
    {"message_id": "b", "parent_id": "t", "text": "Hello!", "role": "assistant", "rank": 0.0, "message_tree_id": "t"},
    {"message_id": "c", "parent_id": "b", "text": "Bye.", "role": "prompter", "rank": None, "message_tree_id": "t"},
]
WHOLE = TokenizationSettings(max_length=None)


@pytest.mark.parametrize(
    ("rows", "name", "num_rows", "dropped"),
    [
        (HELPSTEER, "helpsteer", 2, {"no response is better than another": (1,)}),
        ([TREE], "open_assistant", 1, {}),
        (MESSAGES, "open_assistant", 1, {}),
    ],
)
def test_answers_and_trees_become_one_group_for_each_prompt(bos_tokenizer, rows, name, num_rows, dropped):
    for dataset_format in (name, "auto"):
        settings = TokenizationSettings(max_length=None, dataset_format=dataset_format)
        prepared, report = prepare_preference_dataset(rows, bos_tokenizer, settings)
        assert (report.num_rows, report.dropped) == (num_rows, dropped)
        (group,) = map(group_from_columns, prepared)
        assert bos_tokenizer.decode(group.prompt_ids).endswith("user\nHi?<|im_end|>\n<|im_start|>assistant\n")
        assert [bos_tokenizer.decode(ids) for ids in group.responses] == ["Hello!<|im_end|>\n", "Go.<|im_end|>\n"]


@pytest.mark.parametrize("rows", [[*HELPSTEER, {"prompt": "Hi?"}], [TREE, {**TREE, "prompt": None}]])
def test_answers_that_cannot_be_put_together_by_prompt_are_refused(plain_tokenizer, rows):
    with pytest.raises(ValueError, match=r"dataset rows must .*got another form"):
        prepare_preference_dataset(rows, plain_tokenizer, WHOLE)


def test_ranked_rows_of_ones_own_are_a_group():
    row = preference_row({"prompt": "Q", "responses": ["c", "a", "b"], "scores": [0.1, 3, 2]})
    assert (row.prompt, row.responses, row.preferences) == ("Q", ("a", "b", "c"), ((0, 1), (0, 2), (1, 2)))


def test_answers_without_text_or_score_and_repeated_ones_are_no_part_of_a_group():
    row = ranked_row("Q", ["b", " ", "a", "x", "a"], [1, 5, 3, None, 2])
    assert (row.responses, row.preferences) == (("a", "b"), ((0, 1),))
    with pytest.raises(BadRow, match="no response is better"):
        ranked_row("Q", ["a", "a"], [1, 2])


def test_a_group_loses_the_pairs_that_truncation_makes_equal_and_keeps_the_others(plain_tokenizer):
    example = {"prompt": "", "responses": ["the cat sat on", "the dog", "the cat sat off"], "scores": [3, 2, 1]}
    whole, _ = prepare_preference_dataset([example], plain_tokenizer, WHOLE)
    assert [tuple(pair) for pair in whole[0]["preferences"]] == [(0, 1), (0, 2), (1, 2)]
    length = len(plain_tokenizer("the cat sat")["input_ids"])
    cut, report = prepare_preference_dataset([example], plain_tokenizer, TokenizationSettings(max_length=length))
    assert [tuple(pair) for pair in cut[0]["preferences"]] == [(0, 1), (1, 2)]
    assert report.lines()[0] == "kept 1 of 1 prompts with 2 pairs of answers"


# --- choosing a format ---


def test_every_format_has_a_test_here_or_among_the_forms():
    tested = {name for name, *_ in PAIRS} | {"helpsteer", "open_assistant", "ultrafeedback", "nectar", "ranked"}
    on_files = {"hh", "hh_chat", "fine_grained_rlhf", "llama_factory", "llms_from_scratch"}
    forms = {"winner", "messages_rejected", "implicit", "prompt_completion", "messages", "sharegpt", "alpaca", "text"}
    assert set(FORMAT_NAMES) == tested | on_files | forms


def test_a_named_format_that_lacks_columns_says_which():
    with pytest.raises(ValueError, match=r"'nectar' needs the columns prompt, answers, got \['chosen', 'prompt'"):
        preference_row(EXPLICIT, "nectar")
    with pytest.raises(ValueError, match="did you mean 'nectar'"):
        TokenizationSettings(dataset_format="nectr")
    with pytest.raises(ValueError, match=r"dataset_format must .*got 'alpaca'"):
        preference_row({"instruction": "a", "output": "b"}, "alpaca")


def test_a_question_is_the_prompt_unless_the_answers_are_said_to_hold_theirs():
    example = {"question": "Why?", "chosen": "So.", "rejected": "No."}
    assert preference_row(example).prompt == [user("Why?")]
    implicit = preference_row(example, "implicit")
    assert (implicit.prompt, implicit.responses, implicit.columns["question"]) == ("", ("So.", "No."), "unread")
    repeated = {"question": "Why?", "chosen": [user("Why?"), said("So.")], "rejected": [user("Why?"), said("No.")]}
    assert preference_row(repeated).prompt == [user("Why?")]


@pytest.mark.parametrize("example", [ORCA, SHP, ALPACA, SHARE_GPT, STACK, NECTAR])
def test_columns_that_somebody_added_for_trl_count_more_than_those_of_the_dataset(example):
    assert preference_row({**example, **EXPLICIT}).prompt == "Hi?"


def test_squad_like_rows_are_not_taken_for_stack_exchange():
    with pytest.raises(ValueError, match="dataset must have the columns"):
        choose_format({"question": "a", "answers": {"text": ["b"]}, "context": "c"}, "auto", is_sft=False)


# --- transcripts ---


def test_messages_become_transcripts_where_the_tokenizer_has_no_chat_template(plain_tokenizer):
    prepared, report = prepare_preference_dataset([ORCA], plain_tokenizer, WHOLE)
    group = group_from_columns(prepared[0])
    assert plain_tokenizer.decode(group.prompt_ids) == "Be kind.\n\nHuman: Hi?\n\nAssistant:"
    assert [plain_tokenizer.decode(ids) for ids in group.responses] == [" Hello!</s>", " Go.</s>"]
    assert any('"Human: ... Assistant: ..."' in line for line in report.lines())


def test_turns_of_a_transcript_become_messages():
    text = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nstill me\n\nAssistant: and again\n\nHuman: \n\nAssistant:"
    assert transcript_messages(text) == [user("Hi"), said("Yes?\n\nstill me\n\nand again")]
    with pytest.raises(BadRow, match="not a transcript"):
        transcript_messages("Hi Human: there")


def test_hh_as_messages_goes_through_the_chat_template(shared_data, bos_tokenizer):
    dataset = load_preference_dataset(shared_data / "hh-rlhf-harmless-test-benign44.jsonl")
    settings = TokenizationSettings(max_length=None, dataset_format="hh_chat")
    prepared, report = prepare_preference_dataset(dataset, bos_tokenizer, settings)
    assert report.num_kept == 44
    for row, example in zip(prepared, dataset, strict=True):
        group = group_from_columns(row)
        text = bos_tokenizer.decode(list(group.prompt_ids) + list(group.responses[0]))
        assert "Human:" not in text
        turns = example["chosen"].replace("\n\nHuman:", "\n\nAssistant:").split("\n\nAssistant:")
        assert all(turn.strip() in text for turn in turns)


# --- files at hand ---


@pytest.mark.parametrize(
    ("file", "name", "num_prompts", "num_pairs"),
    [
        ("hh-rlhf-harmless-test-benign44.jsonl", "hh", 44, 44),
        ("finegrainedrlhf-dev-feedback.json.gz", "fine_grained_rlhf", 488, 2616),
        ("open-assistant-en-100-tree.jsonl.gz", "open_assistant", 212, 754),
        ("llama-factory-dpo-en-demo.json", "llama_factory", 300, 300),
        ("llama-factory-v1-dpo-demo.jsonl", "llama_factory", 10, 10),
        ("llms-from-scratch-preference.json", "llms_from_scratch", 1100, 1100),
    ],
)
def test_files_at_hand_give_the_pairs_that_are_known_to_be_in_them(shared_data, file, name, num_prompts, num_pairs):
    dataset = load_preference_dataset(shared_data / file)
    rows = []
    for example in one_prompt_a_row(dataset, name, is_sft=False):
        with suppress(BadRow):  # only ties, or there are too few
            rows.append(preference_row(raw_example(example), name))
    assert (len(rows), sum(len(row.preferences) for row in rows)) == (num_prompts, num_pairs)
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    few = dataset.select(range(5))
    unnamed, _ = prepare_preference_dataset(few, tokenizer, WHOLE)
    named = TokenizationSettings(max_length=None, dataset_format=name)
    assert list(unnamed) == list(prepare_preference_dataset(few, tokenizer, named)[0])


def test_open_assistant_answers_are_in_the_order_of_their_ranks(shared_data):
    import gzip

    from fastdpo.data.forms.adapters.groups import open_assistant_trees

    with gzip.open(shared_data / "open-assistant-en-100-tree.jsonl.gz", "rt") as lines:
        trees = [json.loads(line) for line in lines]
    rows = list(open_assistant_trees(trees))
    rank_of = {}

    def walk(message):
        rank_of[message["text"]] = message.get("rank")
        for reply in message["replies"]:
            walk(reply)

    for tree in trees:
        walk(tree["prompt"])
    for row in map(preference_row, rows):
        ranks = [rank_of[response[0]["content"]] for response in row.responses]
        assert ranks == list(range(len(ranks)))


def test_columns_beside_single_answers_are_held_to_the_ledger_too(plain_tokenizer):
    _, report = prepare_preference_dataset([{**row, "source": "web"} for row in HELPSTEER], plain_tokenizer, WHOLE)
    assert report.unread == ("source",)
    with pytest.raises(ValueError, match="columns 'draft'"):
        prepare_preference_dataset([*HELPSTEER[:1], {**HELPSTEER[1], "draft": "a text"}], plain_tokenizer, WHOLE)
    with pytest.raises(ValueError, match="columns 'system of single answers'"):  # whose row is not known any more
        prepare_preference_dataset([{**row, "system": "Be kind."} for row in HELPSTEER], plain_tokenizer, WHOLE)


@pytest.mark.parametrize(
    ("example", "unread"),
    [
        (SHP, {"post_id", "domain", "upvote_ratio", "seconds_difference", "score_ratio", "created_at_utc_A"}),
        (TLDR, {"worker", "batch", "split"}),
        (HELPSTEER2, {"preference_statement", "split"}),
        (BINARIZED, {"prompt_id", "score_chosen"}),
    ],
)
def test_what_an_adapter_does_not_read_is_named(example, unread):
    columns = preference_row(example).columns
    assert unread <= {name for name, how in columns.items() if how == "unread"}


def test_a_system_prompt_that_somebody_added_to_a_published_dataset_stands_in_front():
    assert preference_row({**SHP, "system": "Be kind."}).prompt == [BE_KIND, user("May I ask?")]
    assert preference_row({**TLDR, "system": "Be kind."}).prompt.startswith("Be kind.\n\nSUBREDDIT: r/tifu")
