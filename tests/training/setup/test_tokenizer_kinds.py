"""Tokenizers that pad on the left or have no token to pad with: neither changes what is learned."""

import pytest
import tiny_runs
from tiny import make_tokenizer
from tiny_runs import tiny_trainer


def losses(tmp_path, tokenizer, packing):
    return tiny_runs.losses(
        tiny_trainer(tmp_path, num_rows=8, processing_class=tokenizer, packing=packing, max_steps=2)
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("expected"), make_tokenizer(), "packed")


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_on_which_a_tokenizer_pads_changes_nothing(tmp_path, expected, side, packing):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = tokenizer.truncation_side = side
    assert losses(tmp_path, tokenizer, packing) == pytest.approx(expected, abs=1e-5)
    assert tokenizer.padding_side == side


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_tokenizer_without_a_pad_token_trains_the_same(tmp_path, expected, packing):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert losses(tmp_path, tokenizer, packing) == pytest.approx(expected, abs=1e-5)
    assert tokenizer.pad_token is None
