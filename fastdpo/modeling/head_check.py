"""Checks that a model is causal, and finds what stands between its decoder and its LM head.

All checks run the stock model. Refused: encoders, in which a token's logits depend on later tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.backbone import backbone_name, text_ids
from fastdpo.modeling.mixers.arguments import leaves

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
            f" token change with later tokens{_where(bare, rows)} (for some models, is_decoder=True in the config"
            " helps)"
        )


def _where(bare: Any, rows: Tensor) -> str:
    """', from transformer.layer.0.rel_attn on': the innermost module that first lets a token see the last one."""
    names = {module: name for name, module in bare.named_modules() if name}
    runs: list[dict[str, tuple[list[Tensor], list[Tensor]]]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        runs[-1].setdefault(names[module], (_before_last((args, kwargs)), _before_last(output)))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in names]
    try:
        for row in rows:
            runs.append({})
            bare(input_ids=row[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    first, second = runs
    for name, (inputs, outputs) in first.items():  # in the order in which they end
        other_inputs, other_outputs = second.get(name, (inputs, outputs))
        if inputs and not _differ(inputs, other_inputs) and _differ(outputs, other_outputs):
            return f", from {name} on"
    return ""


def _before_last(value: Any) -> list[Tensor]:
    """The rows of all tokens but the last, of tensors (1, T, H) or (T, 1, H), also behind rows that the model adds."""
    tensors = [leaf for leaf in leaves(value) if isinstance(leaf, Tensor) and leaf.dim() == 3]
    rows = [leaf.flatten(0, 1) for leaf in tensors if leaf.is_floating_point() and 1 in leaf.shape[:2]]
    return [leaf[-_NUM_TOKENS:-1].double() for leaf in rows if len(leaf) >= _NUM_TOKENS]


def _differ(tensors: list[Tensor], others: list[Tensor]) -> bool:
    pairs = [(a, b) for a, b in zip(tensors, others, strict=False) if a.shape == b.shape]
    return any((a - b).abs().amax() > 1e-6 * a.abs().amax() for a, b in pairs if a.numel())


@torch.no_grad()
def before_head(bare: Any, token_ids: Sequence[int]) -> str:
    """What the logits are besides the LM head times the last hidden state, to follow the name of the model's class."""
    between = layers_before_head(bare, token_ids)
    if between:
        return f"has {' and '.join(between)} between the two"
    shapes: list[tuple[int, ...]] = []
    handle = bare.get_output_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        bare(input_ids=torch.tensor([list(token_ids)], device=next(bare.parameters()).device), use_cache=False)
    finally:
        handle.remove()
    if shapes and shapes[0][:-1] != (1, len(token_ids)):
        return f"applies the head to {shapes[0][:-1]} vectors, where the last hidden state has {(1, len(token_ids))}"
    return "does something else"


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
