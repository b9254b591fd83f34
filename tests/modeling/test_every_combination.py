"""Attention backend x layout x gradient checkpointing x LoRA: log-probs and gradients of separate unpadded forwards.

The rows are those that layouts go wrong on: responses and prompts of one token, responses equal up to the last token,
one the start of the other, and prompts that come back, with an answer that comes back too. The model has grouped heads,
a layer with a window shorter than the sequences and one without.
"""

import copy

import pytest
import torch
from test_attention_backends import emulated  # noqa: F401  the fixture
from test_packed_logps import build
from varlen_emulation import EMULATIONS

from fastdpo import PackedBatch, TokenizedPair, pack_pairs, packed_logps, prepare_model
from fastdpo.training.inputs.collator import PackingCollator, microbatches_of

PAIRS = [
    ([5, 6, 7], [8], [9]),  # responses of one token
    ([20], [21, 22, 23, 24], [25, 26]),  # a prompt of one token
    ([20], [5], [6]),
    ([30, 31], [32, 33, 34, 35, 36, 37, 38], [32, 33, 34, 35, 36, 37, 39]),  # equal up to the last token
    ([10, 11, 12], [13, 14], [13, 14, 15]),  # one is the start of the other
    ([40, 41, 42, 43], [44, 45, 46], [47, 48]),
    ([40, 41, 42, 43], [47, 48], [49, 50, 51]),  # the prompt again, and a response to it
    ([50, 51, 52, 53, 54, 55, 56, 57], [58, 59, 60, 61], [62, 63]),  # more tokens than a micro-batch may have
    ([40, 41, 42, 43], [44, 45, 52], [49, 50, 51]),
]
# of each response one of its own, so that no two can be swapped unseen
WEIGHTS = torch.linspace(-1.0, 1.3, 2 * len(PAIRS)).reshape(-1, 2)
ROWS = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in PAIRS]
LAYOUTS = {  # rows -> batches, and the tokens that run
    "unshared": (lambda: PackingCollator(prefix_sharing=False)(ROWS), 111),
    "shared": (lambda: pack_pairs([TokenizedPair(*pair) for pair in PAIRS]).asdict(), 74),
    "grouped": (lambda: PackingCollator()(ROWS), 58),
    "split": (lambda: PackingCollator(max_tokens=12)(ROWS), 67),
}


def make_model(has_adapter):
    model = build("gemma3_text", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    if not has_adapter:
        return model
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def separate_logp(model, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def separate():
    """By adapter or not: the model, log-probs (pairs, 2) of its own forwards, and gradients of their weighted sum."""
    found = {}
    for has_adapter in (False, True):
        model = make_model(has_adapter)
        stock = copy.deepcopy(model)
        logps = torch.stack([torch.stack([separate_logp(stock, p, y) for y in ys]) for p, *ys in PAIRS])
        (logps * WEIGHTS).sum().backward()
        found[has_adapter] = (model, logps.detach(), gradients(stock))
    return found


@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["sdpa", "mask", *EMULATIONS])
def test_log_probs_and_gradients_are_those_of_separate_forwards(
    backend,
    layout,
    checkpointing,
    has_adapter,
    separate,
    emulated,  # noqa: F811
):
    kernel = emulated(backend) if backend in EMULATIONS else None
    model, expected, expected_grads = separate[has_adapter]
    model = prepare_model(copy.deepcopy(model), attention_backend=backend)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()  # there is no dropout in it
    collate, num_tokens = LAYOUTS[layout]
    batches = [PackedBatch(**part) for part in microbatches_of(collate())]
    assert sum(batch.input_ids.numel() for batch in batches) == num_tokens

    actual = torch.zeros_like(expected)
    for batch in batches:
        logps = packed_logps(model, batch)
        pair = batch.example_ids[batch.pairs[:, 0]]  # the row that each pair of the batch is
        actual[pair] = torch.stack([logps.chosen, logps.rejected], 1).detach()
        (logps.chosen * WEIGHTS[pair, 0] + logps.rejected * WEIGHTS[pair, 1]).sum().backward()

    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    actual_grads = gradients(model)
    assert actual_grads.keys() == expected_grads.keys()
    floor = 0.05 * torch.stack([grad.norm() for grad in expected_grads.values()]).median()
    for name, grad in expected_grads.items():
        error = (actual_grads[name] - grad).norm() / grad.norm().clamp(min=floor)
        assert error < 1e-5, f"{name}: {error:.1e}"
    if kernel is not None:
        assert kernel.num_calls == len(batches) * 2 * (2 if checkpointing else 1)
