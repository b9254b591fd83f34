"""Rows as people and other trainers write them, each read as what it says: decoded, or refused by name."""

import json

import datasets
import pytest
from covering import every_pair
from datasets import Dataset, Features, List, Value
from tiny_tokenizers import CHATML, byte_level_tokenizer

from fastdpo.data.forms.formats import preference_row, sft_row
from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset
from fastdpo.data.sources.loading import (
    dataset_from_rows,
    load_preference_dataset,
    raw_example,
    stream_preference_dataset,
)
from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.data.values import BadRow

WHOLE = TokenizationSettings(max_length=None)
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi?"}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "Go."}
TEXTS = {"chosen": "Hello!", "rejected": "Go."}
ONES = {"chosen": GOOD, "rejected": BAD}
LISTS = {"chosen": [GOOD], "rejected": [BAD]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "integer", "default": None}}}}
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
)


def chat(*messages):
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"


def turn(role, content):
    return {"role": role, "content": content}


ASKED = chat(USER)
ASKED_KINDLY = chat(SYSTEM, USER)
ASKED_AGAIN = chat(turn("user", "Who?"), turn("assistant", "Me."), USER)
ANSWERS = ["Hello!<|im_end|>\n", "Go.<|im_end|>\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(special=("<|im_start|>", "<|im_end|>"), chat_template=WITH_TOOLS)


def decoded(rows, tokenizer, settings=WHOLE):
    """(prompt, responses) of every kept row as text, and the report."""
    prepared, report = prepare_preference_dataset(rows, tokenizer, settings)
    groups = map(group_from_columns, prepared)
    return [(tokenizer.decode(g.prompt_ids), [tokenizer.decode(r) for r in g.responses]) for g in groups], report


def only(row, tokenizer):
    (result,), _ = decoded([row], tokenizer)
    return result


# --- columns that lead up to the answers ---

CONTEXTS = {
    "messages": ({"messages": [USER]}, ASKED),
    "messages with a system prompt": ({"messages": [SYSTEM, USER]}, ASKED_KINDLY),
    "conversations": ({"conversations": [{"from": "human", "value": "Hi?"}]}, ASKED),
    "conversation of pairs": ({"conversation": [{"human": "Who?", "assistant": "Me."}, {"human": "Hi?"}]}, ASKED_AGAIN),
    "dialogue": ({"dialogue": ["Who?", "Me.", "Hi?"]}, ASKED_AGAIN),
    "question": ({"question": "Hi?"}, ASKED),
    "query and history": ({"query": "Hi?", "history": [["Who?", "Me."]]}, ASKED_AGAIN),
    "prompt and history": ({"prompt": "Hi?", "history": [["Who?", "Me."]]}, ASKED_AGAIN),
    "history as text": ({"prompt": "Hi?", "history": "[['Who?', 'Me.']]"}, ASKED_AGAIN),
    "history as objects": ({"prompt": "Hi?", "history": [{"question": "Who?", "answer": "Me."}]}, ASKED_AGAIN),
    "history as messages": (
        {"prompt": [USER], "history": [turn("user", "Who?"), turn("assistant", "Me.")]},
        ASKED_AGAIN,
    ),
    "history that asks already": ({"prompt": "Hi?", "history": [USER]}, None),
    "system and prompt": ({"system": "Be kind.", "prompt": [USER]}, ASKED_KINDLY),
    "system_prompt and messages": ({"system_prompt": "Be kind.", "messages": [USER]}, ASKED_KINDLY),
    "system that stands there": ({"system": "Be kind.", "prompt": [SYSTEM, USER]}, ASKED_KINDLY),
    "passage and messages": ({"context": "It is.", "messages": [USER]}, chat(turn("user", "It is.\n\nHi?"))),
}


@pytest.mark.parametrize("answers", [TEXTS, ONES, LISTS], ids=["text", "message", "messages"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_context_is_read_whatever_its_column_is_called(tokenizer, name, answers):
    columns, prompt = CONTEXTS[name]
    if prompt is None:  # nothing but the prompt: text stays text
        prompt, ends = ("Hi?", ["Hello!</s>", "Go.</s>"]) if answers is TEXTS else (ASKED, ANSWERS)
    else:
        ends = ANSWERS
    assert only({**columns, **answers}, tokenizer) == (prompt, ends)


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"context": "Hi?"}, "Hi?"),
        ({"context": "It is.", "prompt": "Hi?"}, "It is.\n\nHi?"),
        ({"system": "Be kind.", "prompt": "Hi?"}, "Be kind.\n\nHi?"),
        ({"system": "Be kind.", "prompt": "Be kind.\n\nHi?"}, "Be kind.\n\nHi?"),  # stands there already
        ({"Prompt": "Hi?"}, "Hi?"),
        ({"history": "Who? Me.", "prompt": "Hi?"}, "Who? Me.\n\nHi?"),
    ],
)
def test_text_stays_text_with_what_leads_up_to_it_in_front(tokenizer, columns, prompt):
    assert only({**columns, **TEXTS}, tokenizer) == (prompt, ["Hello!</s>", "Go.</s>"])


