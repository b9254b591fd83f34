"""Generation for reports and evaluation: token ids of prompts in, token ids of a model's responses out.

Prompts are padded on the left. Sampling is plain ancestral sampling (no top-k, no top-p), so that samples follow the
model's own distribution; temperature 0 takes the likeliest token. The global random state does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.data.tokens.tokenization import padding_id
from fastdpo.modeling.allocation import is_out_of_memory
from fastdpo.modeling.backbone import bare_model


class DoesNotFit(ValueError):
    """A single answer does not fit into memory."""


@torch.no_grad()
def generate_ids(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    *,
    pad_id: int,
    eos_ids: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    streamer: Any = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """One response to each prompt, with an EOS if the model wrote one. The model's mode does not change.

    Args:
        model: a causal LM with `generate`, wrapped by PEFT or not.
        pad_id, eos_ids: from `special_ids`.
        temperature: >= 0.
        batch_size: sequences generated at a time; halved when memory runs out.
        seed: equal seeds give equal samples on equal machines.
        streamer: of transformers, which gets the tokens of a single prompt as they come.
        progress: called after each batch with the number of finished responses.
    Raises:
        DoesNotFit: memory runs out with a single sequence.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    generation_config = GenerationConfig(
        **sampling, max_new_tokens=max_new_tokens, pad_token_id=pad_id, eos_token_id=eos_ids, use_cache=True
    )
    response_ids: list[list[int]] = []
    was_training, bare = model.training, bare_model(model)
    model.eval()
    # unset fields, such as a repetition penalty, would be taken from the model's own generation config
    of_model, bare.generation_config = bare.generation_config, GenerationConfig()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            while len(response_ids) < len(prompt_ids):
                chunk = prompt_ids[len(response_ids) : len(response_ids) + batch_size]
                input_ids, attention_mask = pad_rows(chunk, pad_id, model.device, left=True)  # (B, P)
                try:
                    output = model.generate(
                        input_ids=input_ids,
                        attention_mask=attention_mask,
                        generation_config=generation_config,
                        streamer=streamer,
                    )
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(chunk) == 1:
                        raise DoesNotFit(
                            f"max_new_tokens must be smaller, got {max_new_tokens}: that many and a prompt of"
                            f" {len(chunk[0])} tokens do not fit into memory by themselves"
                        ) from None
                    batch_size = len(chunk) // 2
                    said = f"Out of memory; continuing to generate with {batch_size} sequences at a time"
                    logging.get_logger(__name__).warning(said)
                    continue
                response_ids += [_until_eos(row, eos_ids) for row in output[:, input_ids.shape[1] :].tolist()]
                progress(len(response_ids))
    finally:
        bare.generation_config = of_model
        model.train(was_training)
    return response_ids


def special_ids(model: Any, tokenizer: Any) -> tuple[int, list[int]]:
    """The padding id and the ids that end a response: the model's own (chat models have several) or the tokenizer's.

    Raises:
        ValueError: the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an eos_token, got None")
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    return padding_id(tokenizer), list(eos) if isinstance(eos, (list, tuple)) else [int(eos)]


def _until_eos(ids: list[int], eos_ids: list[int]) -> list[int]:
    """[7, 9, eos, pad, pad] -> [7, 9, eos]: pad may equal eos, so only the first one counts."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids) - 1)
    return ids[: end + 1]


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, device: Any, *, left: bool) -> tuple[Tensor, Tensor]:
    """Rows of ids as (B, longest) int64 with their attention mask."""
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        input_ids[i, columns] = torch.tensor(row)
        attention_mask[i, columns] = 1
    return input_ids.to(device), attention_mask.to(device)
