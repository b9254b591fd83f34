"""A prompt that ends in the assistant's turn goes on with that turn."""

import pytest
from tiny_tokenizers import CHATML, byte_level_tokenizer

from fastdpo.data.prepare import group_from_columns, prepare_preference_dataset, prepare_sft_dataset
from fastdpo.data.tokens.chat.templates import resolve_template
from fastdpo.data.tokens.tokenization import TokenizationSettings

SPECIAL = ("<|im_start|>", "<|im_end|>")
WHOLE = TokenizationSettings(max_length=None)
USER = {"role": "user", "content": "the cat?"}
MORE = {"role": "user", "content": "and a dog?"}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def prepared(row, template=CHATML, **how):
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template=template)
    dataset, report = prepare_preference_dataset([row], tokenizer, TokenizationSettings(max_length=None, **how))
    return group_from_columns(dataset[0]), report, tokenizer


def test_the_response_is_the_rest_of_the_turn():
    row = {"prompt": [USER, said("The answer is")], "chosen": [said(" 42")], "rejected": [said(" 43")]}
    group, report, tokenizer = prepared(row)
    assert tokenizer.decode(group.prompt_ids) == (
        "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\nThe answer is"
    )
    assert [tokenizer.decode(response) for response in group.responses] == [" 42<|im_end|>\n", " 43<|im_end|>\n"]
    assert not report.notes.whats("lost")


def test_responses_as_text_go_on_too_and_fine_tuning_does():
    row = {"prompt": [USER, said("It is")], "chosen": " A", "rejected": " B"}
    group, _, tokenizer = prepared(row)
    assert tokenizer.decode(group.prompt_ids).endswith("assistant\nIt is")
    rows = [{"prompt": [USER, said("It is")], "completion": [said(" A")]}]
    dataset, _ = prepare_sft_dataset(rows, tokenizer, WHOLE)
    assert tokenizer.decode(dataset[0]["prompt_ids"]).endswith("assistant\nIt is")
    assert tokenizer.decode(dataset[0]["responses"][0]) == " A<|im_end|>\n"


def test_later_turns_of_a_response_follow_and_only_the_assistants_count():
    row = {"prompt": [USER, said("It")], "chosen": [said(" sat"), MORE, said("ran")], "rejected": [said(" no")]}
    group, _, tokenizer = prepared(row)
    pairs = zip(group.responses[0], group.loss_masks[0], strict=True)
    assert tokenizer.decode([token for token, counts in pairs if counts]) == " sat<|im_end|>\nran<|im_end|>\n"
    assert tokenizer.decode(group.prompt_ids).endswith("assistant\nIt")


def test_a_turn_of_which_nothing_is_said_is_that_of_the_generation_prompt():
    row = {"prompt": [USER, said("")], "chosen": [said("sat")], "rejected": [said("no")]}
    group, _, tokenizer = prepared(row)
    assert tokenizer.decode(group.prompt_ids).count("<|im_start|>assistant") == 1
    assert tokenizer.decode(group.responses[0]) == "sat<|im_end|>\n"


def test_a_turn_that_was_answered_does_not_go_on():
    row = {"prompt": [USER, said("sat")], "chosen": [MORE, said("ran")], "rejected": [MORE, said("no")]}
    group, _, tokenizer = prepared(row)
    assert tokenizer.decode(group.prompt_ids).startswith(
        "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"
    )


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "glm4_5"])
def test_thoughts_before_a_begun_answer_stay_before_it(name):
    begun = said("The answer is", reasoning_content="let me see")
    row = {"prompt": [USER, begun], "chosen": [said(" 42")], "rejected": [said(" 43")]}
    group, report, tokenizer = prepared(row, resolve_template(name))
    prompt = tokenizer.decode(group.prompt_ids)
    assert "let me see" in prompt
    assert prompt.endswith("The answer is")
    assert tokenizer.decode(group.responses[0]).startswith(" 42")
    assert not report.notes.whats("lost")


def test_a_template_that_leaves_the_begun_turn_out_makes_the_row_bad():
    template = CHATML.replace("{{ m.content }}", "{{ m.content if not loop.last else '' }}")
    row = {"prompt": [USER, said("It")], "chosen": [said(" sat")], "rejected": [said(" no")]}
    with pytest.raises(ValueError, match="chat template leaves out the assistant turn"):
        prepared(row, template)
