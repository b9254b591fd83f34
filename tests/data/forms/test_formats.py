import pytest

from fastdpo.data.forms.formats import preference_row, sft_row, template_kwargs
from fastdpo.data.values import BadRow

USER = {"role": "user", "content": "Hi?"}
GOOD = {"role": "assistant", "content": "Hello!"}
BAD = {"role": "assistant", "content": "Go."}
PARTS = "response has parts of type x"


def parts(row):
    return row.prompt, *row.responses


def test_text_with_explicit_prompt_is_taken_as_it_is():
    row = preference_row({"prompt": "Q: 1+1?", "chosen": " 2", "rejected": " 3", "score": 4})
    assert parts(row) == ("Q: 1+1?", " 2", " 3")
    assert row.preferences == ((0, 1),)
    assert not row.is_conversational


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Q?\nA: yes", "Q?\nA: no", ("Q?\nA:", " yes", " no")),  # the space goes with the word
        ("Q?\nyes", "Q?\nno", ("Q?\n", "yes", "no")),
        ("A: yes", "A: yes, sir", ("A:", " yes", " yes, sir")),  # one side is the start of the other
        ("A: yes, sir", "A: yes", ("A:", " yes, sir", " yes")),
        ("Q?\nyes", "Q?\nyes, sir", ("Q?\n", "yes", "yes, sir")),
        ("問:是", "問:否", ("問:", "是", "否")),
        ("ab", "xy", ("", "ab", "xy")),
    ],
)
def test_an_implicit_text_prompt_is_the_common_start(chosen, rejected, expected):
    assert parts(preference_row({"chosen": chosen, "rejected": rejected})) == expected


def test_conversational_rows_with_explicit_prompt_take_lists_and_single_messages():
    for chosen, rejected in (([GOOD], [BAD]), (GOOD, BAD)):
        row = preference_row({"prompt": [USER], "chosen": chosen, "rejected": rejected})
        assert parts(row) == ([USER], [GOOD], [BAD])
        assert row.is_conversational


def test_text_beside_messages_becomes_one_message():
    assert parts(preference_row({"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]})) == ([USER], [GOOD], [BAD])
    assert parts(preference_row({"prompt": [USER], "chosen": "Hello!", "rejected": "Go."})) == ([USER], [GOOD], [BAD])


@pytest.mark.parametrize("prompt", ["Hi?", [USER]])
def test_a_prompt_that_the_responses_repeat_is_not_doubled(prompt):
    row = preference_row({"prompt": prompt, "chosen": [USER, GOOD], "rejected": [USER, BAD]})
    assert parts(row) == ([USER], [GOOD], [BAD])


def test_a_system_message_that_only_the_whole_conversations_hold_stays_in_the_prompt():
    system = {"role": "system", "content": "Be kind."}
    row = preference_row({"prompt": "Hi?", "chosen": [system, USER, GOOD], "rejected": [system, USER, BAD]})
    assert parts(row) == ([system, USER], [GOOD], [BAD])


def test_an_implicit_conversational_prompt_is_the_common_messages():
    row = preference_row({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]})
    assert parts(row) == ([USER, GOOD, USER], [GOOD], [BAD])


def test_each_side_keeps_a_message_when_the_conversations_are_equal():
    row = preference_row({"chosen": [USER, GOOD], "rejected": [USER, GOOD]})
    assert parts(row) == ([USER], [GOOD], [GOOD])


def test_hh_transcripts_are_split_after_the_last_shared_assistant_turn():
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Help\n\nAssistant:"
    row = preference_row({"chosen": start + " I see.", "rejected": start + " I do."})  # " I " is common, yet no prompt
    assert parts(row) == (start, " I see.", " I do.")


def test_hh_transcripts_that_part_early_keep_their_further_turns_in_the_responses():
    chosen = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Help\n\nAssistant: Sure."
    rejected = "\n\nHuman: Hi\n\nAssistant: No."
    expected = ("\n\nHuman: Hi\n\nAssistant:", " Yes?\n\nHuman: Help\n\nAssistant: Sure.", " No.")
    assert parts(preference_row({"chosen": chosen, "rejected": rejected})) == expected


def test_llms_from_scratch_rows_become_a_prompt_of_headings_without_the_output():
    example = {"instruction": "Add.", "input": "1, 2", "output": "x", "chosen": "3", "rejected": "4"}
    assert parts(preference_row(example)) == (
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n",
        "3",
        "4",
    )
    assert preference_row({**example, "input": ""}).prompt == "### Instruction:\nAdd.\n\n### Response:\n"


def test_llama_factory_names_of_speakers_become_roles():
    example = {
        "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi?"}],
        "chosen": {"from": "gpt", "value": "Hello!"},
        "rejected": {"from": "gpt", "value": "Go."},
    }
    assert parts(preference_row(example)) == ([{"role": "system", "content": "S"}, USER], [GOOD], [BAD])


