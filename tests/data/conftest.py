"""Small tokenizers, trained here, that differ in what they put around a text."""

from pathlib import Path

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "a good answer is short and a bad answer is long",
    "what is the capital of France? Paris is the capital of France.",
]


def byte_level_tokenizer(*, vocab_size=320, bos=None, eos="</s>", prefix=(), suffix=(), special=(), chat_template=None):
    """A byte-level BPE; `prefix` and `suffix` are the special tokens that it puts around every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special_tokens = [token for token in (bos, eos) if token] + list(special)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if prefix or suffix:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*prefix, "$A", *suffix]),
            special_tokens=[(token, backend.token_to_id(token)) for token in {*prefix, *suffix}],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def bos_tokenizer():
    """Llama's manner: a BOS before every text, and a ChatML template with <|im_end|> that is not the EOS."""
    special = ("<|im_start|>", "<|im_end|>")
    return byte_level_tokenizer(bos="<s>", prefix=["<s>"], special=special, chat_template=CHATML)


@pytest.fixture(scope="session")
def plain_tokenizer():
    """GPT-2's manner: nothing around a text, no BOS, no chat template."""
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real preference files beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder
