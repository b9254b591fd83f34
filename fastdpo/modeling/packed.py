"""The packed code path inside `model.forward`, and `packed_logps` and `packed_loss`, which call it through any wrapper.

Backbone and head run inside the wrapped model's own forward, so that DDP, FSDP and autocast see an ordinary call. A
packed batch sets its attention and does not reset it, because gradient checkpointing runs the layers again in backward,
outside the model's forward. Every other call, including generation, uses the model's original attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.attention import (
    ATTENTION_BACKENDS,
    PACKED_ATTENTION,
    PACKED_ATTENTION_WITH_MASKS,
    PACKED_ATTENTIONS,
    PackedLayout,
    masks_of,
    register,
)
from fastdpo.modeling.backbone import backbone_name
from fastdpo.modeling.embedding import EmbeddingGradient
from fastdpo.modeling.head import LMHead, inside, lm_head, shards_weights
from fastdpo.modeling.mixers import MixerRows, OwnAttention, find_mixers, mixers_of
from fastdpo.modeling.positions import counting_modules, told_positions
from fastdpo.modeling.router import load_balancing_loss
from fastdpo.modeling.sequence_group import SequenceGroup
from fastdpo.modeling.sequence_parts import joined_outputs, own_part
from fastdpo.ops import linear_logps, sequence_logps
from fastdpo.ops.sequence_loss import GroupEnd, sequence_loss
from fastdpo.ops.token_sums import Tokens, token_sums
from fastdpo.types import PackedBatch, PairLogps, SequenceLogps, TokenLogps

LossOfSums = Callable[..., Tensor]

_STATE = "_fastdpo_state"  # attribute of a prepared model


@dataclass
class _Prepared:
    """The changes of `prepare_model`, and the state to undo them."""

    attentions: list[OwnAttention]
    forward: Callable[..., Any]  # as the model had it
    generate: Callable[..., Any] | None
    own_methods: dict[str, Any]  # those of the two that were instance attributes
    backbone: str  # name of the decoder among the model's modules
    counting: list[str]  # names of its modules that count rows unless they get positions
    attention_backend: str = "auto"
    excluded_backends: dict[str, str] = field(default_factory=dict)  # that the self-check has found wrong here, and how
    masks: str = "none"  # kind of mask for the model, found by the self-check
    skip_tolerance: float = 0.0  # of the head op, as the next one
    workspace_bytes: int | None = None
    sequence_group: SequenceGroup | None = None  # that computes batches with shares


def bare_model(model: Any) -> Any:
    """The Hugging Face model inside DDP, FSDP, torch.compile and PEFT wrappers."""
    while True:
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(inner := getattr(model, "module", None), nn.Module) and not hasattr(
            type(model), "get_output_embeddings"
        ):
            model = inner  # DDP, FSDP1, DeepSpeed, whose engine has the model's attributes
        else:
            return model


def is_prepared(model: nn.Module) -> bool:
    return hasattr(bare_model(model), _STATE)


def prepare_model(
    model: nn.Module,
    *,
    attention_backend: str | None = None,
    skip_tolerance: float | None = None,
    workspace_bytes: int | None = None,
    sequence_group: SequenceGroup | None = None,
) -> nn.Module:
    """Installs the packed code path inside `model.forward` and returns the same model. Idempotent.

    Args:
        attention_backend: one of ATTENTION_BACKENDS, see `fastdpo.modeling.attention.backends`; None keeps the previous
            setting, initially "auto".
        skip_tolerance, workspace_bytes: settings of the head op, see `fastdpo.linear_logps`; None keeps the previous
            setting, initially exact and with the op's default workspace.
        sequence_group: the processes that compute batches with `shares` together; None keeps the previous ones.
    Raises:
        ValueError: the model is not a causal LM with a plain linear LM head, or the backend is unknown.
    """
    if attention_backend is not None and attention_backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend must be one of {sorted(ATTENTION_BACKENDS)}, got {attention_backend!r}")
    bare = bare_model(model)
    if not is_prepared(bare):
        _install(bare)
    settings = {
        "attention_backend": attention_backend,
        "skip_tolerance": skip_tolerance,
        "workspace_bytes": workspace_bytes,
        "sequence_group": sequence_group,
    }
    for name, value in settings.items():
        if value is not None:
            setattr(getattr(bare, _STATE), name, value)
    return model


def prepared_state(model: nn.Module) -> _Prepared:
    """The state of a prepared model; an unprepared model is prepared first."""
    prepare_model(model)
    state: _Prepared = getattr(bare_model(model), _STATE)
    return state


def run_mixers_packed(model: nn.Module, like: nn.Module | None = None) -> tuple[str, ...]:
    """Finds the token mixers of a prepared model, unless they are known, and makes them run packed rows.

    Args:
        like: a copy of the model whose mixers are known.
    Returns:
        Names of the modules that still mix tokens of one sequence into another.
    """
    bare, state = bare_model(model), prepared_state(model)
    mixers = mixers_of(bare)
    if mixers is not None:
        return mixers.leaks
    if any(type(parameter.data) is not Tensor for parameter in bare.parameters()):
        return ()  # no numbers to look at
    known = None if like is None else mixers_of(bare_model(like))
    is_packed = any(attention.config._attn_implementation in PACKED_ATTENTIONS for attention in state.attentions)
    _set_attention(state, packed=True)
    try:
        backend = "mask" if state.attention_backend == "mask" else "sdpa"
        attentions = state.attentions if state.masks == "sequence" else []
        mixers = find_mixers(bare, backend, None if known is None else known.names, state.masks, attentions)
    finally:
        _set_attention(state, packed=is_packed)
    return mixers.leaks if mixers is not None else ()


def give_masks(model: nn.Module, masks: str) -> None:
    """Sets the kind of mask that a prepared model gets; mixers found with other masks are searched again."""
    bare, state = bare_model(model), prepared_state(model)
    if state.masks == masks:
        return
    is_packed = any(attention.config._attn_implementation in PACKED_ATTENTIONS for attention in state.attentions)
    _set_attention(state, packed=False)
    state.masks = masks
    _set_attention(state, packed=is_packed)
    if (mixers := mixers_of(bare)) is not None:
        mixers.forget(bare)


def attention_backend(model: nn.Module) -> str:
    """The attention backend setting of a prepared model."""
    return prepared_state(model).attention_backend


def _install(bare: Any) -> None:
    backbone = backbone_name(bare)
    lm_head(bare)
    register()
    configs = {
        id(m.config): m.config for m in bare.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    state = _Prepared(
        attentions=[OwnAttention(config, _own_attention(bare, config)) for config in configs.values()],
        forward=bare.forward,
        generate=getattr(bare, "generate", None),
        own_methods={name: bare.__dict__[name] for name in ("forward", "generate") if name in bare.__dict__},
        backbone=backbone,
        counting=counting_modules(bare.get_submodule(backbone)),
    )
    setattr(bare, _STATE, state)
    # bound methods, so that a copy of the model gets its own methods, even inside accelerate's wrappers
    bare.forward = MethodType(_forward_with_signature_of(bare.forward), bare)
    if state.generate is not None:
        bare.generate = MethodType(_generate, bare)
    if (mixers := mixers_of(bare)) is not None:
        mixers.install(bare)


def _own_attention(model: Any, config: Any) -> str:
    """The model's attention outside packed batches."""
    current: str = config._attn_implementation
    if current in PACKED_ATTENTIONS:  # the config object is also that of a model whose last batch was packed
        current = model.get_correct_attn_implementation(None)
    return current


