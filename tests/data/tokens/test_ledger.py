"""What a row says is in the tokens of its side, or in the report as lost."""

import json

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, byte_level_tokenizer

from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset, prepare_sft_dataset
from fastdpo.data.rows.columns import RowPreparer
from fastdpo.data.tokens.chat.templates import resolve_template
from fastdpo.data.tokens.tokenization import TokenizationSettings

SPECIAL = ("<|im_start|>", "<|im_end|>")
WHOLE = TokenizationSettings(max_length=None)
USER = {"role": "user", "content": "the cat?"}
CUTS_THOUGHTS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
READS_ALL = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_MESSAGE_ALONE = CHATML.replace("in messages", "in messages[-2:]")


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def row(chosen, rejected="no", prompt=(USER,), **more):
    sides = [side if isinstance(side, list) else [said(side)] for side in (chosen, rejected)]
    return {"prompt": list(prompt), "chosen": sides[0], "rejected": sides[1], **more}


def prepared(rows, template, settings=WHOLE):
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=template)
    dataset, report = prepare_preference_dataset(rows, tokenizer, settings)
    return [group_from_columns(example) for example in dataset], report, tokenizer


def lost(report):
    """{kind: {side: rows}}"""
    return {kind: report.notes.sides("lost", kind) for kind in report.notes.whats("lost")}


def test_thoughts_that_the_template_cuts_are_counted_by_side_and_shown():
    rows = [row("<think>first this</think>yes", "<think>hm</think>no"), row("yes"), row("<think>ah</think>sat")]
    _, report, _ = prepared(rows, CUTS_THOUGHTS)
    assert lost(report) == {"thoughts": {"chosen": 2, "rejected": 1}}
    said_so = "the chat template leaves out thoughts: 2 of 3 chosen, 1 of 3 rejected; row 0: 'first this'"
    assert said_so in report.lines()


def test_a_template_that_keeps_everything_has_nothing_said_of_it():
    tools = [{"type": "function", "function": {"name": "add", "description": 'says "é"', "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"text": 'a "quote"\n', "n": 2}}}
    rows = [row([said("", reasoning_content="hm", tool_calls=[call])], tools=tools), row("<think>x</think>y")]
    _, report, _ = prepared(rows, READS_ALL)
    assert lost(report) == {}
    assert [line.split()[0] for line in report.lines()] == ["kept", "tokens", "prompt", "chosen", "rejected"]


def test_every_kind_is_called_by_its_name():
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "log"}}}
    before = [{"role": "system", "content": "be short"}, USER, said("a log"), {"role": "tool", "content": "4"}, USER]
    rows = [row([said("yes", reasoning_content="hm", tool_calls=[call])], prompt=before, tools=tools)]
    _, report, _ = prepared(rows, LAST_MESSAGE_ALONE)
    assert lost(report) == {
        "tools": {"prompts": 1},
        "system messages": {"prompts": 1},
        "user messages": {"prompts": 1},
        "answers": {"prompts": 1},
        "tool results": {"prompts": 1},
        "thoughts": {"chosen": 1},
        "calls": {"chosen": 1},
    }


def test_a_short_thought_is_not_found_in_other_words():
    _, report, _ = prepared([row([said("user", reasoning_content="user")])], CHATML)
    assert lost(report) == {"thoughts": {"chosen": 1}}  # both the role and the answer are "user"


def test_a_call_in_a_prompt_does_not_stand_in_for_one_in_the_response():
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": "seven"}}}
    first = [USER, said("", tool_calls=[call]), {"role": "tool", "content": "7"}]
    keeps_early_calls = READS_ALL.replace("in m.tool_calls or []", "in (m.tool_calls if not loop.last else []) or []")
    _, report, _ = prepared([row([said("", tool_calls=[call])], prompt=first)], keeps_early_calls)
    assert lost(report) == {"calls": {"chosen": 1}}


