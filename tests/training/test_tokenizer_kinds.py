"""Tokenizers that pad on the left or have no token to pad with: neither changes what is learned."""

import pytest
from datasets import Dataset
from tiny import make_llama, make_rows, make_tokenizer

from fastdpo import DPOConfig, DPOTrainer

SETTINGS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


def losses(tmp_path, tokenizer, packing):
    trainer = DPOTrainer(
        make_llama(),
        args=DPOConfig(str(tmp_path), packing=packing, **SETTINGS),
        train_dataset=Dataset.from_list(make_rows(8)),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


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
