"""Responses of several turns: only what the assistant says counts."""

from pathlib import Path

import pytest
from peers import peer
from tiny_tokenizers import CHATML, byte_level_tokenizer

from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings, encode_row
from fastdpo.data.values import BadRow
from fastdpo.types import PreferenceRow

SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT_IN_THE_LAST_TURN = (  # the manner of Qwen 3
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.name }} of {{ call.arguments }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM_IN_THE_LAST_QUESTION = (  # the manner of Mistral
    "{% for m in messages[1:] %}{% if m.role == 'user' %}"
    "[INST] {% if loop.length - loop.index <= 1 %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "the cat?"}
MORE = {"role": "user", "content": "and a dog?"}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def tokenizer_with(template):
    return byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=template)


def counted_text(group, index, tokenizer):
    pairs = zip(group.responses[index], group.loss_masks[index], strict=True)
    return tokenizer.decode([token for token, counts in pairs if counts])


TURNS = PreferenceRow([USER], ([said("sat"), MORE, said("ran")], [said("no")]))


def test_the_turns_of_the_user_in_a_response_do_not_count():
    tokenizer = tokenizer_with(CHATML)
    group, _ = encode_row(TURNS, tokenizer)
    whole = "sat<|im_end|>\n<|im_start|>user\nand a dog?<|im_end|>\n<|im_start|>assistant\nran<|im_end|>\n"
    assert tokenizer.decode(group.responses[0]) == whole
    assert counted_text(group, 0, tokenizer) == "sat<|im_end|>\nran<|im_end|>\n"
    assert counted_text(group, 1, tokenizer) == "no<|im_end|>\n"  # one turn counts whole, as it does without masks


def test_one_turn_on_each_side_needs_no_masks():
    row = PreferenceRow([USER, said("sat"), MORE], ([said("ran")], [said("no")]))
    tokenizer = tokenizer_with(CHATML)
    group, _ = encode_row(row, tokenizer)
    assert group.loss_masks is None
    assert tokenizer.decode(group.prompt_ids).count("<|im_start|>assistant") == 2  # one in the prompt, one to answer


def test_a_template_that_marks_the_assistant_decides():
    tokenizer = tokenizer_with(MARKED)
    group, _ = encode_row(TURNS, tokenizer)
    assert counted_text(group, 0, tokenizer) == "sat<|im_end|>ran<|im_end|>"
    assert counted_text(group, 1, tokenizer) == "no<|im_end|>"


def test_an_eos_that_was_added_counts_after_the_assistants_turn():
    open_end = CHATML.replace("<|im_end|>", "")
    for template in (open_end, MARKED.replace("<|im_end|>", "")):
        tokenizer = tokenizer_with(template)
        group, _ = encode_row(TURNS, tokenizer)
        assert counted_text(group, 0, tokenizer).replace("\n", "") == "satran</s>"


@pytest.mark.parametrize(
    "family", ["cohere2", "gemma", "gemma3", "llama3", "lfm2", "phi3_5", "qwen3_instruct_2507", "qwen2_5_vl"]
)
def test_prefixes_find_the_turns_that_trl_has_marked_in_the_templates_of_known_models(family):
    folder = Path(peer("trl").__file__).parent / "chat_templates"
    counted = []
    for name in (f"{family}.jinja", f"{family}_training.jinja"):
        tokenizer = tokenizer_with((folder / name).read_text())
        group, _ = encode_row(TURNS, tokenizer)
        counted.append([counted_text(group, i, tokenizer) for i in (0, 1)])
    assert counted[0] == counted[1]
    assert counted[0][0].startswith("sat")
    assert "dog" not in counted[0][0]


def test_what_a_template_puts_into_the_last_turn_only_is_told_from_the_turn():
    tokenizer = tokenizer_with(THOUGHT_IN_THE_LAST_TURN)
    call = {"name": "add", "arguments": "the cat sat on the mat"}
    tool = {"role": "tool", "content": "a log"}
    row = PreferenceRow([USER], ([said("", tool_calls=[call]), tool, said("sat"), MORE, said("ran")], [said("no")]))
    group, _ = encode_row(row, tokenizer)
    calls = "<call>add of the cat sat on the mat</call><|im_end|>\n"
    assert counted_text(group, 0, tokenizer) == f"{calls}sat<|im_end|>\n<think>\n\n</think>\n\nran<|im_end|>\n"
    assert "a log" in tokenizer.decode(group.responses[0])


def test_tool_results_in_a_response_do_not_count():
    tokenizer = tokenizer_with(CHATML)
    row = PreferenceRow([USER], ([said("look"), {"role": "tool", "content": "a log"}, said("sat")], [said("no")]))
    group, _ = encode_row(row, tokenizer)
    assert counted_text(group, 0, tokenizer) == "look<|im_end|>\nsat<|im_end|>\n"


def test_a_response_that_ends_with_the_user_counts_up_to_there():
    tokenizer = tokenizer_with(CHATML)
    group, _ = encode_row(PreferenceRow([USER], ([said("sat"), MORE], [said("no")])), tokenizer)
    assert counted_text(group, 0, tokenizer) == "sat<|im_end|>\n"


def test_a_template_that_fails_on_a_row_leaves_out_that_row():
    tokenizer = tokenizer_with(CHATML.replace("{{ m.content }}", "{{ m.content + (m.tool_calls or '') }}"))
    encode_row(TURNS, tokenizer)
    call = said("", tool_calls=[{"name": "add"}])
    with pytest.raises(BadRow, match="the chat template refuses the messages"):
        encode_row(PreferenceRow([USER], ([call], [said("no")])), tokenizer)


def test_a_response_without_the_assistant_cannot_be_used():
    with pytest.raises(BadRow, match="response without an assistant message"):
        encode_row(PreferenceRow([USER], ([MORE, USER], [said("no")])), tokenizer_with(CHATML))


def test_a_template_that_moves_earlier_text_is_refused_rather_than_guessed():
    system = {"role": "system", "content": "a good answer is short"}
    row = PreferenceRow([system, USER], ([said("sat"), MORE, said("ran")], [said("no")]))
    with pytest.raises(BadRow, match=r"chat template .*several turns"):
        encode_row(row, tokenizer_with(SYSTEM_IN_THE_LAST_QUESTION))


def test_implicit_conversations_that_part_early_are_responses_of_several_turns():
    tokenizer = tokenizer_with(CHATML)
    rows = [{"chosen": [USER, said("sat"), MORE, said("ran")], "rejected": [USER, said("no"), MORE, said("mat")]}]
    prepared, _ = prepare_preference_dataset(rows, tokenizer, TokenizationSettings(max_length=None))
    group = group_from_columns(prepared[0])
    assert [counted_text(group, i, tokenizer) for i in (0, 1)] == [
        "sat<|im_end|>\nran<|im_end|>\n",
        "no<|im_end|>\nmat<|im_end|>\n",
    ]


def test_masks_are_cut_with_a_response_of_several_turns():
    tokenizer = tokenizer_with(CHATML)
    group, _ = encode_row(TURNS, tokenizer)
    length = len(group.prompt_ids) + len(group.responses[0]) - 2
    rows = [{"prompt": [USER], "chosen": TURNS.responses[0], "rejected": TURNS.responses[1]}]
    prepared, report = prepare_preference_dataset(rows, tokenizer, TokenizationSettings(max_length=length))
    assert report.num_truncated == 1
    assert prepared[0]["loss_masks"][0] == group.loss_masks[0][:-2]


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_what_the_human_says_in_a_transcript_does_not_count(bos):
    around = {"bos": bos, "prefix": [bos]} if bos else {}
    tokenizer = byte_level_tokenizer(**around)
    start = "\n\nHuman: the cat?\n\nAssistant:"
    row = {
        "chosen": f"{start} sat\n\nHuman: and a dog?\n\nAssistant: ran\n\nHuman: on?\n\nAssistant: the mat",
        "rejected": f"{start} no\n\nHuman: why?",
    }
    prepared, _ = prepare_preference_dataset([row], tokenizer, TokenizationSettings(max_length=None))
    group = group_from_columns(prepared[0])
    assert tokenizer.decode(group.prompt_ids).endswith(start)
    assert counted_text(group, 0, tokenizer) == " sat ran the mat</s>"
    assert counted_text(group, 1, tokenizer) == " no"


def test_a_transcript_of_one_turn_needs_no_masks_and_other_text_is_no_transcript(plain_tokenizer):
    start = "\n\nHuman: the cat?\n\nAssistant:"
    for prompt, chosen in ((start, " sat"), ("Write:", " a\n\nHuman: b\n\nAssistant: c")):
        group, _ = encode_row(PreferenceRow(prompt, (chosen, " no")), plain_tokenizer)
        assert group.loss_masks is None
