"""`packed_logps` and `packed_loss`: one forward of a model, through any wrapper, over packed or padded rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.attention import PackedLayout, Prefix
from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.packed_forward import LossOfSums
from fastdpo.modeling.prepared import prepared_state, run_mixers_packed
from fastdpo.ops.token_sums import Tokens, token_sums
from fastdpo.types import PackedBatch, PairLogps, SequenceLogps, TokenLogps


def packed_logps(
    model: nn.Module,
    batch: PackedBatch | Mapping[str, Any],
    *,
    impl: str = "auto",
    outputs: Sequence[str] = (),
    router_aux_loss: bool = False,
    prefix: Prefix | None = None,
) -> PairLogps:
    """Summed log-probs of every pair of the batch, from one forward of the model.

    Args:
        model: a causal LM, bare or wrapped (PEFT, DDP, FSDP, torch.compile); a bare one is prepared on first use.
        batch: from `pack_pairs` or `pad_pairs`, on the model's device, or its `asdict()`.
        impl: implementation of the head op, see `linear_logps`.
        outputs: per-token statistics to return in `.sequences.tokens`, see `linear_logps`.
        router_aux_loss: return `.aux_loss`, see `fastdpo.modeling.router`.
        prefix: the tokens before the batch, which is then one of `prompt_once.after_prompt`.
    Returns:
        PairLogps, differentiable in the model's parameters.
    Raises:
        ValueError: `batch` is not a batch, or, on a CPU, has token ids outside the model's embeddings (not checked on a
            GPU, to avoid a synchronization).
    """
    if not isinstance(batch, PackedBatch):
        batch = _batch_of(batch)
    _check_token_ids(model, batch.input_ids)
    return _run(model, batch, impl, outputs, prefix=prefix, router_aux_loss=router_aux_loss)[1]


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
    prefix: Prefix | None = None,
) -> tuple[Tensor, PairLogps]:
    """A loss that is a sum over the batch's groups, and its log-probs.

    Args:
        model, batch, impl, outputs, router_aux_loss: as in `packed_logps`; the loss does not include the router's.
        loss_of: `(sums, lengths, sequences, pairs)` -> scalar, the summed loss of consecutive groups from the log-probs
            (s,) in nats and lengths (s,) of their sequences; the slices are the sequences and pairs of the batch.
        summed: statistics among `outputs` that `loss_of` also takes by name, (s,) sums without gradient.
        grad_in_forward: compute the gradient of the LM head in forward, see `fastdpo.ops.sequence_loss`; False computes
            the logits again in backward.
        prefix: the tokens before the batch, which is then one of `prompt_once.after_prompt`.
    Returns:
        The loss, () and differentiable in the model's parameters; PairLogps, differentiable only if grad_in_forward is
        off.
    """
    # on several processes, the loss needs the log-probs of all of them first
    in_forward = grad_in_forward and batch.shares is None and torch.is_grad_enabled() and impl != "reference"
    if in_forward and prepared_state(model).skip_tolerance == 0:  # skipping needs the whole forward's masses first
        loss, logps = _run(model, batch, impl, outputs, loss_of, summed, prefix=prefix, router_aux_loss=router_aux_loss)
        assert loss is not None
        return loss, logps
    logps = packed_logps(model, batch, impl=impl, outputs=outputs, router_aux_loss=router_aux_loss, prefix=prefix)
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


def layout_of(model: nn.Module, batch: PackedBatch, **more: Any) -> PackedLayout:
    """The layout of a packed batch, for one forward of the model, whose mixers then run packed.

    Args:
        more: further arguments of PackedLayout.
    """
    assert batch.varlen is not None
    state = prepared_state(model)
    run_mixers_packed(model)
    about = state.attention_backend, state.excluded_backends, state.masks
    return PackedLayout(batch.segments, batch.varlen, *about, **more)


def _run(
    model: nn.Module,
    batch: PackedBatch,
    impl: str,
    outputs: Sequence[str],
    loss_of: LossOfSums | None = None,
    summed: Sequence[str] = (),
    *,
    prefix: Prefix | None = None,
    router_aux_loss: bool = False,
) -> tuple[Tensor | None, PairLogps]:
    state, layout = prepared_state(model), None
    if batch.varlen is not None:  # made out here, where torch.compile does not look into the branches of a batch
        group = None if batch.shares is None else state.sequence_group
        if group is None and batch.shares is not None:
            raise ValueError("batch must have no shares for a model that has no sequence_group (see prepare_model)")
        layout = layout_of(model, batch, group=group, prefix=prefix)
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
