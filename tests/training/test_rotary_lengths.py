"""Models whose rotary positions follow the longest sequence of a batch, and the warning where that shows."""

import pytest
import torch
from tiny import make_llama, make_tokenizer

from fastdpo import DPOConfig, DPOTrainer, TokenizedPair, pack_pairs, packed_logps
from fastdpo.training import rotary
from fastdpo.training.rotary import first_length

DYNAMIC = {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}
SHORT, LONG = ([1, 5, 6], [7, 8], [9]), ([1, 5, 6], [7, 8, 9, 10, 11, 12], [9])


def test_a_short_sequence_has_other_log_probs_beside_a_long_one():
    """What the warning is about; if transformers stops doing this, the warning can go."""
    torch.manual_seed(0)
    model = make_llama(**DYNAMIC).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        alone, beside = (packed_logps(model, pack_pairs(pairs)).chosen[0] for pairs in ([short()], [short(), long()]))
    assert abs(alone - beside) > 1e-3


def short():
    return TokenizedPair(*SHORT)


def long():
    return TokenizedPair(*LONG)


@pytest.mark.parametrize(("rows", "is_warned"), [((SHORT, LONG), True), ((SHORT, SHORT), False)])
@pytest.mark.parametrize("model_settings", [DYNAMIC, {}], ids=["dynamic", "default"])
def test_rows_on_both_sides_of_the_length_are_warned_of(tmp_path, monkeypatch, rows, is_warned, model_settings):
    warned = []
    monkeypatch.setattr(rotary.logger, "warning", warned.append)
    DPOTrainer(
        make_llama(**model_settings),
        args=DPOConfig(str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=[{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows],
        processing_class=make_tokenizer(),
    )
    assert len(warned) == (is_warned and bool(model_settings))
    if warned:
        assert "1 of 4 sequences of the train dataset are longer than 8 tokens" in warned[0]


def test_the_length_is_the_one_that_the_model_was_first_trained_on():
    from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config

    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 4096, **factors}
    assert first_length(Phi3Config(max_position_embeddings=131072, rope_parameters=longrope, pad_token_id=0)) == 4096
    assert first_length(LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0})) is None
    assert first_length(Gemma3TextConfig()) is None