def _forward_with_signature_of(stock: Callable[..., Any]) -> Callable[..., Any]:
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


def unprepare_model(model: nn.Module) -> nn.Module:
    """Removes the packed code path: forward, generate and attention are the model's own again."""
    bare = bare_model(model)
    if is_prepared(bare):
        state = getattr(bare, _STATE)
        _set_attention(state, packed=False)
        if (mixers := mixers_of(bare)) is not None:
            mixers.remove(bare)
        for name in ("forward", "generate", _STATE):
            bare.__dict__.pop(name, None)
        bare.__dict__.update(state.own_methods)
    return model


def packed_logps(
    model: nn.Module,
    batch: PackedBatch | Mapping[str, Any],
    *,
    impl: str = "auto",
    outputs: Sequence[str] = (),
    router_aux_loss: bool = False,
) -> PairLogps:
    """Summed log-probs of every pair of the batch, from one forward of the model.

    Args:
        model: a causal LM, bare or wrapped (PEFT, DDP, FSDP, torch.compile); a bare one is prepared on first use.
        batch: from `pack_pairs` or `pad_pairs`, on the model's device, or its `asdict()`.
        impl: implementation of the head op, see `linear_logps`.
        outputs: per-token statistics to return in `.sequences.tokens`, see `linear_logps`.
        router_aux_loss: return `.aux_loss`, see `fastdpo.modeling.router`.
    Returns:
        PairLogps, differentiable in the model's parameters.
    Raises:
        ValueError: `batch` is not a batch, or, on a CPU, has token ids outside the model's embeddings (not checked on a
            GPU, to avoid a synchronization).
    """
    if not isinstance(batch, PackedBatch):
        batch = _batch_of(batch)
    _check_token_ids(model, batch.input_ids)
    return _run(model, batch, impl, outputs, router_aux_loss=router_aux_loss)[1]


