"""Fixtures for the data tests: tokenizers trained on the spot, and the real files where they are."""

from pathlib import Path

import pytest
from tiny_tokenizers import CHATML, byte_level_tokenizer


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