def test_a_system_prompt_stands_before_whole_conversations(tokenizer):
    row = {"system": "Be kind.", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert only(row, tokenizer) == (ASKED_KINDLY, ANSWERS)
    with pytest.raises(BadRow, match="system prompt"):
        preference_row({**row, "chosen": [turn("system", "Be rude."), USER, GOOD]})


def test_tools_calls_and_null_contents_of_a_context_reach_the_template(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"x": 1}}]}
    messages = [USER, call, {"role": "tool", "content": {"temp": 20}}]
    said = [USER, turn("assistant", json.dumps(call["tool_calls"])), turn("tool", '{"temp": 20}')]
    expected = f"{json.dumps([TOOL])}\n{chat(*said)}"
    for answers in (TEXTS, ONES, LISTS):
        assert only({"messages": messages, "tools": [TOOL], **answers}, tokenizer) == (expected, ANSWERS)
    text = {"prompt": "Hi?", "tools": [TOOL], **TEXTS}  # tools have no place in text
    assert only(text, tokenizer) == (f"{json.dumps([TOOL])}\n{ASKED}", ANSWERS)


def test_messages_that_hold_the_chosen_answer_are_the_conversation_up_to_it(tokenizer):
    assert only({"messages": [USER, GOOD], **TEXTS}, tokenizer) == (ASKED, ANSWERS)
    before = [turn("user", "Who?"), GOOD]  # the same answer to another question
    row = {"messages": before, "prompt": "Hi?", **TEXTS}
    assert only(row, tokenizer)[0] == chat(*before, USER)


# --- columns that are not read ---


def test_metadata_is_listed_once_and_not_read(tokenizer):
    about = {
        "id": "a1",
        "source": "a page of the web with a long title",
        "chosen_model": "gpt-4",
        "score_chosen": "8.5",
        "language": "en",
        "margin": 2.5,
        "passed": True,
        "rejected-rationale": "It is " + "quite " * 20 + "rude.",
        "empty": "",
        "nothing": None,
    }
    _, report = decoded([{"prompt": "Hi?", **TEXTS, **about}] * 3, tokenizer)
    unread = "chosen_model, id, language, margin, passed, rejected-rationale, score_chosen, source"
    assert report.lines()[1] == f"columns not read: {unread}"


@pytest.mark.parametrize(
    "value", ["a text of its own", [USER, turn("assistant", "Yes.")], ["one", "two"], {"a": "b c"}]
)
def test_an_unknown_column_with_text_is_an_error_with_the_option_that_goes_on(tokenizer, value):
    row = {"prompt": "Hi?", **TEXTS, "foo": value, "bar": "more of it"}
    with pytest.raises(ValueError, match=r"columns 'foo' .*'bar' .*--columns ignore=foo,bar") as caught:
        decoded([row], tokenizer)
    assert not isinstance(caught.value, BadRow)
    settings = TokenizationSettings(max_length=None, columns="ignore=foo,bar")
    (kept,), report = decoded([row], tokenizer, settings)
    assert kept == ("Hi?", ["Hello!</s>", "Go.</s>"])
    assert report.unread == ("bar", "foo")


def test_a_conversation_is_no_metadata_whatever_its_column_is_called(tokenizer):
    with pytest.raises(ValueError, match="columns 'turns'"):
        decoded([{"prompt": "Hi?", **TEXTS, "turns": [USER, turn("assistant", "Yes.")]}], tokenizer)