def _batch_of(fields: Any) -> PackedBatch:
    """`PackedBatch(**fields)`, or a ValueError about the given value."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"batch must be a PackedBatch or its asdict(), got {type(fields).__name__}")
    try:
        return PackedBatch(**fields)
    except TypeError:
        raise ValueError(f"batch must hold the fields of a PackedBatch, got {sorted(map(str, fields))}") from None


def _check_token_ids(model: nn.Module, input_ids: Tensor) -> None:
    if type(input_ids) is not Tensor or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return  # no numbers to look at, or none without waiting for a device
    num_embeddings = getattr(bare_model(model).get_input_embeddings(), "num_embeddings", None)
    if num_embeddings is None or input_ids.numel() == 0:
        return
    for bound in map(int, input_ids.aminmax()):
        if not 0 <= bound < num_embeddings:
            raise ValueError(f"input_ids must be in [0, {num_embeddings}), the model's embeddings, got {bound}")


def packed_loss(
    model: nn.Module,
    batch: PackedBatch,
    loss_of: LossOfSums,
    *,
    impl: str = "auto",
    outputs: Sequence[str] = (),
    summed: Sequence[str] = (),
    grad_in_forward: bool = True,
    router_aux_loss: bool = False,
) -> tuple[Tensor, PairLogps]:
    """A loss that is a sum over the batch's groups, and its log-probs.

    Args:
        model, batch, impl, outputs, router_aux_loss: as in `packed_logps`; the loss does not include the router's.
        loss_of: `(sums, lengths, sequences, pairs)` -> scalar, the summed loss of consecutive groups from the log-probs
            (s,) in nats and lengths (s,) of their sequences; the slices are the sequences and pairs of the batch.
        summed: statistics among `outputs` that `loss_of` also takes by name, (s,) sums without gradient.
        grad_in_forward: compute the gradient of the LM head in forward, see `fastdpo.ops.sequence_loss`; False computes
            the logits again in backward.
    Returns:
        The loss, () and differentiable in the model's parameters; PairLogps, differentiable only if grad_in_forward is
        off.
    """
    # on several processes, the loss needs the log-probs of all of them first
    in_forward = grad_in_forward and batch.shares is None and torch.is_grad_enabled() and impl != "reference"
    if in_forward and prepared_state(model).skip_tolerance == 0:  # skipping needs the whole forward's masses first
        loss, logps = _run(model, batch, impl, outputs, loss_of, summed, router_aux_loss=router_aux_loss)
        assert loss is not None
        return loss, logps
    logps = packed_logps(model, batch, impl=impl, outputs=outputs, router_aux_loss=router_aux_loss)
    sums = logps.sequences.sums
    statistics = summed_statistics(logps.sequences.tokens, summed, batch, impl=impl)
    everything = (slice(0, len(sums)), slice(0, batch.num_pairs))
    return loss_of(sums, logps.sequences.lengths, *everything, **statistics), logps


def summed_statistics(
    tokens: TokenLogps, names: Sequence[str], batch: PackedBatch, *, impl: str = "auto"
) -> dict[str, Tensor]:
    """(S,) sums of the named statistics over the counted tokens of each sequence, in the dtype of the log-probs."""
    if not names:
        return {}
    values, place = [getattr(tokens, name) for name in names], Tokens(batch.cu_seqlens, batch.token_rows)
    return dict(zip(names, token_sums(values, place, dtype=tokens.logps.dtype, impl=impl)[0], strict=True))


def _run(
    model: nn.Module,
    batch: PackedBatch,
    impl: str,
    outputs: Sequence[str],
    loss_of: LossOfSums | None = None,
    summed: Sequence[str] = (),
    *,
    router_aux_loss: bool = False,
) -> tuple[Tensor | None, PairLogps]:
    state, layout = prepared_state(model), None
    if batch.varlen is not None:  # made out here, where torch.compile does not look into the branches of a batch
        group = None if batch.shares is None else state.sequence_group
        if group is None and batch.shares is not None:
            raise ValueError("batch must have no shares for a model that has no sequence_group (see prepare_model)")
        layout = PackedLayout(
            batch.segments, batch.varlen, state.attention_backend, state.excluded_backends, state.masks, group
        )
        run_mixers_packed(model)
    settings = {"packed_layout": layout, "impl": impl, "outputs": tuple(outputs), "router_aux_loss": router_aux_loss}
    result = model(input_ids=batch.input_ids, packed_batch=batch, loss_of=loss_of, summed=tuple(summed), **settings)
    if result["sums"].dtype.itemsize < 4:
        raise ValueError(
            "model must return fp32 log-probs, but its wrapper rounds what it returns to"
            f" {result['sums'].dtype}: set output_dtype=None in FSDP's MixedPrecisionPolicy"
        )
    tokens = TokenLogps(result["logps"], **{name: result[name] for name in outputs})
    sequences = SequenceLogps(result["sums"], result["lengths"], tokens)
    chosen, rejected = batch.pairs.unbind(1)
    return result.get("loss"), PairLogps(
        chosen=sequences.sums[chosen],
        rejected=sequences.sums[rejected],
        chosen_lengths=sequences.lengths[chosen],
        rejected_lengths=sequences.lengths[rejected],
        sequences=sequences,
        aux_loss=result.get("aux_loss"),
    )


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
    """The `model.forward` of a prepared model: the model's own forward unless a packed batch is given."""
    state: _Prepared = getattr(model, _STATE)
    if packed_batch is None:
        with _as_it_came(model):
            return state.forward(*args, **kwargs)
    group = None if packed_layout is None else packed_layout.group
    batch = packed_batch if group is None else own_part(packed_batch, group)
    _set_attention(state, packed=batch.is_packed)
    _set_mixers(model, packed_layout)
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

    def head_outputs(rows: Tensor) -> dict[str, Tensor]:
        if group is not None:
            return _token_outputs(model, batch, rows, embedded, impl, outputs)
        return _head_outputs(model, batch, rows, embedded, impl, outputs, loss_of, summed)

    rows = backbone.last_hidden_state.flatten(0, 1).index_select(0, batch.logit_rows)
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
    state: _Prepared = getattr(model, _STATE)
    head = lm_head(model).local()
    rows, weight, _ = head.operands(rows, split=False)
    weight = embedded.of_head(weight)
    settings = {**_head_settings(state, head, impl, outputs), "skip_tolerance": state.skip_tolerance}
    tokens = linear_logps(rows, weight, batch.labels, **settings)
    return {name: getattr(tokens, name) for name in ("logps", *outputs)}