def test_two_answers_that_differ_only_in_what_was_cut_are_dropped_with_that_reason():
    rows = [row("<think>a</think>yes", "<think>b</think>yes"), row("yes"), row("yes", "yes")]
    _, report, _ = prepared(rows, CUTS_THOUGHTS)
    assert report.dropped == {
        "chosen equals rejected but for thoughts, which the chat template leaves out": (0,),
        "chosen equals rejected": (2,),
    }


def test_rows_that_lose_something_are_dropped_or_raised_where_that_is_asked_for():
    rows = [row("yes"), row("<think>why so</think>yes")]
    groups, report, _ = prepared(rows, CUTS_THOUGHTS, TokenizationSettings(on_lost_content="drop", on_bad_row="raise"))
    assert len(groups) == 1
    assert report.dropped == {"the chat template leaves out thoughts": (1,)}
    with pytest.raises(ValueError, match=r"leaves out thoughts \(why so\): .*on_lost_content='warn'.* row 1"):
        prepared(rows, CUTS_THOUGHTS, TokenizationSettings(on_lost_content="raise"))
    with pytest.raises(ValueError, match=r"on_lost_content must be one of \('warn', 'drop', 'raise'\), got 'keep'"):
        TokenizationSettings(on_lost_content="keep")


def test_a_generation_prompt_that_opens_a_thought_is_said_truly():
    opens = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    groups, report, tokenizer = prepared([row("yes"), row("<think>\nhm</think>yes", "<think>\nno</think>")], opens)
    assert [tokenizer.decode(group.prompt_ids)[-20:] for group in groups] == [
        "im_start|>assistant\n",
        "|>assistant\n<think>\n",
    ]
    assert report.num_merged_boundary == 0
    line = next(line for line in report.lines() if "alone ends" in line)
    assert line.startswith("the prompt alone ends in '<think>', but the conversation lacks this")
    assert "before the response: 1 of 2;" in line


def test_fields_that_a_template_does_not_read_are_named():
    rows = [row("yes", prompt=[{**USER, "name": "Bob"}]), row([said("yes", sure="very")])]
    _, report, _ = prepared(rows, CHATML)
    assert "message fields that the chat template ignores: name, sure" in report.lines()
    assert lost(report) == {}
    _, report, _ = prepared(rows[:1], CHATML.replace("{{ m.role }}", "{{ m.role }}{{ m.name }}"))
    assert not any("message fields" in line for line in report.lines())


def test_characters_that_a_tokenizer_does_not_know_are_counted():
    from tiny import make_tokenizer

    template = "{% for m in messages %}{{ m.content }} </s>{% endfor %}"
    rows = [row("the dog sees", "the dog"), row("the zebra sees", "the dog")]
    for example in rows:
        example["prompt"] = [{"role": "user", "content": "the cat"}]
    for examples, expected in ((rows[:1], {}), (rows, {"chosen": 1})):
        _, report = prepare_preference_dataset(examples, make_tokenizer(template), WHOLE)
        assert report.notes.sides("unknown", "characters") == expected


def test_fine_tuning_counts_what_its_responses_lose():
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=CUTS_THOUGHTS)
    rows = [{"messages": [USER, said("<think>hm</think>yes")]}]
    _, report = prepare_sft_dataset(rows, tokenizer, WHOLE)
    assert lost(report) == {"thoughts": {"responses": 1}}
    with pytest.raises(ValueError, match="leaves out thoughts"):
        prepare_sft_dataset(rows, tokenizer, TokenizationSettings(on_lost_content="raise"))


def test_a_stream_says_at_once_what_its_first_row_loses_and_counts_the_rest(caplog):
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=CUTS_THOUGHTS)
    rows = [row("yes"), row("<think>a</think>yes"), row("<think>b</think>yes")]
    stream, report = prepare_preference_dataset(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, WHOLE)
    with caplog.at_level("WARNING"):
        assert len(list(stream)) == 3
        assert len(list(stream)) == 3  # another epoch counts nothing twice
    told = [record.message for record in caplog.records if "leaves out" in record.message]
    assert len(told) == 1
    assert told[0].startswith("row 1 while streaming: the chat template leaves out thoughts")
    assert lost(report) == {"thoughts": {"chosen": 2}}
    assert "the chat template leaves out thoughts: 2 of 3 chosen; row 1: 'a'" in report.lines()