def test_an_unknown_column_counts_wherever_it_is_first_filled(tokenizer):
    rows = [{"prompt": "Hi?", **TEXTS, "foo": None}, {"prompt": "Hi?", **TEXTS, "foo": "new"}]
    with pytest.raises(ValueError, match=r"'foo' \(new\).*\(dataset row 1"):
        decoded(rows, tokenizer)


def test_what_another_column_says_too_is_no_loss(tokenizer):
    row = {"prompt": "Hi?", **LISTS, "messages": [USER, GOOD], "chosen_copy": "Hello!"}
    (result,), report = decoded([row], tokenizer)
    assert result == (ASKED, ANSWERS)
    assert report.unread == ("chosen_copy",)


@pytest.mark.parametrize("written", ["text", "dict", "json"])
def test_columns_may_be_given_the_names_that_are_read_here(tokenizer, written):
    row = {"instruct": "Hi?", "good": "Hello!", "worst": "Go.", "foo": "a b", "info": {"lang": "en"}}
    columns = {"prompt": "instruct", "chosen": "good", "rejected": "worst", "ignore": ["foo", "info"]}
    given = {
        "text": "prompt=instruct, chosen=good,rejected=worst,ignore=foo,info",
        "dict": columns,
        "json": json.dumps(columns),
    }[written]
    settings = TokenizationSettings(max_length=None, columns=given)
    assert settings.columns == columns
    assert decoded([row], tokenizer, settings)[0] == [("Hi?", ["Hello!</s>", "Go.</s>"])]


def test_a_name_that_a_column_is_given_takes_it_from_the_column_that_had_it(tokenizer):
    row = {"prompt": "a template", "question": "Hi?", **TEXTS}
    settings = TokenizationSettings(max_length=None, columns={"prompt": "question"})
    (result,), report = decoded([row], tokenizer, settings)
    assert result[0] == "Hi?"
    assert report.unread == ("prompt (before)",)
    swapped = {"chosen": "Go.", "rejected": "Hello!", "prompt": "Hi?"}
    row = preference_row(swapped, columns={"chosen": "rejected", "rejected": "chosen"})
    assert row.responses == ("Hello!", "Go.")
    assert preference_row({"d": {"q": "Hi?"}, **TEXTS}, columns={"prompt": "d.q", "ignore": ["d"]}).prompt == "Hi?"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("promt=question", "did you mean 'prompt'"),
        ("question", "columns must .*got 'question'"),
        ("prompt=a,prompt=b", "'prompt' .*got 'prompt=a,prompt=b'"),
        ('{"prompt": ', "columns must .*got "),
        ({"prompt": ["a", "b"]}, r"'prompt' .*got \['a', 'b'\]"),
        (["prompt"], r"columns must .*got \['prompt'\]"),
        ({"prompt": "absent"}, "columns must .*'prompt'.* got 'absent'"),
    ],
)
def test_a_mapping_that_maps_nothing_is_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        preference_row({"question": "Hi?", **TEXTS}, columns=TokenizationSettings(columns=columns).columns)


# --- roles ---


@pytest.mark.parametrize(
    ("user", "assistant"),
    [
        ("Human", "GPT"),
        ("User", "Assistant"),
        ("prompter", "model"),
        (" human ", " gpt "),
        ("HUMAN", "chatbot"),
        ("input", "output"),
    ],
)
def test_names_of_speakers_become_the_roles_of_templates(tokenizer, user, assistant):
    row = {
        "prompt": [turn(user, "Hi?")],
        "chosen": [turn(assistant, "Hello!")],
        "rejected": [{"from": assistant, "value": "Go."}],
    }
    assert only(row, tokenizer) == (ASKED, ANSWERS)
    whole = {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}
    assert only(whole, tokenizer) == (ASKED, ANSWERS)


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("tool_call", "tool_response"),
        ("function_call", "observation"),
        ("Tool Call", "Tool Response"),
        ("gpt", "ipython"),
    ],
)
def test_calls_are_the_assistants_and_results_the_tools(call, result):
    messages = [USER, turn(call, '{"name": "add"}'), turn(result, "3"), GOOD]
    row = preference_row({"messages": messages, "rejected_response": "Go."})
    assert [m["role"] for m in row.prompt] == ["user", "assistant", "tool"]
    assert row.responses == ([GOOD], [BAD])


