"""Checks that a model is causal, and finds the layers between its decoder and its LM head.

Both checks run the stock model. Refused: encoders, in which a token's logits depend on later tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastdpo.modeling.backbone import backbone_name, text_ids

_NUM_TOKENS = 6
_SEEN = {torch.float64: 1e-5, torch.float32: 1e-5}  # smallest relative change of logits that counts
_SEEN_IN_16_BIT = 2e-2


@torch.no_grad()
def check_causal(bare: Any, device: torch.device) -> None:
    """Raises:
    ValueError: the logits of a token change with a later token.
    """
    ids = text_ids(bare)[: _NUM_TOKENS * 2].to(device)
    if len(ids) < _NUM_TOKENS + 1:
        return
    rows = torch.stack([ids[:_NUM_TOKENS], torch.cat([ids[: _NUM_TOKENS - 1], ids[-1:]])])
    logits = [bare(input_ids=row[None], use_cache=False).logits[0, : _NUM_TOKENS - 1].double() for row in rows]
    seen = _SEEN.get(next(bare.parameters()).dtype, _SEEN_IN_16_BIT)
    if (logits[0] - logits[1]).abs().max() > seen * logits[0].abs().max():
        raise ValueError(
            f"model must be a causal LM, got {type(bare).__name__}, which is configured as an encoder: the logits of a"
            " token change with later tokens (for some models, is_decoder=True in the config helps)"
        )


@torch.no_grad()
def layers_before_head(bare: Any, token_ids: Sequence[int]) -> list[str]:
    """Names of the outermost modules that run after the decoder, except the LM head; empty if there are none."""
    decoder = bare.get_submodule(backbone_name(bare))
    head, inside = bare.get_output_embeddings(), set(decoder.modules())
    after: list[str] = []
    is_behind = False

    def behind(*_: Any) -> None:
        nonlocal is_behind
        is_behind = True

    def note(name: str) -> Any:
        return lambda *_: after.append(name) if is_behind else None

    handles = [decoder.register_forward_hook(behind)]
    handles += [
        module.register_forward_pre_hook(note(name))
        for name, module in bare.named_modules()
        if name and module not in inside and not _holds(module, head)
    ]
    try:
        bare(input_ids=torch.tensor([list(token_ids)], device=next(bare.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in after if not any(name.startswith(f"{other}.") for other in after)]


def _holds(module: nn.Module, head: nn.Module) -> bool:
    return head in set(module.modules())
