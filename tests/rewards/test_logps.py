"""Log-probs of responses are those of separate forwards over full logits, and those that the trainer sees."""

import pytest
import torch
from tiny import make_llama, make_tokenizer

from fastdpo import DPOConfig
from fastdpo.rewards.logps import response_logps

ROWS = [
    {"prompt": "the cat", "chosen": "sees a dog", "rejected": "never"},
    {"prompt": "the cat", "chosen": "today", "rejected": "today"},  # cannot be used
    {"prompt": "a bird", "responses": ["eats", "finds the tree", "likes today"], "scores": [1.0, 3.0, 2.0]},
]


def config(tmp_path, **settings):
    return DPOConfig(str(tmp_path / "out"), ref_cache_dir=str(tmp_path / "cache"), use_cpu=True, **settings)


def full_logits(model, tokenizer, prompt, response):
    """The sum over the response's tokens and its EOS, from a forward of its own."""
    start = tokenizer(prompt)["input_ids"]
    answer = tokenizer(response, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*start, *answer, tokenizer.eos_token_id]])
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum().item()


def test_every_response_has_the_log_prob_of_its_own_forward(tmp_path):
    model, tokenizer = make_llama(), make_tokenizer()
    pair, ranking = ROWS[0], ROWS[2]
    for rows, texts in (([pair], [("sees a dog", "never")]), ([ranking], [("eats", "finds the tree", "likes today")])):
        scored = response_logps(model, config(tmp_path), rows, processing_class=tokenizer).rows
        for found, responses in zip(scored, texts, strict=True):
            expected = [full_logits(model, tokenizer, rows[0]["prompt"], response) for response in responses]
            assert sorted(found.logps) == pytest.approx(sorted(expected), rel=1e-5)


def test_rows_keep_their_numbers_where_others_are_dropped(tmp_path):
    rows = [ROWS[0], ROWS[1], {**ROWS[0], "prompt": "a river"}]
    data = response_logps(make_llama(), config(tmp_path), rows, processing_class=make_tokenizer())
    assert [scored.row for scored in data.rows] == [0, 2]
    assert data.report.num_dropped == 1
    assert data.rows[0].preferences == ((0, 1),)
    assert data.rows[0].lengths == (4, 2)  # a token for each word, and EOS