def test_developers_are_the_system(tokenizer):
    row = {"prompt": [turn("developer", "Be kind."), USER], **LISTS}
    assert only(row, tokenizer)[0] == ASKED_KINDLY


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("value", [[turn("user", "Yo.")], turn("user", "Yo."), [USER, turn("user", "Yo.")]])
def test_a_response_of_somebody_else_than_the_assistant_is_a_bad_row_by_that_name(side, value):
    with pytest.raises(BadRow, match="response without an assistant message"):
        preference_row({"prompt": [USER], **LISTS, side: value})


def test_an_unknown_role_is_a_bad_row_by_its_name(tokenizer):
    rows = [{"prompt": [USER], **LISTS}, {"prompt": [turn("moderator", "Hi?")], **LISTS}]
    kept, report = decoded(rows, tokenizer)
    assert (kept, report.dropped) == ([(ASKED, ANSWERS)], {"unknown role 'moderator'": (1,)})


# --- shapes of answers ---


def test_a_list_of_answers_is_one_preferred_to_each_of_several(tokenizer):
    row = preference_row({"prompt": "Hi?", "chosen": ["x"], "rejected": ["a", "b", "c"]})
    assert (row.prompt, row.responses, row.preferences) == ("Hi?", ("x", "a", "b", "c"), ((0, 1), (0, 2), (0, 3)))
    row = preference_row({"prompt": "Hi?", "chosen": ["x", "y"], "rejected": "a"})
    assert (row.responses, row.preferences) == (("x", "y", "a"), ((0, 2), (1, 2)))
    conversations = {"prompt": [USER], "chosen": [[GOOD]], "rejected": [[BAD], [turn("assistant", "No.")]]}
    row = preference_row(conversations)
    assert (row.responses, row.preferences) == (([GOOD], [BAD], [turn("assistant", "No.")]), ((0, 1), (0, 2)))
    mixed = only({"prompt": [USER], "chosen": "Hello!", "rejected": ["Go.", "No."]}, tokenizer)
    assert mixed == (ASKED, [*ANSWERS, "No.<|im_end|>\n"])


def test_answers_of_a_list_that_are_empty_repeated_or_chosen_too_make_no_pair():
    row = preference_row({"prompt": "Hi?", "chosen": ["x"], "rejected": ["a", "", None, "x", "a"]})
    assert (row.responses, row.preferences) == (("x", "a"), ((0, 1),))
    with pytest.raises(BadRow, match="chosen equals rejected"):
        preference_row({"prompt": "Hi?", "chosen": ["x"], "rejected": ["x", "x"]})
    with pytest.raises(BadRow, match="empty response"):
        preference_row({"prompt": "Hi?", "chosen": ["x"], "rejected": ["", " "]})


ENDS = [("response_a", "response_b"), ("output_1", "output_2"), ("answer_1", "answer_2"), ("responseA", "responseB")]


@pytest.mark.parametrize(
    *every_pair(
        columns=ENDS,
        label=["winner", "label", "preference", "better"],
        winner=[(True, 1), (False, 2), (True, "a"), (False, "B"), (False, "model_b")],
    ),
    ids=str,
)
def test_two_answers_and_a_winner_are_a_pair(columns, label, winner):
    first, value = winner
    row = preference_row({"prompt": "Hi?", columns[0]: "one", columns[1]: "two", label: value})
    assert (row.prompt, row.responses) == ("Hi?", ("one", "two") if first else ("two", "one"))