def _head_settings(state: _Prepared, head: LMHead, impl: str, outputs: tuple[str, ...]) -> dict[str, Any]:
    cut = {} if head.cut is None else {"process_group": head.cut.group, "vocab_size": head.cut.num_vocab}
    return {
        **cut,
        "bias": head.bias,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "impl": impl,
        "outputs": outputs,
        "workspace_bytes": state.workspace_bytes,
        **cut,
    }


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
    state: _Prepared = getattr(model, _STATE)
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


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    state: _Prepared = getattr(model, _STATE)
    assert state.generate is not None
    with _as_it_came(model):
        return state.generate(*args, **kwargs)


def _set_attention(state: _Prepared, *, packed: bool) -> None:
    name = PACKED_ATTENTION if state.masks == "none" else PACKED_ATTENTION_WITH_MASKS
    for attention in state.attentions:
        if attention.config._attn_implementation not in PACKED_ATTENTIONS:  # the model's own, perhaps changed since
            attention.original = attention.config._attn_implementation
        attention.config._attn_implementation_internal = name if packed else attention.original


def _set_mixers(model: Any, layout: PackedLayout | None) -> None:
    mixers = mixers_of(model)
    if mixers is None:
        return
    mixers.rows = None
    if layout is not None and mixers.names:
        mixers.rows = MixerRows(layout.segments, layout.varlen)
        mixers.keep_rows_for_backward(model)


@contextmanager
def _as_it_came(model: Any) -> Iterator[None]:
    """Context manager that restores the model's original attention and mixers for one call."""
    state, mixers = getattr(model, _STATE), mixers_of(model)
    was_packed = [attention.config._attn_implementation in PACKED_ATTENTIONS for attention in state.attentions]
    _set_attention(state, packed=False)
    try:
        with nullcontext() if mixers is None else mixers.running(None):
            yield
    finally:
        _set_attention(state, packed=any(was_packed))
