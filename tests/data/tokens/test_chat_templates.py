"""Which template a run renders its messages with, and the training templates of thinking models."""

import re
from pathlib import Path

import pytest
from peers import peer
from tiny_tokenizers import CHATML, byte_level_tokenizer

from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset
from fastdpo.data.tokens.chat.templates import (
    give_template,
    resolve_template,
    training_templates,
    without_generation_marks,
)
from fastdpo.data.tokens.tokenization import RowEncoder, TokenizationSettings
from fastdpo.types import PreferenceRow

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<｜Assistant｜>",
    "<｜User｜>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
USER = {"role": "user", "content": "the cat?"}
SYSTEM = {"role": "system", "content": "be brief"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "adds é",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
        },
    }
]
ARGUMENTS = {"x": 1, "y": "é", "z": [1, 2]}
CALL = {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
RESULT = {"role": "tool", "content": "4"}
OFFICIAL = {"qwen3": "qwen3", "qwen3_5": "qwen3_5_think", "glm4_5": "glm4moe", "deepseek_r1": "deepseek_r1_distill"}
OFFICIAL["gpt_oss"] = "gptoss"


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


CONVERSATIONS = {
    "question": [SYSTEM, USER],
    "answer": [USER, said("sat")],
    "tags": [SYSTEM, USER, said("<think>\nhm\n</think>\n\nsat")],
    "field": [USER, said("sat", reasoning_content="hm")],
    "turns": [SYSTEM, USER, said("old", reasoning_content="once"), USER, said("new", reasoning_content="now")],
    "calls": [USER, said("", tool_calls=[CALL, CALL], reasoning_content="hm"), RESULT, RESULT, said("4")],
    "results": [USER, said("let me", tool_calls=[CALL], reasoning_content="hm"), RESULT],
}


def rendered(template, messages, **kwargs):
    from transformers.utils.chat_template_utils import render_jinja_template

    is_asked = messages[-1]["role"] != "assistant"
    options = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": is_asked, **kwargs}
    return render_jinja_template([messages], chat_template=template, **options)[0][0]


def official(name):
    return (Path(peer("trl").__file__).parent / "chat_templates" / f"{OFFICIAL[name]}.jinja").read_text()


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("kwargs", [{}, {"tools": TOOLS}, {"enable_thinking": False}], ids=["plain", "tools", "no"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "glm4_5"])
def test_what_a_model_is_talked_to_with_is_what_it_is_trained_with(name, kwargs, conversation):
    messages = CONVERSATIONS[conversation]
    assert rendered(resolve_template(name), messages, **kwargs) == rendered(official(name), messages, **kwargs)


PARAMETERS = {
    "x": {"type": "integer", "description": "a number"},
    "y": {"type": "string", "enum": ["a", "b"], "default": "a"},
    "z": {"type": "array", "items": {"type": "string"}},
    "o": {"type": "object", "properties": {"k": {"type": "boolean"}, "l": {"type": "number"}}, "required": ["k"]},
    "n": {"type": "string", "nullable": True, "default": "q"},
    "u": {"type": ["string", "null"]},
    "v": {"oneOf": [{"type": "string", "description": "s", "default": "w"}, {"type": "integer"}]},
}
HARMONY = {
    "question": [SYSTEM, USER],
    "answer": [USER, said("sat")],
    "thought": [SYSTEM, USER, said("sat", thinking="hm")],
    "turns": [SYSTEM, USER, said("old", thinking="once"), USER, said("new", thinking="now")],
    "calls": [USER, said("", tool_calls=[CALL], thinking="hm"), RESULT, said("4", thinking="so")],
    "results": [USER, said("", tool_calls=[CALL], thinking="hm"), RESULT],
}


@pytest.mark.parametrize("conversation", HARMONY)
@pytest.mark.parametrize(
    "kwargs", [{}, {"tools": True}, {"reasoning_effort": "high"}], ids=["plain", "tools", "effort"]
)
def test_gpt_oss_is_trained_with_what_it_is_talked_to_with(kwargs, conversation):
    if "tools" in kwargs:
        parameters = {"type": "object", "properties": PARAMETERS, "required": ["x"]}
        function = {"name": "add", "description": "adds é", "parameters": parameters}
        kwargs = {"tools": [{"type": "function", "function": function}, TOOLS[0]]}
    messages = HARMONY[conversation]
    assert rendered(resolve_template("gpt_oss"), messages, **kwargs) == rendered(
        official("gpt_oss"), messages, **kwargs
    )


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("name", [name for name in training_templates() if name != "gpt_oss"])
def test_marks_of_training_templates_give_the_mask_of_prefixes(name, thinks):
    """gpt-oss's last turn ends in another token than the others, which prefixes do not see through."""
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL)
    thought = {"reasoning_content": "first"} if thinks else {}
    turns = [said("one", **thought), USER, said("two"), USER, said("three", **thought)]
    row = PreferenceRow([SYSTEM, USER], (turns, [said("no")]))
    marked = resolve_template(name)
    masks = []
    for template in (marked, without_generation_marks(marked)):
        encoded = RowEncoder(tokenizer, template, {"enable_thinking": thinks}).encode([(row, {})])[0]
        assert encoded.error is None
        masks.append(encoded.group.loss_masks)
    assert masks[0] == masks[1]


