"""Samples from a model, and their KL divergence to a reference.

In: a causal LM, its tokenizer, prompts as text. Out: Samples (text and token ids), and per sample the KL divergence to
a reference in nats. Prompts are padded on the left for generation; sampling is plain ancestral sampling (no top-k, no
top-p), because KL estimates need samples from the model's own distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.modeling.generation import generate_ids, pad_rows, special_ids


@dataclass(frozen=True)
class Samples:
    """N responses in the order of their prompts; the samples of one prompt are adjacent."""

    prompts: tuple[str, ...]  # N
    responses: tuple[str, ...]  # N, decoded without special tokens
    prompt_ids: tuple[list[int], ...]  # N, with the tokenizer's BOS where it has one
    response_ids: tuple[list[int], ...]  # N, with the EOS where the model wrote one before max_new_tokens

    def __len__(self) -> int:
        return len(self.responses)


@torch.no_grad()
def sample_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> Samples:
    """Draws `num_samples` responses to each prompt from `model`. The global random state does not change.

    Args:
        model: a causal LM with `generate`.
        tokenizer: its tokenizer, with an EOS token; padding uses the EOS if there is no pad token.
        prompts: plain text; the tokenizer adds its special tokens.
        num_samples: responses per prompt.
        max_new_tokens: maximum length of a response.
        temperature: >= 0; 1.0 samples the model's own distribution, 0 takes the likeliest token.
        batch_size: sequences generated at a time.
        seed: equal seeds give equal samples on equal machines.
    Raises:
        ValueError: an argument out of range, no prompts, or a tokenizer without EOS.
    """
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if len(prompts) == 0:
        raise ValueError("prompts must hold at least one prompt, got none")
    pad_id, eos_ids = special_ids(model, tokenizer)
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    prompt_ids = tokenizer(repeated)["input_ids"]
    response_ids = generate_ids(
        model,
        prompt_ids,
        pad_id=pad_id,
        eos_ids=eos_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
    )
    responses = tokenizer.batch_decode(response_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Samples(tuple(repeated), tuple(responses), tuple(prompt_ids), tuple(response_ids))


@torch.no_grad()
def kl_to_reference(model: Any, ref_model: Any, samples: Samples, *, batch_size: int = 64) -> Tensor:
    """KL(policy || reference) of whole responses, one estimate per sample: (N,) fp64 on the CPU, nats.

    Each estimate is the sum over the response's tokens of the exact KL between the two next-token distributions. Its
    mean over samples that `model` drew at temperature 1 has the same expectation as the mean of
    `logp_policy - logp_ref` (the chain rule of KL), with less variance, and no estimate is negative. Builds
    (batch_size, length, V) log-probs of both models.
    """
    estimates = []
    pairs = zip(
        _response_logps(model, samples, batch_size), _response_logps(ref_model, samples, batch_size), strict=True
    )
    for (policy, mask), (reference, _) in pairs:
        per_token = (policy.exp() * (policy - reference)).sum(-1)  # (B, L)
        estimates.append((per_token * mask).sum(-1).double().cpu())
    return torch.cat(estimates)


def _response_logps(model: Any, samples: Samples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Next-token log-probs (B, L, V) fp32 over the response tokens, and the mask (B, L) that keeps real ones."""
    was_training = model.training
    model.eval()
    for start in range(0, len(samples), batch_size):
        prompt_ids = samples.prompt_ids[start : start + batch_size]
        response_ids = samples.response_ids[start : start + batch_size]
        rows = [[*p, *r] for p, r in zip(prompt_ids, response_ids, strict=True)]
        input_ids, attention_mask = pad_rows(rows, 0, model.device, left=False)  # (B, P + L)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (B, P + L, V)
        # Response token j of a row with P prompt tokens is predicted at position P - 1 + j.
        lengths = torch.tensor([len(r) for r in response_ids], device=model.device)
        steps = torch.arange(int(lengths.max()), device=model.device)
        first = torch.tensor([len(p) - 1 for p in prompt_ids], device=model.device)
        positions = (first[:, None] + steps).clamp(max=logits.shape[1] - 1)  # (B, L)
        picked = logits.gather(1, positions[:, :, None].expand(-1, -1, logits.shape[-1]))
        yield picked.float().log_softmax(-1), steps < lengths[:, None]
    model.train(was_training)
