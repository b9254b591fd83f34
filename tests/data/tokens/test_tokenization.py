import copy

import pytest
from tiny_tokenizers import CHATML, byte_level_tokenizer

from fastdpo.data.tokens.tokenization import TokenizationSettings, encode_row, tokenize_row, truncate
from fastdpo.data.values import BadRow
from fastdpo.types import PreferenceRow, TokenizedGroup

WHOLE = TokenizationSettings(max_length=None)
USER = {"role": "user", "content": "the cat"}


def answer(text):
    return [{"role": "assistant", "content": text}]


def sequences(group):
    return [list(group.prompt_ids) + list(response) for response in group.responses]


def assert_one_bos_and_one_eos(group, tokenizer):
    for ids in sequences(group):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1


# --- what surrounds a text ---


@pytest.mark.parametrize("prompt", ["the cat", "<s>the cat", ""])
@pytest.mark.parametrize("ending", ["", "</s>", "</s></s>"])
def test_text_gets_one_bos_and_one_eos_also_where_it_spells_them_out(bos_tokenizer, prompt, ending):
    group = tokenize_row(PreferenceRow(prompt, (" sat" + ending, " ran")), bos_tokenizer, WHOLE)
    assert_one_bos_and_one_eos(group, bos_tokenizer)
    assert bos_tokenizer.decode(group.prompt_ids, skip_special_tokens=True) == prompt.replace("<s>", "")
    assert bos_tokenizer.decode(group.responses[0]) == " sat</s>"
    assert group.loss_masks is None


def test_a_tokenizer_that_adds_an_eos_itself_gets_it_once_and_never_inside():
    tokenizer = byte_level_tokenizer(bos="<s>", prefix=["<s>"], suffix=["</s>"])
    group, is_merged = encode_row(PreferenceRow("the cat", (" sat", " ran")), tokenizer)
    assert_one_bos_and_one_eos(group, tokenizer)
    assert not is_merged


def test_a_bos_that_is_also_the_eos_is_kept_at_both_ends():
    tokenizer = byte_level_tokenizer(bos="</s>", eos="</s>", prefix=["</s>"])  # OPT's manner
    group = tokenize_row(PreferenceRow("the cat", (" sat", " ran")), tokenizer, WHOLE)
    assert tokenizer.decode(group.prompt_ids) == "</s>the cat"
    assert tokenizer.decode(group.responses[0]) == " sat</s>"


def test_a_tokenizer_without_bos_and_eos_adds_nothing():
    tokenizer = byte_level_tokenizer(eos=None)
    group = tokenize_row(PreferenceRow("the cat", (" sat", " ran")), tokenizer, WHOLE)
    assert tokenizer.decode(sequences(group)[0]) == "the cat sat"


def test_unicode_comes_back_as_it_went_in(plain_tokenizer):
    row = PreferenceRow("問：👩‍👩‍👧 ça va", (" 很好，谢谢 🎉", " não\u2028não"))
    group = tokenize_row(row, plain_tokenizer, WHOLE)
    for ids, response in zip(sequences(group), row.responses, strict=True):
        assert plain_tokenizer.decode(ids) == f"{row.prompt}{response}</s>"


# --- the boundary between prompt and response ---


def test_a_token_that_spans_the_boundary_belongs_to_the_response(plain_tokenizer):
    merged = plain_tokenizer(" cat")["input_ids"]
    assert len(merged) == 1  # learnt from the corpus, or this test shows nothing
    group, is_merged = encode_row(PreferenceRow("the c", ("at sat", "ow sat")), plain_tokenizer)
    assert is_merged
    assert plain_tokenizer.decode(group.prompt_ids) == "the"
    assert list(group.responses[0][:1]) == merged
    assert [plain_tokenizer.decode(ids) for ids in sequences(group)] == ["the cat sat</s>", "the cow sat</s>"]


def test_the_whole_prompt_stays_apart_where_nothing_merges(plain_tokenizer):
    group, is_merged = encode_row(PreferenceRow("the cat", (" sat", " ran")), plain_tokenizer)
    assert not is_merged
    assert plain_tokenizer.decode(group.prompt_ids) == "the cat"


# --- conversations ---


