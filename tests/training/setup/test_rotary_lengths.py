"""Models whose rotary positions follow the longest sequence of a batch, and the warning where that shows."""

import pytest
import torch
from tiny import make_llama, make_tokenizer

from fastdpo import DPOConfig, DPOTrainer, TokenizedPair, pack_pairs, packed_logps
from fastdpo.training.setup import rotary
from fastdpo.training.setup.rotary import length_dependent_rope

DYNAMIC = {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8}
LONGROPE = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}}
SHORT, LONG = ([1, 5, 6], [7, 8], [9]), ([1, 5, 6], [7, 8, 9, 10, 11, 12], [9])
LONGER = ([1, 5, 6], [7, 8, 9, 10, 11, 12], [9, 4, 5, 6, 7, 8, 9])


@pytest.mark.parametrize(
    ("limit", "settings"),
    [(8, DYNAMIC), (8, LONGROPE), (4, {**DYNAMIC, "max_position_embeddings": 4})],
    ids=["dynamic", "longrope", "dynamic, both long"],
)
def test_a_sequence_has_other_log_probs_beside_a_longer_one(limit, settings):
    """What the warning is about; if transformers stops doing this, the warning can go."""
    torch.manual_seed(0)
    model = make_llama(**settings).eval()
    assert length_dependent_rope(model.config)[1] == limit
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        alone, beside = (packed_logps(model, pack_pairs(pairs)).chosen[0] for pairs in ([short()], [short(), long()]))
    assert abs(alone - beside) > 1e-3


def short():
    return TokenizedPair(*SHORT)


def long():
    return TokenizedPair(*LONG)


@pytest.mark.parametrize(
    ("model_settings", "rows", "num_longer"),
    [
        (DYNAMIC, (SHORT, LONG), 1),
        (DYNAMIC, (SHORT, SHORT), 0),
        (DYNAMIC, (LONGER, LONGER), 4),
        (LONGROPE, (SHORT, LONG), 1),
        (LONGROPE, (LONGER, LONGER), 0),  # all of them have the long factors
        ({}, (SHORT, LONG), 0),
    ],
)
def test_rows_whose_positions_depend_on_their_batch_are_warned_of(
    tmp_path, monkeypatch, model_settings, rows, num_longer
):
    warned = []
    monkeypatch.setattr(rotary.logger, "warning", warned.append)
    DPOTrainer(
        make_llama(**model_settings),
        args=DPOConfig(str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=[{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows],
        processing_class=make_tokenizer(),
    )
    assert len(warned) == (num_longer > 0)
    if warned:
        assert f"{num_longer} of 4 sequences of the train dataset are longer than 8 tokens" in warned[0]


def test_the_length_is_the_one_that_the_model_was_first_trained_on():
    from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config

    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 4096, **factors}
    phi3 = Phi3Config(max_position_embeddings=131072, rope_parameters=longrope, pad_token_id=0)
    assert length_dependent_rope(phi3) == ("longrope", 4096)
    assert (
        length_dependent_rope(LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}))
        is None
    )
    assert length_dependent_rope(Gemma3TextConfig()) is None