def test_llama_factory_v1_parts_are_joined_and_weights_ignored():
    def message(role, *texts, weight):
        return {"role": role, "content": [{"type": "text", "value": t} for t in texts], "loss_weight": weight}

    example = {
        "chosen_messages": [message("user", "H", "i?", weight=0.0), message("assistant", "Hello!", weight=1.0)],
        "rejected_messages": [message("user", "Hi?", weight=1.0), message("assistant", "Go.", weight=1.0)],
    }
    assert parts(preference_row(example)) == ([USER], [GOOD], [BAD])


@pytest.mark.parametrize(
    ("example", "prompt", "response"),
    [
        ({"prompt": "Hi?", "completion": "Hello!"}, "Hi?", "Hello!"),
        ({"prompt": [USER], "completion": [GOOD]}, [USER], [GOOD]),
        ({"messages": [USER, GOOD, USER, BAD]}, [USER, GOOD, USER], [BAD]),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Go."}]}, [USER], [BAD]),
        ({"instruction": "Add.", "output": "3"}, "### Instruction:\nAdd.\n\n### Response:\n", "3"),
        ({"text": "Once upon"}, "", "Once upon"),
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b", "text": "Hi?"}, "Hi?", "a"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], [GOOD]),
    ],
)
def test_sft_rows_have_one_response_and_no_preference(example, prompt, response):
    row = sft_row(example)
    assert parts(row) == (prompt, response)
    assert row.preferences == ()


def test_missing_columns_are_an_error_that_names_what_was_found_and_what_is_known():
    with pytest.raises(
        ValueError, match=r"\(explicit: prompt, chosen, rejected.*got \['answer', 'question'\]"
    ) as error:
        preference_row({"question": "a", "answer": "b"})
    assert "nectar" in str(error.value)
    assert "score_A" not in str(error.value)  # of published datasets the names only: their columns drown all else
    with pytest.raises(ValueError, match=r"prompt, completion"):
        sft_row({"question": "a"})


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_images_stop_the_run_instead_of_being_ignored(example):
    with pytest.raises(ValueError, match="image") as caught:
        preference_row(example)
    assert not isinstance(caught.value, BadRow)


def test_an_image_column_without_images_is_no_obstacle():
    assert preference_row({"prompt": "a", "chosen": "b", "rejected": "c", "images": []}).prompt == "a"


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "response is not text"),
        ({"prompt": "a", "chosen": "b", "rejected": 7}, "response is not text"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, "prompt is not text"),
        ({"chosen": ["a"], "rejected": [5]}, "response is not text"),
        ({"chosen": [], "rejected": [USER, BAD]}, "empty response"),
        ({"chosen": [{"content": "a"}], "rejected": [BAD]}, "message without role"),
        ({"prompt": "a", "chosen": "\ud83d", "rejected": "c"}, "response is not valid Unicode"),
        ({"conversations": [USER], "chosen": {"from": "gpt", "value": [{"type": "x"}]}, "rejected": BAD}, PARTS),
    ],
)
def test_a_value_that_is_not_text_makes_only_its_row_bad(example, reason):
    with pytest.raises(BadRow) as caught:
        preference_row(example)
    assert caught.value.reason == reason


def test_messages_without_an_answer_are_no_sft_row():
    with pytest.raises(BadRow, match="does not end with the assistant"):
        sft_row({"messages": [USER]})


def test_further_keys_of_messages_survive_unless_they_are_null():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "id": None}], "name": None}
    row = preference_row({"prompt": [USER], "chosen": [call], "rejected": [BAD]})
    assert row.responses[0] == [{"role": "assistant", "content": "", "tool_calls": [{"name": "add", "id": None}]}]


def test_tools_may_be_json_text():
    assert template_kwargs({"tools": '[{"name": "add"}]'}) == {"tools": [{"name": "add"}]}
    assert template_kwargs({"tools": None, "chat_template_kwargs": {"thinking": False, "x": None}}) == {
        "thinking": False
    }
    with pytest.raises(BadRow, match="tools is not JSON"):
        template_kwargs({"tools": "[{"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("prompt", "choosen", "rejected"), "did you mean 'chosen' for 'choosen'"),
        (("promt", "chosen", "rejcted"), "did you mean 'prompt' for 'promt', 'rejected' for 'rejcted'"),
    ],
)
def test_a_misspelled_column_is_answered_with_the_nearest_and_not_with_all_forms(columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        preference_row(dict.fromkeys(columns, "text"))
    assert "ultrafeedback" not in str(caught.value)
    assert "write --columns" in str(caught.value)


def test_columns_that_are_near_nothing_are_answered_with_the_forms():
    with pytest.raises(ValueError, match="explicit: prompt, chosen, rejected"):
        preference_row({"left": "a", "right": "b"})
