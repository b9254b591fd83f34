"""The model that both sides start from."""

import pytest
from tiny import make_llama, make_tokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A two-layer Llama on disk: TRL reads its reference from where the policy came from."""
    folder = tmp_path_factory.mktemp("parity_model")
    make_llama(hidden_size=16, intermediate_size=32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