@pytest.mark.parametrize(
    ("value", "first"),
    [
        ({"winner": True}, True),
        ({"winner": False}, False),
        ({"winner": "[[A]]"}, True),
        ({"winner": "2"}, False),
        ({"winner": "response_b"}, False),
        ({"winner": "gpt-4", "model_a": "vicuna", "model_b": "gpt-4"}, False),
        ({"winner": 1.0}, True),
        ({"preference": [0.2, 0.8]}, False),
        ({"label": {"response_a": 3, "response_b": 1}}, True),
        ({"score_a": 3, "score_b": 4.5}, False),
        ({"response_a_score": 3, "response_b_score": 2}, True),
        ({"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}, False),
    ],
)
def test_winners_are_numbers_names_flags_and_scores(value, first):
    row = preference_row({"question": "Hi?", "response_a": "one", "response_b": "two", **value})
    assert row.prompt == [USER]
    assert [r[0]["content"] for r in row.responses] == (["one", "two"] if first else ["two", "one"])


def test_answers_that_are_counted_from_zero_are_named_so():
    two = {"prompt": "Hi?", "response_0": "one", "response_1": "two"}
    assert preference_row({**two, "better_response_id": 1}).responses == ("two", "one")
    assert preference_row({**two, "better_response_id": 0}).responses == ("one", "two")


def test_ties_are_counted_and_other_winners_named(tokenizer):
    two = {"prompt": "Hi?", "response_a": "one", "response_b": "two"}
    ties = [0, "tie", "tie (bothbad)", "Tie", [1, 1], "both"]
    rows = [{**two, "winner": "a"}, *({**two, "winner": tie} for tie in ties), {**two, "winner": 7}]
    kept, report = decoded(rows, tokenizer)
    assert len(kept) == 1
    assert report.dropped == {
        "a tie between two answers": (1, 2, 3, 4, 5, 6),
        "the winner is neither of the two answers: 7": (7,),
    }


def test_the_prompt_of_two_answers_may_be_a_task_or_stand_in_conversations(tokenizer):
    task = {"instruction": "Add.", "input": "1, 2", "output_1": "3", "output_2": "4", "preference": 1}
    assert preference_row(task).prompt == "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"
    arena = {"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "model_b", "model_a": "m"}
    assert only(arena, tokenizer) == (ASKED, ANSWERS)
    table = {  # an arena's table: a text for each turn, as JSON
        "prompt": '["Hi?", "Who?"]',
        "response_a": '["Go.", "No."]',
        "response_b": '["Hello!", "Me."]',
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
    }
    prompt, responses = only(table, tokenizer)
    assert prompt == ASKED
    assert responses[0] == "Hello!<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"context": [USER]}, [USER]),
        ({"prompt": "Hi?"}, "Hi?"),
        ({"instruction": "Hi?"}, "### Instruction:\nHi?\n\n### Response:\n"),
        ({"system": "Be kind.", "question": "Hi?"}, [SYSTEM, USER]),
    ],
)
@pytest.mark.parametrize(
    "answers",
    [
        {"completions": [{"rank": 1, "completion": "Go."}, {"rank": 0, "completion": "Hello!"}]},
        {"answers": [{"answer": "Go.", "rank": 2}, {"answer": "Hello!", "rank": 1}]},
        {"responses": ["Go.", "Hello!"], "scores": [0.1, 0.2]},
        {"responses": ["Go.", "Hello!"], "ranks": [2, 1]},
        {"completions": ["Go.", "Hello!"], "rewards": [-3, 4]},
        {"candidates": [{"text": "Go.", "score": 1}, {"text": "Hello!", "score": 5}]},
        {"completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}]},
    ],
)
def test_ranks_count_from_the_best_and_scores_from_the_worst(columns, prompt, answers):
    row = preference_row({**columns, **answers})
    said = [r if isinstance(r, str) else r[-1]["content"] for r in row.responses]
    assert (said, row.preferences) == (["Hello!", "Go."], ((0, 1),))
    asked = prompt if isinstance(row.prompt, str) else "Hi?"
    assert asked in (row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"])


# --- text that is JSON ---


@pytest.mark.parametrize(
    "write",
    [
        json.dumps,
        lambda messages: json.dumps({"messages": messages}),
        lambda messages: json.dumps(json.dumps(messages)),
        lambda messages: [json.dumps(message) for message in messages],
        lambda messages: {"messages": json.dumps(messages)},
        str,  # as CSV exports and str() write lists
        lambda messages: json.dumps(messages, indent=2),
    ],
)
def test_messages_that_stand_in_text_are_read_as_messages(tokenizer, write):
    whole = {"chosen": write([SYSTEM, USER, GOOD]), "rejected": write([SYSTEM, USER, BAD])}
    assert only(whole, tokenizer) == (ASKED_KINDLY, ANSWERS)
    parts = {"prompt": write([USER]), "chosen": write([GOOD]), "rejected": write([BAD])}
    assert only(parts, tokenizer) == (ASKED, ANSWERS)
    assert only({"messages": write([USER, GOOD]), "rejected_response": "Go."}, tokenizer) == (ASKED, ANSWERS)


def test_an_answer_that_is_json_stays_the_answer_it_is():
    row = {"prompt": "Hi?", "chosen": '{"content": 1}', "rejected": '["a", "b"]'}
    assert preference_row(row).responses == ('{"content": 1}', '["a", "b"]')


def test_messages_in_text_in_some_rows_only_are_refused_by_the_name_of_the_column(tokenizer):
    rows = [
        {"prompt": "Hi?", "chosen": "Hello!", "rejected": "Go."},
        {"prompt": "Hi?", "chosen": json.dumps([GOOD]), "rejected": "Go."},
    ]
    with pytest.raises(ValueError, match=r"column 'chosen'.*rows 0 and 1"):
        decoded(rows, tokenizer)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    prepared, _ = prepare_preference_dataset(stream, tokenizer, WHOLE)
    with pytest.raises(ValueError, match=r"column 'chosen'.*rows 0 and 1"):
        list(prepared)


@pytest.mark.parametrize(
    "text",
    ['[{"role": "assistant", "content": "Hel', "[{'role': 'user', 'content': 'a'} {'role': 'user', 'content': 'b'}]"],
)
def test_text_that_looks_like_messages_and_is_not_is_a_bad_row_by_the_name_of_its_column(text):
    with pytest.raises(BadRow, match="chosen looks like messages written as text"):
        preference_row({"prompt": "Hi?", "chosen": text, "rejected": "Go."})


def test_tools_and_calls_are_read_from_text(tokenizer):
    for tools in ([json.dumps(TOOL)], json.dumps([TOOL]), TOOL, json.dumps(TOOL), {"tools": [TOOL]}):
        column = {"input": {"messages": [USER], **tools}} if "tools" in tools else {"prompt": [USER], "tools": tools}
        assert only({**column, **LISTS}, tokenizer)[0] == f"{json.dumps([TOOL])}\n{ASKED}"
    calls = [{"name": "add", "arguments": {"x": 1}}]
    row = preference_row({"prompt": [USER], "chosen": {**GOOD, "tool_calls": json.dumps(calls)}, "rejected": [BAD]})
    assert row.responses[0] == [{**GOOD, "tool_calls": calls}]


# --- nulls ---


def test_nulls_in_tools_and_calls_are_kept_from_files_lists_and_json_features(tokenizer, tmp_path):
    def call(**arguments):
        return {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": arguments}]}

    rows = [
        {"prompt": [USER], "chosen": [call(x=None)], "rejected": [call()], "tools": [TOOL]},
        {"prompt": [USER], "chosen": [call(y=2)], "rejected": [call(y=2.5)], "tools": [TOOL]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Json = getattr(datasets, "Json", None)
    if Json is None:
        pytest.skip("this release of datasets has no type for JSON")
    kind = List({"role": Value("string"), "content": Value("string"), "tool_calls": List(Json())})
    plain = List({"role": Value("string"), "content": Value("string")})
    features = Features(prompt=plain, chosen=kind, rejected=kind, tools=List(Json()))
    expected = [
        (f"{json.dumps([TOOL])}\n{ASKED}", [f"{json.dumps(row[side][0]['tool_calls'])}<|im_end|>\n" for side in ONES])
        for row in rows
    ]
    for source in (
        rows,
        load_preference_dataset(path),
        stream_preference_dataset(path),
        Dataset.from_list(rows, features=features),
    ):
        prepared, _ = prepare_preference_dataset(source, tokenizer, WHOLE)
        groups = map(group_from_columns, prepared)
        assert [
            (tokenizer.decode(g.prompt_ids), [tokenizer.decode(r) for r in g.responses]) for g in groups
        ] == expected


def test_of_what_arrow_filled_in_nothing_is_left_and_what_is_null_in_all_rows_stays():
    rows = [
        {"tools": [{"name": "add", "default": None, "p": {"x": 1}}]},
        {"tools": [{"name": "b", "default": None, "p": {"y": 1}}]},
    ]
    columns = Dataset.from_list(rows)
    assert columns[0]["tools"][0]["p"] == {"x": 1, "y": None}  # or there is nothing to leave out
    assert [raw_example(example, columns.features) for example in columns] == rows


@pytest.mark.parametrize(
    "rows",
    [
        [{"t": {"a": None}}, {"t": {"a": "x"}}],
        [{"t": {"a": "x"}}, {"t": {"b": "x"}}],
        [{"t": [{"a": 1}]}, {"t": [{"a": 2.5}]}],
        [{"t": {"p": {"a": 1, "b": 2}}}, {"t": {"p": {"b": 1, "a": 2}}}],
        [{"t": [{"a": {}}]}, {"t": [{"a": {"x": 1}}]}],
        [{"t": None}, {"t": {"a": "x"}}],
    ],
)
def test_rows_of_a_list_come_back_as_they_are(rows):
    dataset = dataset_from_rows(rows)
    back = [raw_example(example, dataset.features) for example in dataset]
    assert json.dumps(back) == json.dumps(rows)


def test_null_contents_are_empty_and_a_null_prompt_beside_conversations_is_none(tokenizer):
    nothing = {"role": "assistant", "content": None}
    row = {"prompt": [USER, nothing, USER], **LISTS}
    assert only(row, tokenizer)[0] == chat(USER, turn("assistant", ""), USER)
    whole = {"prompt": None, "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    assert only(whole, tokenizer) == (ASKED_KINDLY, ANSWERS)
    with pytest.raises(BadRow, match="prompt is not text"):
        preference_row({"prompt": None, **TEXTS})


# --- prompts ---


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ([USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER]),
        ("Hi?", [SYSTEM, USER]),
        (" Hi?\n", [SYSTEM, USER]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        ([SYSTEM], [USER]),
    ],
)
def test_a_question_that_prompt_and_conversations_both_hold_stands_once(tokenizer, prompt, start):
    row = {"prompt": prompt, "chosen": [*start, GOOD], "rejected": [*start, BAD]}
    assert only(row, tokenizer) == (ASKED_KINDLY, ANSWERS)


def test_conversations_go_on_where_the_prompt_ends(tokenizer):
    before = [turn("user", "Who?"), turn("assistant", "Me.")]
    row = {"prompt": before, "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert only(row, tokenizer) == (ASKED_AGAIN, ANSWERS)


def test_a_prompt_that_the_conversations_do_not_hold_makes_a_bad_row():
    row = {"prompt": "Another?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    with pytest.raises(BadRow, match=r"conversation does not contain .* prompt"):
        preference_row(row)


def test_an_answer_beside_a_whole_conversation_answers_the_same(tokenizer):
    assert only({"chosen": [SYSTEM, USER, GOOD], "rejected": "Go."}, tokenizer) == (ASKED_KINDLY, ANSWERS)


def test_a_prompt_that_ends_in_the_assistants_turn_keeps_it():
    row = preference_row({"prompt": [USER, turn("assistant", "The")], "chosen": " cat", "rejected": " dog"})
    assert row.prompt == [USER, turn("assistant", "The")]
    assert row.responses == ([turn("assistant", " cat")], [turn("assistant", " dog")])


# --- fine-tuning reads the same columns ---


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "Be kind.", "messages": [USER, GOOD]}, [SYSTEM, USER]),
        ({"system": "Be kind.", "prompt": [USER], "completion": "Hello!"}, [SYSTEM, USER]),
        (
            {"history": [["Who?", "Me."]], "prompt": "Hi?", "completion": "Hello!"},
            [turn("user", "Who?"), turn("assistant", "Me."), USER],
        ),
        ({"conversation": [{"human": "Hi?", "assistant": "Hello!"}]}, [USER]),
        ({"messages": json.dumps([USER, GOOD])}, [USER]),
    ],
)
def test_rows_of_one_response_have_their_context_too(row, prompt):
    read = sft_row(row)
    assert (read.prompt, read.responses) == (prompt, ([GOOD],))


def test_a_column_of_fine_tuning_data_that_nothing_reads_is_an_error():
    with pytest.raises(ValueError, match="columns 'foo'"):
        sft_row({"prompt": "Hi?", "completion": "Hello!", "foo": "a text"})