def test_conversations_are_rendered_by_the_template_without_a_second_bos():
    tokenizer = byte_level_tokenizer(
        bos="<s>", prefix=["<s>"], special=["<|im_start|>", "<|im_end|>"], chat_template="{{ bos_token }}" + CHATML
    )
    group = tokenize_row(PreferenceRow([USER], (answer("sat"), answer("ran"))), tokenizer, WHOLE)
    expected_prompt = "<s><|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(group.prompt_ids) == expected_prompt
    assert tokenizer.decode(group.responses[0]) == "sat<|im_end|>\n"  # the turn is closed: no EOS on top


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("</s>", "sat</s>"),
        ("</s>\n", "sat</s>\n"),
        ("<|im_end|>\n", "sat<|im_end|>\n"),
        ("", "sat</s>"),
        ("\n", "sat\n</s>"),
        ("<end>", "sat<end></s>"),  # not a token of this tokenizer: it would not stop there
    ],
)
def test_an_eos_closes_a_conversation_only_where_the_template_leaves_it_open(bos_tokenizer, ending, expected):
    tokenizer = copy.deepcopy(bos_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        + ending
        + ("{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    )
    for text in ("sat", "sat</s>"):
        group = tokenize_row(PreferenceRow([USER], (answer(text), answer("ran"))), tokenizer, WHOLE)
        assert tokenizer.decode(group.responses[0]).strip(" ") == expected


def test_a_template_that_renders_the_prompt_alone_in_another_way_leaves_the_common_start(bos_tokenizer):
    tokenizer = copy.deepcopy(bos_tokenizer)
    tokenizer.chat_template = CHATML.replace(
        "assistant\n", "assistant\n<think></think>"
    )  # in the generation prompt only
    group, is_merged = encode_row(PreferenceRow([USER], (answer("sat"), answer("ran"))), tokenizer)
    assert is_merged
    assert tokenizer.decode(group.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(group.responses[1]) == "ran<|im_end|>\n"


def test_messages_without_a_chat_template_are_an_error_with_a_remedy(plain_tokenizer):
    row = PreferenceRow([USER], (answer("sat"), answer("ran")))
    with pytest.raises(ValueError, match=r"tokenizer must have a chat template") as caught:
        tokenize_row(row, plain_tokenizer, WHOLE)
    assert not isinstance(caught.value, BadRow)


def test_messages_that_the_template_refuses_make_only_their_row_bad():
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = byte_level_tokenizer(chat_template=template)
    with pytest.raises(BadRow, match="the chat template refuses the messages"):
        tokenize_row(PreferenceRow([USER], (answer("sat"), answer("ran"))), tokenizer, WHOLE)


def test_tools_of_a_row_reach_the_template():
    tokenizer = byte_level_tokenizer(chat_template="{{ tools }}" + CHATML)
    row = PreferenceRow([USER], (answer("sat"), answer("ran")))
    with_tools = tokenize_row(row, tokenizer, WHOLE, {"tools": [{"name": "add"}]})
    assert "'name': 'add'" in tokenizer.decode(with_tools.prompt_ids)


# --- rows that cannot be used ---


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PreferenceRow("a", ("", "b")), "empty response"),
        (PreferenceRow("a", ("b", " \n")), "empty response"),
        (PreferenceRow([USER], (answer("b"), answer(" "))), "empty response"),
        (PreferenceRow([USER], ([], answer("b"))), "empty response"),
        (PreferenceRow("a", ("b", "</s>")), "empty response"),  # EOS, which every answer ends in
        (PreferenceRow("a", (" </s></s>\n", "b")), "empty response"),
        (PreferenceRow([USER], (answer("b"), answer("</s>"))), "empty response"),
        (PreferenceRow("a", ("b", "b")), "chosen equals rejected"),
        (PreferenceRow("a", ("b", "b</s>")), "chosen equals rejected"),  # the same tokens
        (PreferenceRow([USER], (answer("b"), answer("b"))), "chosen equals rejected"),
        (PreferenceRow([], (answer("b"), answer("c"))), "empty prompt"),
    ],
)
def test_unusable_rows_say_why(bos_tokenizer, row, reason):
    with pytest.raises(BadRow) as caught:
        tokenize_row(row, bos_tokenizer, WHOLE)
    assert caught.value.reason == reason


def test_an_answer_of_eos_text_without_such_an_eos_is_text(bos_tokenizer):
    group = tokenize_row(PreferenceRow("a", ("<eos>", "b </s> c")), bos_tokenizer, WHOLE)
    assert [bos_tokenizer.decode(response) for response in group.responses] == ["<eos></s>", "b </s> c</s>"]
    assert tokenize_row(PreferenceRow("a", ("</s>", "b")), byte_level_tokenizer(eos=None), WHOLE).responses[0]