# --- the property ---

TEMPLATES = {
    "chatml": CHATML,
    "cuts_thoughts": CUTS_THOUGHTS,
    "reads_all": READS_ALL,
    "last_message_alone": LAST_MESSAGE_ALONE,
    "qwen3": resolve_template("qwen3"),
    "deepseek_r1": resolve_template("deepseek_r1"),
    "glm4_5": resolve_template("glm4_5"),
    "merges_the_system_message": (
        "{% for m in messages %}{% if m.role == 'user' %}[I]"
        "{% if loop.index0 == messages | length - 2 and messages[0].role == 'system' %}{{ messages[0].content }} "
        "{% endif %}{{ m.content }}[/I]"
        "{% elif m.role == 'assistant' %}{{ m.content | trim }}</s>{% endif %}{% endfor %}"
    ),
}


class Marks:
    """Words that occur once, and where each stands in a row: its kind and side."""

    def __init__(self):
        self.places = {}

    def word(self, kind, side):
        word = f"m{len(self.places)}k{len(kind)}"
        self.places[word] = (kind, side)
        return word


@st.composite
def marked_rows(draw):
    """A row with a word of its own in every field, and where each word stands."""
    marks = Marks()

    def call(side):
        value = draw(st.sampled_from(["word", "number"]))
        arguments = {marks.word("calls", side): marks.word("calls", side) if value == "word" else 3}
        return {"type": "function", "function": {"name": marks.word("calls", side), "arguments": arguments}}

    def answer(side):
        message = said(marks.word("answers", side))
        how = draw(st.sampled_from(["none", "field", "tags"]))
        if how == "field":
            message["reasoning_content"] = marks.word("thoughts", side)
        elif how == "tags":
            message["content"] = f"<think>\n{marks.word('thoughts', side)}\n</think>\n\n{message['content']}"
        if draw(st.booleans()):
            message["tool_calls"] = [call(side) for _ in range(draw(st.integers(1, 2)))]
        return message

    prompt = []
    if draw(st.booleans()):
        prompt.append({"role": "system", "content": marks.word("system messages", "prompts")})
    for _ in range(draw(st.integers(0, 2))):
        prompt += [{"role": "user", "content": marks.word("user messages", "prompts")}, answer("prompts")]
        if prompt[-1].get("tool_calls") and draw(st.booleans()):
            prompt.append({"role": "tool", "content": marks.word("tool results", "prompts")})
    prompt.append({"role": "user", "content": marks.word("user messages", "prompts")})
    row = {"prompt": prompt, "chosen": [answer("chosen")], "rejected": [answer("rejected")]}
    if draw(st.booleans()):
        function = {"name": marks.word("tools", "prompts"), "description": marks.word("tools", "prompts")}
        function["parameters"] = {"type": "object", "properties": {marks.word("tools", "prompts"): {"type": "string"}}}
        row["tools"] = json.dumps([{"type": "function", "function": function}])
    return row, marks.places


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(marked=marked_rows())
def test_every_word_of_a_row_is_in_the_tokens_of_its_side_or_reported_as_lost(name, marked):
    example, places = marked
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=TEMPLATES[name])
    columns = RowPreparer(tokenizer, WHOLE, is_sft=False).columns([example], [0])[0]
    texts = [tokenizer.decode([*columns["prompt_ids"], *response]) for response in columns["responses"]]
    missing = set()
    for word, (kind, side) in places.items():
        sides = {"prompts": texts, "chosen": texts[:1], "rejected": texts[1:]}[side]
        if not all(word in text for text in sides):
            missing.add((kind, side))
    reported = {(note["what"], note["side"]) for note in columns["notes"] or () if note["kind"] == "lost"}
    assert missing == reported
    if name in ("reads_all", "qwen3", "deepseek_r1"):
        assert not any(side != "prompts" for _, side in reported)  # what is learnt is whole