def test_deepseeks_prompts_are_as_they_were_and_its_answers_keep_their_thoughts():
    template = resolve_template("deepseek_r1")
    assert rendered(template, CONVERSATIONS["question"]) == rendered(official("deepseek_r1"), CONVERSATIONS["question"])
    answer = rendered(template, CONVERSATIONS["tags"])
    assert answer == "<s>be brief<｜User｜>the cat?<｜Assistant｜><think>\nhm\n</think>\n\nsat<｜end▁of▁sentence｜>"
    turns = rendered(template, CONVERSATIONS["turns"])
    assert "once" not in turns
    assert turns.endswith("<｜Assistant｜><think>\nnow\n</think>\n\nnew<｜end▁of▁sentence｜>")


@pytest.mark.parametrize("name", training_templates())
def test_every_turn_that_is_learnt_keeps_its_thought_and_the_prompts_do_not(name):
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL)
    settings = TokenizationSettings(max_length=None, chat_template=resolve_template(name))
    prompt = [USER, said("old", reasoning_content="before"), USER]
    turns = [said("one", reasoning_content="first"), USER, said("<think>\nthen\n</think>\n\ntwo")]
    rows = [{"prompt": prompt, "chosen": turns, "rejected": [said("no", reasoning_content="never")]}]
    dataset, report = prepare_preference_dataset(rows, tokenizer, settings)
    group = group_from_columns(dataset[0])
    assert "before" not in tokenizer.decode(group.prompt_ids)
    chosen, rejected = (tokenizer.decode(response) for response in group.responses)
    assert re.search(r"first.*one.*the cat\?.*then.*two", chosen, re.DOTALL)
    assert "never" in rejected
    pairs = zip(group.responses[0], group.loss_masks[0], strict=True)
    counted = tokenizer.decode([token for token, counts in pairs if counts])
    assert re.search(r"first.*one.*then.*two", counted, re.DOTALL)
    assert "cat" not in counted
    assert report.notes.sides("lost", "thoughts") == {"prompts": 1}
    assert not report.notes.whats("opens")  # the generation prompt stands before each response


def test_official_templates_of_thinking_models_lose_what_ours_keep():
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=official("deepseek_r1"))
    rows = [{"prompt": [USER], "chosen": [said("<think>\nhm\n</think>\n\nsat")], "rejected": [said("no")]}]
    for template, expected in ((None, ["thoughts"]), (resolve_template("deepseek_r1"), [])):
        settings = TokenizationSettings(max_length=None, chat_template=template)
        _, report = prepare_preference_dataset(rows, tokenizer, settings)
        assert report.notes.whats("lost") == expected


def test_a_setting_is_a_name_a_file_or_jinja(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    assert resolve_template(str(file)) == CHATML
    assert resolve_template(CHATML) == CHATML
    assert "first_trained_message" in resolve_template("qwen3")
    assert resolve_template("rag") == "rag"  # perhaps one of the tokenizer's
    (tmp_path / "empty.jinja").write_text("no template")
    with pytest.raises(ValueError, match=r"chat_template must .*got .*empty.jinja"):
        resolve_template(str(tmp_path / "empty.jinja"))
    for missing in ("nothere.jinja", "folder/name", ""):
        with pytest.raises(ValueError, match="chat_template must be an existing file"):
            resolve_template(missing)


def test_a_name_may_be_one_of_several_templates_of_a_tokenizer():
    tokenizer = byte_level_tokenizer(special=SPECIAL, chat_template={"default": CHATML, "loud": "LOUD " + CHATML})
    rows = [{"prompt": [USER], "chosen": [said("sat")], "rejected": [said("no")]}]
    settings = TokenizationSettings(max_length=None, chat_template="loud")
    dataset, _ = prepare_preference_dataset(rows, tokenizer, settings)
    assert tokenizer.decode(dataset[0]["prompt_ids"]).startswith("LOUD ")
    with pytest.raises(ValueError, match=r"chat_template must .* got 'qwen33'; did you mean 'qwen3'"):
        prepare_preference_dataset(rows, tokenizer, TokenizationSettings(chat_template="qwen33"))


def test_arguments_of_the_run_reach_the_template_and_those_of_a_row_win():
    tokenizer = byte_level_tokenizer(special=SPECIAL, chat_template="{{ mood }} " + CHATML)
    row = {"prompt": [USER], "chosen": [said("sat")], "rejected": [said("no")]}
    rows = [row, {**row, "chat_template_kwargs": {"mood": "kind"}}]
    settings = TokenizationSettings(max_length=None, chat_template_kwargs={"mood": "stern"})
    dataset, _ = prepare_preference_dataset(rows, tokenizer, settings)
    assert [tokenizer.decode(example["prompt_ids"]).split()[0] for example in dataset] == [
        "stern",
        "kind",
    ]
    with pytest.raises(ValueError, match=r"chat_template_kwargs must not .*\['add_generation_prompt'\]"):
        TokenizationSettings(chat_template_kwargs={"add_generation_prompt": True})


def test_a_template_from_a_file_is_saved_with_the_tokenizer_and_a_training_template_is_not(tmp_path):
    (tmp_path / "mine.jinja").write_text("MINE " + CHATML)
    tokenizer = byte_level_tokenizer(special=SPECIAL, chat_template=CHATML)
    give_template(tokenizer, "qwen3")
    assert tokenizer.chat_template == CHATML
    give_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == "MINE " + CHATML
    bare = byte_level_tokenizer(special=SPECIAL)
    give_template(bare, "qwen3")
    assert "generation %}" not in bare.chat_template  # what other programs do not know
    assert rendered(bare.chat_template, CONVERSATIONS["field"]) == rendered(
        resolve_template("qwen3"), CONVERSATIONS["field"]
    )


def test_marks_are_taken_out_with_their_trimming():
    marked = "a {%- generation -%} b {% endgeneration %} c"
    assert without_generation_marks(marked) == "a {%- if true -%} b {% endif %} c"
