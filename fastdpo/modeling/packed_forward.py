"""`forward` and `generate` of a prepared model: a batch of ours runs through backbone and head, other calls as before.

Backbone and head run inside the wrapped model's own forward, so that DDP, FSDP and autocast see an ordinary call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdpo.modeling.attention import PackedLayout, masks_of
from fastdpo.modeling.embedding import EmbeddingGradient
from fastdpo.modeling.head import LMHead, inside, lm_head, shards_weights
from fastdpo.modeling.positions import told_positions
from fastdpo.modeling.prepared_state import STATE, PreparedState, as_it_came, set_attention, set_mixers
from fastdpo.modeling.router import load_balancing_loss
from fastdpo.modeling.sequence_parts import joined_outputs, own_part
from fastdpo.ops import linear_logps, sequence_logps
from fastdpo.ops.sequence_loss import GroupEnd, sequence_loss
from fastdpo.types import PackedBatch

LossOfSums = Callable[..., Tensor]


def forward_with_signature_of(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`_forward` with the signature of the stock forward.

    transformers reads the signature: `generate` makes position_ids for left-padded prompts, and requests only the last
    token's logits, if forward names these arguments.
    """

    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(model, *args, **kwargs)

    signature = inspect.signature(stock)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])  # type: ignore[attr-defined]
    return forward


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    state: PreparedState = getattr(model, STATE)
    assert state.generate is not None
    with as_it_came(model):
        return state.generate(*args, **kwargs)


def _forward(
    model: Any,
    *args: Any,
    packed_batch: PackedBatch | None = None,
    packed_layout: PackedLayout | None = None,
    impl: str = "auto",
    outputs: tuple[str, ...] = (),
    loss_of: LossOfSums | None = None,
    summed: tuple[str, ...] = (),
    router_aux_loss: bool = False,
    **kwargs: Any,
) -> Any:
    """The `model.forward` of a prepared model: the model's own forward unless a packed batch is given.

    A row that is recorded does not go through the head: nothing is returned.
    """
    state: PreparedState = getattr(model, STATE)
    if packed_batch is None:
        with as_it_came(model):
            return state.forward(*args, **kwargs)
    group = None if packed_layout is None else packed_layout.group
    batch = packed_batch if group is None else own_part(packed_batch, group)
    set_attention(state, packed=batch.is_packed)
    set_mixers(model, packed_layout)
    layout: dict[str, Any]
    if packed_layout is not None:
        layout = {"position_ids": batch.position_ids, "packed_layout": packed_layout}
        if state.attention_backend == "mask":  # for models that pass only a mask to their attention
            layout["attention_mask"] = packed_layout.row_mask(None)[None, None]
    else:
        layout = {"attention_mask": batch.attention_mask}
    if router_aux_loss:
        layout["output_router_logits"] = True
    decoder, embedded = model.get_submodule(state.backbone), EmbeddingGradient(model)
    positions = told_positions(decoder, state.counting, layout.get("position_ids"))
    with masks_of(packed_layout), positions, embedded.of_embedding():
        backbone = decoder(input_ids=batch.input_ids, use_cache=False, **layout)
    hidden_states = backbone.last_hidden_state.flatten(0, 1)
    if packed_layout is not None and packed_layout.record is not None:
        # a copy, since a view would keep the hidden states of all rows
        packed_layout.record.last_hidden_state = hidden_states[-1:].clone()
        packed_layout.record = None  # layers that run again in backward are not recorded again
        return {}
    if packed_layout is not None and packed_layout.prefix is not None:
        hidden_states = packed_layout.prefix.with_last(hidden_states)

    def head_outputs(rows: Tensor) -> dict[str, Tensor]:
        if group is not None:
            return _token_outputs(model, batch, rows, embedded, impl, outputs)
        return _head_outputs(model, batch, rows, embedded, impl, outputs, loss_of, summed)

    rows = hidden_states.index_select(0, batch.logit_rows)
    result: dict[str, Tensor] = inside(model.get_output_embeddings(), head_outputs, rows)
    if group is not None:
        result = joined_outputs(result, packed_batch, group, impl)
    if router_aux_loss:
        assert batch.uses is not None
        settings = {} if group is None else {"total": group.total}
        uses, num_chosen = batch.uses.flatten(), model.num_experts_per_tok
        result["aux_loss"] = load_balancing_loss(backbone.router_logits, uses, num_chosen, **settings)
    return result


def _token_outputs(
    model: Any, batch: PackedBatch, rows: Tensor, embedded: EmbeddingGradient, impl: str, outputs: tuple[str, ...]
) -> dict[str, Tensor]:
    """Log-probs and statistics of the head's rows on this process."""
    state: PreparedState = getattr(model, STATE)
    head = lm_head(model).local()
    rows, weight, _ = head.operands(rows, split=False)
    weight = embedded.of_head(weight)
    settings = {**_head_settings(state, head, impl, outputs), "skip_tolerance": state.skip_tolerance}
    tokens = linear_logps(rows, weight, batch.labels, **settings)
    return {name: getattr(tokens, name) for name in ("logps", *outputs)}


def _head_outputs(
    model: Any,
    batch: PackedBatch,
    rows: Tensor,  # (R, H) hidden states that predict a label
    embedded: EmbeddingGradient,
    impl: str,
    outputs: tuple[str, ...],
    loss_of: LossOfSums | None,
    summed: tuple[str, ...],
) -> dict[str, Tensor]:
    """Log-probs, and with `loss_of` the loss. A dict of tensors: wrappers look for tensors in mappings."""
    state: PreparedState = getattr(model, STATE)
    head = lm_head(model).local()
    rows, weight, adapter_weight = head.operands(rows, split=loss_of is not None)
    args = (rows, embedded.of_head(weight), batch.labels, batch.cu_seqlens)
    settings = {**_head_settings(state, head, impl, outputs), "rows": batch.token_rows}
    loss = {}
    if loss_of is None:
        result = sequence_logps(*args, skip_tolerance=state.skip_tolerance, **settings)
    else:
        ends = [GroupEnd(*end[:3]) for end in batch.group_ends]
        pair_ends = [0, *(end[3] for end in batch.group_ends)]

        def loss_of_groups(sums: Tensor, lengths: Tensor, sequences: slice, groups: slice, **statistics: Any) -> Tensor:
            pairs = slice(pair_ends[groups.start], pair_ends[groups.stop])
            return loss_of(sums, lengths, sequences, pairs, **statistics)

        settings |= {"summed": summed, "adapter_weight": adapter_weight}
        # where weights are sharded because they are large, no process holds a whole fp32 gradient of the head
        is_half = weight.requires_grad and weight.dtype.itemsize < 4
        settings["grad_in_forward"] = not (is_half and shards_weights(model))
        loss["loss"], result = sequence_loss(*args, ends, loss_of_groups, **settings)
    return {
        **loss,
        "sums": result.sums,
        "lengths": result.lengths,
        "logps": result.tokens.logps,
        **{name: getattr(result.tokens, name) for name in outputs},
    }


def _head_settings(state: PreparedState, head: LMHead, impl: str, outputs: tuple[str, ...]) -> dict[str, Any]:
    cut = {} if head.cut is None else {"process_group": head.cut.group, "vocab_size": head.cut.num_vocab}
    return {
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "impl": impl,
        "outputs": outputs,
        "workspace_bytes": state.workspace_bytes,
        **cut,
    }
