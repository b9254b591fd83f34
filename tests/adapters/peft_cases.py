"""Tiny models with adapters that have learned something, and the plain forwards that packed ones are held to."""

import torch
from peft import LoraConfig, get_peft_model
from tiny import make_llama

from fastdpo import TokenizedGroup, TokenizedPair, pack_pairs, packed_logps
from fastdpo.modeling import packed_loss

GROUPS = [
    TokenizedPair([5, 6, 7, 8], [11, 12, 13, 14, 15], [16, 17, 18]),
    TokenizedPair([20], [21], [22, 23, 24, 25, 26]),
    TokenizedGroup([4, 9, 3], [[7, 8], [7, 10, 2]], preferences=[(1, 0)]),
]
WEIGHTS = torch.linspace(-1.0, 1.3, 6, dtype=torch.float64)  # of the six sequences' log-probs in the loss


def lora(*target_modules, **settings):
    targets = list(target_modules) or ["q_proj", "v_proj"]
    return LoraConfig(**{"r": 3, "target_modules": targets, "task_type": "CAUSAL_LM", **settings})


def learned(model, seed=5, scale=0.2):
    """The model after its trained weights have moved, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)
    return model


def adapted(*configs, dtype=torch.float64, is_learned=True, **model_settings):
    """A tiny Llama with adapters, in fp64 unless told otherwise; the first is active. All have learned something."""
    torch.manual_seed(0)
    model = get_peft_model(make_llama(**model_settings), configs[0])
    for number, config in enumerate(configs[1:]):
        model.add_adapter(f"other{number}", config)
    for name in [*list(model.peft_config)[1:], "default"] if is_learned else ["default"]:
        model.set_adapter(name)
        if is_learned:
            learned(model, seed=len(name))
    return model.to(dtype)


def plain_sums(model, groups=GROUPS):
    """(S,) summed log-probs from the model's own forward and full logits, one unpadded sequence at a time."""
    sums = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            sums.append(logps.gather(1, ids[0, 1:, None])[len(group.prompt_ids) - 1 :].sum())
    return torch.stack(sums)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_like_plain(model, layout=pack_pairs, tolerance=1e-7):
    """Log-probs and every gradient, by autograd and made in forward, are those of the model's own forward.

    A model in fp64 normalizes in fp32, which is what the tolerance allows for.
    """
    batch = layout(GROUPS)
    weights = WEIGHTS.to(next(model.parameters()).dtype)
    expected = plain_sums(model)
    expected_grads = gradients(model, (weights * expected).sum())
    found = packed_logps(model, batch).sequences.sums
    by_autograd = gradients(model, (weights * found).sum())
    loss, logps = packed_loss(model, batch, lambda sums, _, sequences, pairs: (weights[sequences] * sums).sum())
    in_forward = gradients(model, loss)
    for sums in (found, logps.sequences.sums):
        torch.testing.assert_close(sums.double(), expected.double(), rtol=tolerance, atol=tolerance)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    for grads in (by_autograd, in_forward):
        assert grads.keys() == expected_grads.keys() <= trained
        for name, grad in grads.items():
            assert (grad - expected_grads[name]).abs().max() <= 10 * tolerance * expected_grads[name].abs().max(), name
    return expected_grads
