"""Rows are tokenized together, and the prompt once: the tokens are those of every text alone."""

import pytest
from tiny_tokenizers import CHATML, byte_level_tokenizer
from tokenizers import AddedToken

from fastdpo.data.rows.columns import RowPreparer
from fastdpo.data.tokens.encoding import TextEncoder, common_start
from fastdpo.data.tokens.tokenization import TokenizationSettings, encode_row
from fastdpo.types import PreferenceRow

SPECIAL = ("<|im_start|>", "<|im_end|>")
WHOLE = TokenizationSettings(max_length=None)
USER = {"role": "user", "content": "the cat?"}
ROWS = [
    ["<|im_start|>the c", "<|im_start|>the cat sat", "<|im_start|>the cow"],
    ["the c", "the cat", "the cow"],  # nothing to cut at
    ["a<|im_end|>", "a<|im_end|> b", "a<|im_end|>"],
    ["a <|im_start|><|im_end|>\n\n", "a <|im_start|><|im_end|>\n\n\n b", "a <|im_start|><|im_end|>\n\n c"],
    ["<|im_end", "<|im_end|>", "<|im_end"],
    ["", "x", "y"],
    ["<|im_start|>the c", "<|im_start|>the cat sat", "<|im_start|>the cow"],
]


def alone(tokenizer, rows):
    return [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] for texts in rows]


def llama_tokenizer(**how):
    """SentencePiece's manner: a space before the first word only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    names = ["<unk>", "<s>", "</s>", *SPECIAL]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat and a dog b c x y \n<|>_imstarend"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


TOKENIZERS = {
    "byte_level": lambda: byte_level_tokenizer(bos="<s>", prefix=["<s>"], special=SPECIAL),
    "metaspace": llama_tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_shared_prompts_give_the_tokens_of_every_text_alone(name):
    tokenizer = TOKENIZERS[name]()
    assert TextEncoder(tokenizer).encode_rows(ROWS) == alone(tokenizer, ROWS)


def test_the_prompt_is_tokenized_once():
    tokenizer = byte_level_tokenizer(special=SPECIAL)
    seen = []

    class Counting(TextEncoder):
        def encode(self, texts):
            seen.extend(texts)
            return super().encode(texts)

    encoder = Counting(tokenizer)
    encoder._num_to_prove = 0
    prompt = "the cat sat " * 20 + "<|im_end|>"
    encoder.encode_rows([[prompt, prompt + " yes", prompt + " no"], [prompt, prompt + " yes", prompt + " never"]])
    assert sum(text.count("the cat sat") for text in seen) == 20
    assert sorted(text for text in seen if "cat" not in text) == [
        "<|im_end|>",
        "<|im_end|> never",
        "<|im_end|> no",
        "<|im_end|> yes",
    ]


def test_a_tokenizer_whose_tokens_depend_on_what_stands_before_is_found_out_and_asked_whole():
    class Odd(TextEncoder):
        def encode(self, texts):
            return [[len(text), *ids] for text, ids in zip(texts, super().encode(texts), strict=True)]

    encoder = Odd(byte_level_tokenizer(special=SPECIAL))
    assert encoder.encode_rows(ROWS) == [encoder.encode(texts) for texts in ROWS]


@pytest.mark.parametrize("how", [{"single_word": True}, {"normalized": True}, {"rstrip": True}, {"lstrip": True}])
def test_added_tokens_of_every_kind_change_nothing(how):
    tokenizer = byte_level_tokenizer(special=SPECIAL)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<end>", special=True, **how)]})
    rows = [[f"a cat {end} ", f"a cat {end} sat", f"a cat {end}  on"] for end in ("<end>", "x<end>", "<end>y", "<end")]
    assert TextEncoder(tokenizer).encode_rows(rows) == alone(tokenizer, rows)


def test_a_token_inside_a_longer_one_is_no_place_to_cut():
    tokenizer = byte_level_tokenizer(special=("<end>", "<end>>"))
    rows = [["a<end>", "a<end>>", "a<end>> b"], ["a<end>>", "a<end>>>", "a<end>> c"]]
    assert TextEncoder(tokenizer).encode_rows(rows) == alone(tokenizer, rows)


def test_a_tokenizer_without_a_fast_backend_gives_the_same_rows():
    from transformers import PythonBackend

    class Letters(PythonBackend):
        def __init__(self, **kwargs):
            self._letters = {letter: i for i, letter in enumerate("_ abcdefghijklmnopqrstuvwxyz?\n:")}
            super().__init__(eos_token="</s>", unk_token="_", **kwargs)

        @property
        def vocab_size(self):
            return len(self._letters)

        def get_vocab(self):
            return {**self._letters, **self.added_tokens_encoder}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return self._letters.get(token, 0)

        def _convert_id_to_token(self, index):
            return list(self._letters)[index]

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    tokenizer = Letters()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "assistant", "content": "use a </s> b"}, USER, {"role": "assistant", "content": "ran"}]
    row = PreferenceRow([USER], (turns, [{"role": "assistant", "content": "no"}]))
    group, _ = encode_row(row, tokenizer)
    assert list(group.responses[0]).count(tokenizer.eos_token_id) == 3  # the ends of three turns, no text
    assert tokenizer.decode(group.prompt_ids) == "user: the cat?</s>assistant: "
    pairs = zip(group.responses[0], group.loss_masks[0], strict=True)
    assert "cat" not in tokenizer.decode([token for token, counts in pairs if counts])


def test_rows_that_differ_in_every_way_stand_in_one_batch():
    tokenizer = byte_level_tokenizer(bos="<s>", special=SPECIAL, chat_template="{{ mood }}" + CHATML)
    answers = {
        "chosen": [{"role": "assistant", "content": "sat"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    examples = [
        {"prompt": [USER], **answers},
        {"prompt": [USER], **answers, "chat_template_kwargs": {"mood": "kind "}},
        {"prompt": "text", "chosen": " a", "rejected": " b"},
        {"prompt": [USER], **answers, "chat_template_kwargs": {"mood": "kind "}},
        {"prompt": [USER], **answers, "chat_template_kwargs": {"chat_template": "{{ raise_exception('no') }}"}},
        {"prompt": [], **answers},
        {"prompt": [{"role": "user", "content": "</s>?"}], **answers},
        {"prompt": [USER], "chosen": answers["chosen"], "rejected": answers["chosen"]},
        {"prompt": [USER], **answers},
    ]
    prepare = RowPreparer(tokenizer, WHOLE, is_sft=False)
    together = prepare.columns(examples, range(len(examples)))
    for number, example in enumerate(examples):
        assert RowPreparer(tokenizer, WHOLE, is_sft=False).columns([example], [number])[0] == together[number]
    assert [columns["bad_row"] for columns in together] == [
        None,
        None,
        None,
        None,
        "the chat template refuses the messages (no)",
        "empty prompt",
        None,
        "chosen equals rejected",
        None,
    ]
    assert tokenizer.decode(together[3]["prompt_ids"]).startswith("kind <|im_start|>user")


def test_what_texts_begin_with():
    assert common_start(["abc", "abd", "ab"]) == "ab"
    assert common_start(["abc", "abd"]) == "ab"
    assert common_start(["abc", "x"]) == ""
    assert common_start(["same", "same"]) == "same"
    assert common_start(["a" * 1000 + "b", "a" * 1000 + "c" * 9]) == "a" * 1000
