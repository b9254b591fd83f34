"""A prompt that runs once, forward and backward, for several micro-batches of its responses.

In: packed batches of one prompt each, the same in all, and their losses. Out: a zero with the gradient of the summed
losses. The prompt runs forward, and leaves its keys and values of every layer and its last hidden state. In backward,
each batch runs forward and backward on these; their gradients add up, and the prompt's own backward goes on from there.
So one batch at a time has activations, beside the prompt's. Schedule-level reuse, arXiv 2606.01143. Log-probs without
a graph come from batches that run on the prompt's keys and values.

Refused with the reason: models that mix tokens in other ways than by attention of `packed_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastdpo.data.batches.varlen import varlen_layout
from fastdpo.modeling.attention import Prefix
from fastdpo.modeling.autocast import autocast_of
from fastdpo.modeling.backbone import bare_model, is_composite
from fastdpo.modeling.mixers import mixers_of
from fastdpo.modeling.packed import layout_of, packed_logps, packed_loss
from fastdpo.modeling.packed_forward import LossOfSums
from fastdpo.modeling.prepared import prepared_state
from fastdpo.types import PackedBatch, PairLogps


def why_prompt_repeats(model: nn.Module) -> str:
    """Why a prompt of this model must run with every micro-batch of its responses; empty if it need not."""
    bare, state = bare_model(model), prepared_state(model)
    mixers = mixers_of(bare)
    if getattr(bare, "_is_stateful", False) or (mixers is not None and (mixers.names or mixers.leaks)):
        return "layers mix tokens outside attention"
    if state.masks != "none" or state.attention_backend == "mask":
        return "layers read a mask of the whole row"
    if state.counting or any(getattr(module, "attn_temperature_tuning", False) for module in bare.modules()):
        return "layers count rows"
    if state.sequence_group is not None:
        return "processes compute rows together"
    return "the decoder is one of several parts" if is_composite(bare) else ""


def after_prompt(batch: PackedBatch, num_prompt: int) -> PackedBatch:
    """The rows of a batch after its prompt of P tokens, for a forward that continues the prompt.

    Responses [3 4] and [5] to the prompt [1 2]; row 0 of the hidden states is then that of the prompt's last token:

        input_ids     1 2 3 4 | 5            3 4 | 5
        position_ids  0 1 2 3 | 2            2 3 | 2
        segments      (0,4, 0,0) (4,5, 0,2)  (2,4, 0,2) (4,5, 0,2)
        logit_rows    1 2 1                  0 1 0
    """
    (_, end, _, _), *others = batch.segments
    segments = ((num_prompt, end, 0, num_prompt), *others)
    return replace(
        batch,
        input_ids=batch.input_ids[:, num_prompt:],
        position_ids=batch.position_ids[:, num_prompt:],
        logit_rows=batch.logit_rows - (num_prompt - 1),
        segments=segments,
        varlen=varlen_layout(segments).to(batch.input_ids.device),
        uses=None if batch.uses is None else batch.uses[:, num_prompt:],
    )


def prefix_of(model: nn.Module, batch: PackedBatch, num_prompt: int) -> Prefix:
    """The first P tokens of a batch after their forward, with a graph if one is recorded.

    Raises:
        PrefixRefused: the keys and values of a layer cannot be recorded.
    """
    segments, prefix = ((0, num_prompt, 0, 0),), Prefix(num_prompt)
    prompt = replace(
        batch,
        input_ids=batch.input_ids[:, :num_prompt],
        position_ids=batch.position_ids[:, :num_prompt],
        segments=segments,
        varlen=varlen_layout(segments).to(batch.input_ids.device),
    )
    model(input_ids=prompt.input_ids, packed_batch=prompt, packed_layout=layout_of(model, prompt, record=prefix))
    return prefix


def logps_of_parts(
    model: nn.Module, batches: Sequence[PackedBatch], num_prompt: int, **settings: Any
) -> Iterator[PairLogps]:
    """The log-probs of batches one after the other, as `packed_logps` gives them.

    Args:
        num_prompt: tokens of the prompt that all batches start with and that runs once; 0: they have none. A model that
            must repeat it does so.
        settings: of `packed_logps`.
    Raises:
        PrefixRefused: the keys and values of a layer cannot be recorded.
    """
    if num_prompt == 0 or why_prompt_repeats(model):
        yield from (packed_logps(model, batch, **settings) for batch in batches)
        return
    prefix = prefix_of(model, batches[0], num_prompt)
    yield from (packed_logps(model, after_prompt(batch, num_prompt), prefix=prefix, **settings) for batch in batches)


def loss_after_prompt(
    model: nn.Module, batches: Sequence[PackedBatch], num_prompt: int, losses: Sequence[LossOfSums], **settings: Any
) -> Tensor:
    """(), zero, with the gradient of the sum of the batches' losses.

    Args:
        batches: each starts with the same prompt of P tokens, and all its branches continue it.
        losses: of each batch, as in `packed_loss`; they are known before, or of no interest.
        settings: of `packed_loss`.
    Raises:
        PrefixRefused: the keys and values of a layer cannot be recorded.
    """
    prefix = prefix_of(model, batches[0], num_prompt)
    rest = [after_prompt(batch, num_prompt) for batch in batches]
    tensors, shape = prefix.tensors(), prefix.of([torch.empty(0)] * len(prefix.tensors()))
    autocast = autocast_of(batches[0].input_ids.device.type)

    def backward(leaves: Sequence[Tensor], grad: Tensor) -> None:
        for batch, loss_of in zip(rest, losses, strict=True):
            with torch.autocast(**autocast):
                loss, _ = packed_loss(model, batch, loss_of, prefix=shape.of(leaves), **settings)
            torch.autograd.backward(loss, grad.to(loss.dtype))

    anchor = torch.zeros((), device=batches[0].input_ids.device, requires_grad=True)
    zero: Tensor = Continued.apply(anchor, backward, *tensors)
    return zero


class Continued(torch.autograd.Function):
    """A zero whose backward runs what continues the tensors, and returns their gradients."""

    @staticmethod
    def forward(ctx: Any, anchor, backward, *tensors):  # type: ignore[override]
        ctx.run = backward
        ctx.save_for_backward(*tensors)
        return anchor.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        wanted = ctx.needs_input_grad[2:]
        leaves = [x.detach().requires_grad_(is_wanted) for x, is_wanted in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            ctx.run(leaves, grad)
        return None, None, *(leaf.grad for leaf in leaves)