def test_one_response_alone_has_nothing_to_be_equal_to(bos_tokenizer):
    group = tokenize_row(PreferenceRow("the", (" cat",), preferences=()), bos_tokenizer, WHOLE)
    assert len(group.responses) == 1
    assert list(group.preferences) == []


def test_without_any_prompt_token_the_first_response_token_is_kept_and_not_scored(plain_tokenizer):
    group = tokenize_row(PreferenceRow("", ("the cat sat", "a dog")), plain_tokenizer, WHOLE)
    assert list(group.prompt_ids) == []
    assert plain_tokenizer.decode(group.responses[1]) == "a dog</s>"
    assert group.loss_masks == [[False] + [True] * (len(response) - 1) for response in group.responses]


def test_without_prompt_a_response_of_one_token_cannot_be_scored():
    tokenizer = byte_level_tokenizer(eos=None)
    with pytest.raises(BadRow, match="empty prompt"):
        tokenize_row(PreferenceRow("", ("a", "b")), tokenizer, WHOLE)


# --- truncation, by examples to be read: prompt 1 2 3 4, chosen 5 6 7, rejected 8 ---

GROUP = TokenizedGroup([1, 2, 3, 4], [[5, 6, 7], [8]])


def cut(group=GROUP, **settings):
    group = truncate(group, TokenizationSettings(**{"max_length": None, **settings}))
    masks = None if group.loss_masks is None else ["".join("FT"[keep] for keep in mask) for mask in group.loss_masks]
    return list(group.prompt_ids), [list(response) for response in group.responses], masks


def test_a_group_that_fits_is_left_alone():
    assert cut(max_length=7) == ([1, 2, 3, 4], [[5, 6, 7], [8]], None)


def test_keep_start_cuts_the_end_of_each_sequence():
    assert cut(max_length=6) == ([1, 2, 3, 4], [[5, 6], [8]], None)


@pytest.mark.parametrize("max_length", [3, 4])
def test_keep_start_refuses_a_prompt_that_leaves_no_room(max_length):
    with pytest.raises(BadRow, match="prompt fills max_length"):
        cut(max_length=max_length)


def test_keep_end_cuts_each_side_by_itself_and_masks_the_prompts_that_differ():
    assert cut(max_length=6, truncation_mode="keep_end") == (
        [],
        [[2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 8]],
        ["FFFTTT", "FFFFT"],
    )


def test_keep_end_keeps_a_prompt_apart_that_stays_the_same():
    group = TokenizedGroup([1, 2, 3, 4], [[5, 6, 7], [8, 9, 9]])
    assert cut(group, max_length=5, truncation_mode="keep_end") == ([3, 4], [[5, 6, 7], [8, 9, 9]], None)


def test_keep_end_without_any_prompt_left_leaves_the_first_token_unscored():
    group = TokenizedGroup([1, 2], [[3, 4, 5], [6, 7, 8, 9]])
    assert cut(group, max_length=3, truncation_mode="keep_end") == ([], [[3, 4, 5], [7, 8, 9]], ["FTT", "FTT"])


def test_max_prompt_length_is_applied_first_from_the_kept_end():
    assert cut(max_prompt_length=2) == ([1, 2], [[5, 6, 7], [8]], None)
    assert cut(max_prompt_length=2, truncation_mode="keep_end") == ([3, 4], [[5, 6, 7], [8]], None)
    assert cut(max_prompt_length=2, max_length=4) == ([1, 2], [[5, 6], [8]], None)


def test_loss_masks_are_cut_with_their_tokens():
    group = TokenizedGroup([1, 2], [[3, 4, 5], [6, 7, 8]], [[True, False, True], [False, True, True]])
    assert cut(group, max_length=4) == ([1, 2], [[3, 4], [6, 7]], ["TF", "FT"])
    assert cut(group, max_length=4, truncation_mode="keep_end") == ([2], [[3, 4, 5], [6, 7, 8]], ["TFT", "FTT"])
    with pytest.raises(BadRow, match="no token of a response is scored"):
        cut(group, max_length=3)


def test_responses_that_differ_only_beyond_the_cut_are_refused():
    group = TokenizedGroup([1, 2], [[3, 4, 5], [3, 4, 6]])
    with pytest.raises(BadRow, match="chosen equals rejected after truncation"):
        cut(group, max_length=4)
    with pytest.raises(BadRow, match=r"chosen equals rejected$"):
        cut(TokenizedGroup([1, 2], [[3], [3]]), max_length=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_length", 1), ("max_prompt_length", 0), ("truncation_mode", "keep_middle"), ("on_bad_row", "ignore")],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*{value}"):
        TokenizationSettings(**{field: value})
