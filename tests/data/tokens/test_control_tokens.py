"""Special tokens that a message spells out are text; those of the template are control tokens."""

import inspect

import pytest
from tiny_tokenizers import CHATML, byte_level_tokenizer
from transformers import PreTrainedTokenizerBase

from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset
from fastdpo.data.tokens.control import ControlTokens
from fastdpo.data.tokens.tokenization import TokenizationSettings, encode_row
from fastdpo.types import PreferenceRow

SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
USER = {"role": "user", "content": "the cat?"}
WHOLE = TokenizationSettings(max_length=None)
SANITIZES = "sanitize_control_tokens" in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def chatml_tokenizer(**how):
    return byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=CHATML, **how)


def encoded(chosen, prompt=(USER,), tokenizer=None):
    tokenizer = tokenizer or chatml_tokenizer()
    group, _ = encode_row(PreferenceRow(list(prompt), ([said(chosen)], [said("no")])), tokenizer)
    return group, tokenizer


@pytest.mark.parametrize(
    "content",
    [
        "Use <s>old</s>",
        "Use <s>old</s> here",
        "it ends with <|im_end|>, and then",
        "<s>a</s> and <s>b</s>",
        "<|im_start|>user\nme again<|im_end|>\n",
    ],
)
def test_what_a_message_spells_out_is_text(content):
    group, tokenizer = encoded(content)
    assert tokenizer.decode(group.responses[0]) == f"{content}<|im_end|>\n"
    special = [token for token in group.responses[0] if token in tokenizer.all_special_ids]
    assert tokenizer.convert_ids_to_tokens(special) == ["<|im_end|>"]


def test_what_the_user_spells_out_is_text_too():
    asked = {"role": "user", "content": "what is <|im_end|> and </s>?"}
    group, tokenizer = encoded("a token", prompt=[asked])
    special = tokenizer.convert_ids_to_tokens([t for t in group.prompt_ids if t in tokenizer.all_special_ids])
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert asked["content"] in tokenizer.decode(group.prompt_ids)


@pytest.mark.skipif(not SANITIZES, reason="this transformers does not sanitize")
@pytest.mark.parametrize("content", ["Use <s>old</s> here", "a<|im_end|>b", "<|im_end|>", " </s> the cat"])
def test_the_tokens_are_those_of_transformers_own_sanitizing(content):
    group, tokenizer = encoded(content)
    theirs = tokenizer.apply_chat_template([USER, said(content)], sanitize_control_tokens=True)["input_ids"]
    assert [*group.prompt_ids, *group.responses[0]] == theirs


def test_an_eos_that_ends_an_answer_still_ends_it():
    for content in ("sat</s>", "sat", "<s>sat</s>"):
        group, tokenizer = encoded(content)
        assert tokenizer.decode(group.responses[0]).count("</s>") == 0
    group, tokenizer = encoded("write <s>sat</s>")
    assert tokenizer.decode(group.responses[0]) == "write <s>sat</s><|im_end|>\n"


def test_tags_of_thoughts_in_an_answer_stay_the_tokens_that_they_are():
    group, tokenizer = encoded("<think>hm</think>yes")
    assert tokenizer.convert_tokens_to_ids("<think>") == group.responses[0][0]
    group, tokenizer = encoded("yes", prompt=[{"role": "user", "content": "what is <think>?"}])
    assert tokenizer.convert_tokens_to_ids("<think>") not in group.prompt_ids


def test_special_tokens_in_tools_and_calls_are_text():
    template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
    )
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=template)
    call = {"type": "function", "function": {"name": "tag", "arguments": {"name": "<|im_end|>"}}}
    tools = [{"type": "function", "function": {"name": "tag", "description": "writes </s>"}}]
    row = PreferenceRow([USER], ([said("", tool_calls=[call])], [said("no")]))
    group, _ = encode_row(row, tokenizer, {"tools": tools})
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert eos not in group.prompt_ids
    assert list(group.responses[0]).count(end) == 1
    assert "writes </s>" in tokenizer.decode(group.prompt_ids)


@pytest.mark.parametrize("marks", [True, False])
def test_masks_of_several_turns_fit_marked_text(marks):
    template = CHATML
    if marks:
        template = CHATML.replace(
            "{{ m.content }}<|im_end|>\n",
            "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
            "{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
        )
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=template)
    turns = [said("say </s>"), {"role": "user", "content": "or <|im_end|>?"}, said("<s>old</s> it is")]
    group, _ = encode_row(PreferenceRow([USER], (turns, [said("no")])), tokenizer)
    pairs = zip(group.responses[0], group.loss_masks[0], strict=True)
    counted = tokenizer.decode([token for token, counts in pairs if counts])
    assert counted.replace("\n", "") == "say </s><|im_end|><s>old</s> it is<|im_end|>"


def test_a_tokenizer_that_knows_no_other_tokens_for_it_is_told_of():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "user:", "assistant:", "yes", "no", "what"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": "what </s> what"}],
            "chosen": [said("yes")],
            "rejected": [said("no")],
        }
    ]
    _, report = prepare_preference_dataset(rows, tokenizer, WHOLE)
    assert any("stay control tokens in 1 pairs" in line for line in report.lines())


# --- plain text ---


def of_text(rows, tokenizer):
    dataset, report = prepare_preference_dataset(rows, tokenizer, WHOLE)
    return [group_from_columns(example) for example in dataset], report


def test_markup_in_a_sentence_is_no_control_token_in_plain_text_either():
    tokenizer = chatml_tokenizer()
    (group,), report = of_text([{"prompt": "Q: ", "chosen": "Use <s>old</s>", "rejected": "no"}], tokenizer)
    assert tokenizer.decode(group.responses[0]) == "Use <s>old</s></s>"
    assert tokenizer.bos_token_id not in group.responses[0]
    assert list(group.responses[0]).count(tokenizer.eos_token_id) == 1
    assert not any("spells out" in line for line in report.lines())


def test_templates_spelled_out_in_plain_text_are_control_tokens_and_said():
    tokenizer = chatml_tokenizer()
    asked = "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n"
    turns = "a </s><s> b </s>"  # as in conversations of Llama 2
    rows = [
        {"prompt": asked, "chosen": "sat<|im_end|>", "rejected": "no"},
        {"prompt": "Q", "chosen": turns, "rejected": "no"},
    ]
    groups, report = of_text(rows, tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == groups[0].prompt_ids[0]
    assert list(groups[1].responses[0]).count(tokenizer.eos_token_id) == 2
    line = next(line for line in report.lines() if "spells out" in line)
    assert "<|im_start|>" in line
    assert "in 2 pairs" in line


def test_plain_text_for_a_tokenizer_with_a_template_is_said_once():
    rows = [{"prompt": "Q", "chosen": " yes", "rejected": " no"}] * 3
    _, report = of_text(rows, chatml_tokenizer())
    said_so = "3 pairs are plain text, which is tokenized without the chat template"
    assert report.lines().count(said_so) == 1
    _, report = of_text(rows, byte_level_tokenizer())
    assert said_so not in report.lines()


def test_marks_that_a_text_brings_along_forge_nothing():
    control = ControlTokens(chatml_tokenizer())
    forged = "a\U000f0000</s>\U000f0001b"
    assert control.mark(forged, is_assistant=True) == "a\U000f0000</s>\U000f0001b"
    assert control.mark("a\U000f0001</s>b", is_assistant=True) == "a\U000f0000</s>\U000f0001b"
    assert control.mark("no token\U000f0000", is_assistant=True) == "no token\U000f0000"
