"""A loss that is a sum over groups of sequences, with its gradient computed in forward: 6 NHV FLOPs instead of 8.

In: the arguments of `sequence_logps`, the end of each group, and the loss of a group as a function of its summed
log-probs. Out: the loss, differentiable, and the log-probs, not differentiable. As soon as the log-probs of a chunk of
rows are known, the loss gives their upstream gradients, and the gradients are computed from the logits that are still
in memory (as in Liger's and QuACK's fused cross entropies). If a group is too large for the workspace, its logits are
computed twice, still in forward; under `torch.compile` backward recomputes the logits of all groups. Refuses everything
that `sequence_logps` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from fastdpo.ops.eager import RowGradients, even_chunks, max_chunk_rows, workspace
from fastdpo.ops.engine import engine_of, resolve_impl
from fastdpo.ops.head import Head, joined_weight, row_scale
from fastdpo.ops.linear_logps import linear_logps
from fastdpo.ops.shard import shard_of
from fastdpo.ops.token_sums import Tokens, token_sums
from fastdpo.ops.validation import (
    check_head,
    check_labels,
    check_sequences,
    check_settings,
    operand_dtype,
    output_names,
)
from fastdpo.types import SequenceLogps, TokenLogps


class GroupEnd(NamedTuple):
    """The end of a group, counted in rows, tokens and sequences. Groups are consecutive and share nothing."""

    row: int
    token: int
    sequence: int


@dataclass(frozen=True)
class _Chunk:
    """Consecutive groups whose rows go through the head together."""

    groups: slice
    rows: slice
    tokens: slice
    sequences: slice


def sequence_loss(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    group_ends: Sequence[GroupEnd],
    loss_of: Callable[..., Tensor],
    *,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    adapter_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    outputs: Sequence[str] = (),
    summed: Sequence[str] = (),
    impl: str = "auto",
    workspace_bytes: int | None = None,
    process_group: Any = None,
    vocab_size: int | None = None,
    grad_in_forward: bool = True,
) -> tuple[Tensor, SequenceLogps]:
    """The summed loss of all groups.

    Args:
        hidden_states, lm_head_weight, labels, cu_seqlens, rows, weights, bias, logit_scale, softcap, outputs, impl: as
            in `sequence_logps`; impl is not "reference".
        group_ends: for each group, the numbers of rows, tokens and sequences up to its end, on the host.
        loss_of: `(sums, lengths, sequences, groups)` -> scalar, the summed loss of consecutive groups from their
            sequences' log-probs (s,) in nats and lengths (s,); the slices give the sequences and groups.
        summed: statistics among `outputs` that `loss_of` also takes by name, (s,) sums without gradient.
        adapter_weight: (V, r) in any float dtype, columns that follow those of lm_head_weight, for hidden_states of
            width H + r: a head `h @ W.T + u @ B.T` with frozen W takes [h, u] and trains B without a gradient or a copy
            of W's size. Without a gradient in forward, one copy holds both weights side by side.
        workspace_bytes: memory for the gradients of the logits, (rows of a chunk, V); by default 256 MiB on a GPU (up
            to 1 GiB of the free memory if the gradient of the weight is needed, see
            `fastdpo.ops.eager.max_chunk_rows`), and 32 MiB elsewhere (up to the size of the weight and 256 MiB, if the
            largest group needs it). The logits of a group that does not fit alone are computed twice.
        process_group, vocab_size: as in `linear_logps`; adapter_weight is then this process's rows too. Every process
            computes the same loss, and `loss_of` must give the same on each.
        grad_in_forward: False computes the logits again in backward (8 NHV). The gradient of a half-precision
            lm_head_weight is then summed in fp32 block by block; in forward, all its sums are in memory, (V, H) fp32.
    Returns:
        The loss, () fp32 (fp64 for fp64 inputs), differentiable in hidden_states, lm_head_weight, bias and
        adapter_weight; and SequenceLogps without gradient. A row whose upstream gradient is below half a unit in the
        last place of its chunk's largest gets no gradient; on a CPU its products are skipped. Differentiable once; if
        the inputs are fp32, one backward must compute all gradients.
    """
    outputs = output_names("outputs", outputs)
    check_settings(logit_scale, softcap, outputs, 0.0, workspace_bytes, impl)
    check_head(_check_adapter(hidden_states, lm_head_weight, adapter_weight), lm_head_weight, labels, bias)
    check_sequences(cu_seqlens, rows, weights, labels)
    if not set(summed) <= set(outputs):
        raise ValueError(f"summed must be among outputs {outputs}, got {tuple(summed)}")
    if impl == "reference":
        raise ValueError(
            'impl must be "auto", "triton" or "tiled", got \'reference\', which computes no gradient in forward'
        )
    labels, cu_seqlens = labels.to(torch.int64), cu_seqlens.to(torch.int64)
    rows = None if rows is None else rows.to(torch.int64)
    group_ends = [GroupEnd(*end) for end in group_ends]
    _check_group_ends(group_ends, labels, cu_seqlens, rows)
    batch_tokens = Tokens(cu_seqlens, rows, weights)

    def chunk_loss(values: Mapping[str, Tensor], chunk: _Chunk) -> Tensor:
        sequences, part = chunk.sequences, batch_tokens.part(chunk.rows, chunk.tokens, chunk.sequences)
        sums, own_lengths = token_sums(
            [values["logps"], *(values[name] for name in summed)], part, labels=labels[chunk.rows], impl=impl
        )
        statistics = dict(zip(summed, sums[1:], strict=True))
        return loss_of(sums[0], own_lengths, sequences, chunk.groups, **statistics)

    everything = _Chunk(slice(0, len(group_ends)), *(slice(0, end) for end in group_ends[-1]))
    floats = [x for x in (hidden_states, lm_head_weight, bias, adapter_weight) if x is not None]
    in_forward = grad_in_forward and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    in_forward = in_forward and any(x.requires_grad for x in floats)
    if in_forward:
        dtype = operand_dtype(hidden_states, lm_head_weight, bias)
        softcap = None if softcap is None else float(softcap)
        shard = shard_of(process_group, vocab_size, lm_head_weight, impl)
        head = Head(float(logit_scale), softcap, outputs, workspace_bytes=workspace_bytes, shard=shard)
        plan = _Plan(head, resolve_impl(impl, labels.device, dtype), dtype, group_ends, chunk_loss)
        loss, logps, *statistics = _LossInForward.apply(
            hidden_states, lm_head_weight, bias, adapter_weight, labels, plan
        )
        tokens = TokenLogps(logps, **dict(zip(outputs, statistics, strict=True)))
    else:
        settings: dict[str, Any] = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap, "outputs": outputs}
        settings |= {"workspace_bytes": workspace_bytes, "process_group": process_group, "vocab_size": vocab_size}
        if adapter_weight is not None:
            engine = engine_of(resolve_impl(impl, labels.device, hidden_states.dtype))
            lm_head_weight = joined_weight(lm_head_weight, adapter_weight, multiple=engine.column_multiple)
            hidden_states = pad(hidden_states, (0, lm_head_weight.shape[1] - hidden_states.shape[1]))
        tokens = linear_logps(hidden_states, lm_head_weight, labels, impl=impl, **settings)
        loss = chunk_loss({name: getattr(tokens, name) for name in ("logps", *summed)}, everything)
        tokens = replace(tokens, logps=tokens.logps.detach())
    (sums,), lengths = token_sums([tokens.logps], batch_tokens, labels=labels, impl=impl)
    return loss, SequenceLogps(sums, lengths, tokens)


@dataclass(frozen=True)
class _Plan:
    """The non-tensor arguments of `_LossInForward`."""

    head: Head
    impl: str
    dtype: torch.dtype  # of the matmuls' operands
    group_ends: Sequence[GroupEnd]
    chunk_loss: Callable[[Mapping[str, Tensor], _Chunk], Tensor]  # (values of the chunk's rows, chunk) -> ()


class _LossInForward(torch.autograd.Function):
    """Keeps the gradients in fp32 until backward knows the factor of the loss, then casts them once."""

    @staticmethod
    def forward(ctx: Any, hidden_states, lm_head_weight, bias, adapter_weight, labels, plan):  # type: ignore[override]
        needs, engine, shard = ctx.needs_input_grad, engine_of(plan.impl, plan.head.shard), plan.head.shard
        ctx.has_adapter = adapter_weight is not None
        inputs = (hidden_states, adapter_weight if ctx.has_adapter else lm_head_weight, bias)
        wanted = (needs[0], needs[3] if ctx.has_adapter else needs[1], needs[2])
        if labels.device.type == "cpu":
            check_labels(labels, lm_head_weight.shape[0] if shard is None else shard.num_vocab)
        if shard is not None:
            labels = shard.local(labels)
        with torch.autocast(hidden_states.device.type, enabled=False):
            h, w = hidden_states.to(plan.dtype), lm_head_weight.to(plan.dtype)
            b, a = (None if x is None else x.to(plan.dtype) for x in (bias, adapter_weight))
            if a is not None and (more := -a.shape[1] % engine.column_multiple):  # zeros, which change no product
                h, a = pad(h, (0, more)), pad(a, (0, more))
            grads = RowGradients(h, w, b, wanted, a)
            largest = max(b.row - a.row for a, b in pairwise([GroupEnd(0, 0, 0), *plan.group_ends]))
            most = max_chunk_rows(w, engine, plan.head.workspace_bytes, grads.weight_sums_bytes, shard, largest)
            space = workspace(min(most, len(labels)), w, engine)
            losses, found = [], []
            for chunk in _chunks(plan.group_ends, most):
                rows, fits = chunk.rows, 0 < chunk.rows.stop - chunk.rows.start <= most
                if fits:
                    d = space[: rows.stop - rows.start]
                    values = engine.forward_with_grads(d, h[rows], w, b, labels[rows], plan.head, adapter_weight=a)
                else:
                    values = engine.forward(h[rows], w, b, labels[rows], plan.head, adapter_weight=a)
                loss, grad_logps = _weigh(values, chunk, plan.chunk_loss)
                losses.append(loss)
                found.append(values)
                for some in even_chunks(rows, most, engine.chunk_multiple):
                    within = slice(some.start - rows.start, some.stop - rows.start)
                    lse_rest = values["lse_rest"][within]
                    if not fits:
                        d = space[: some.stop - some.start]
                        again = engine.forward_with_grads(d, h[some], w, b, labels[some], plan.head, adapter_weight=a)
                        lse_rest = again["lse_rest"]
                    grads.add(some, d, row_scale(grad_logps[within], lse_rest, labels[some], plan.head))
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.scaled_in_place = False
        grad_hidden, grad_weight, grad_bias = grads.finish()
        if shard is not None and grad_hidden is not None:
            shard.reduce(grad_hidden)
        if ctx.has_adapter:  # without the zeros' columns
            grad_hidden = None if grad_hidden is None else grad_hidden[:, : hidden_states.shape[1]]
            grad_weight = None if grad_weight is None else grad_weight[:, : adapter_weight.shape[1]]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        outputs = [torch.cat([values[name] for values in found]) for name in ("logps", *plan.head.outputs)]
        ctx.mark_non_differentiable(*outputs)
        return (torch.stack(losses).sum(), *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss, *_):  # type: ignore[override]
        if ctx.scaled_in_place:
            raise RuntimeError(
                "the gradients of this loss were computed in forward and are already used: compute all of them in one "
                "backward, or use sequence_logps (LinearDPOLoss and the like: impl='reference'), which allows several"
            )
        grads: list[Tensor | None] = []
        for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            if x is None:
                grads.append(None)
            elif x.dtype == dtype:  # in place: a second copy of dW would be the largest tensor of all
                ctx.scaled_in_place = True
                grads.append(x.mul_(grad_loss))
            else:  # scaled and cast in one pass
                grads.append(torch.mul(x, grad_loss, out=torch.empty_like(x, dtype=dtype)))
        grad_hidden, grad_weight, grad_bias = grads
        grad_weights = (None, grad_bias, grad_weight) if ctx.has_adapter else (grad_weight, grad_bias, None)
        return (grad_hidden, *grad_weights, None, None)


def _check_adapter(hidden_states: Tensor, lm_head_weight: Tensor, adapter_weight: Tensor | None) -> Tensor:
    """The number of columns of hidden_states that belong to lm_head_weight."""
    if adapter_weight is None:
        return hidden_states
    if lm_head_weight.requires_grad:
        raise ValueError("lm_head_weight must be frozen if adapter_weight is given, got one that requires grad")
    V, width = lm_head_weight.shape[0], hidden_states.shape[1] - lm_head_weight.shape[1]
    if tuple(adapter_weight.shape) != (V, width):
        raise ValueError(
            f"adapter_weight must have shape ({V}, {width}), the columns of hidden_states beyond lm_head_weight's, got"
            f" {tuple(adapter_weight.shape)}"
        )
    return hidden_states[:, : lm_head_weight.shape[1]]


def _weigh(
    values: Mapping[str, Tensor], chunk: _Chunk, chunk_loss: Callable[[Mapping[str, Tensor], _Chunk], Tensor]
) -> tuple[Tensor, Tensor]:
    """The chunk's loss, and its gradient in the log-probs; weights too small for the rounding are set to zero."""
    with torch.enable_grad():
        leaf = values["logps"].detach().requires_grad_()
        loss = chunk_loss({**values, "logps": leaf}, chunk)
        (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
    if len(grad):
        bound = grad.abs().amax() * (torch.finfo(grad.dtype).eps / 2)
        grad = grad.masked_fill((grad.abs() <= bound) & bound.isfinite(), 0.0)
    return loss.detach(), grad


def _chunks(group_ends: Sequence[GroupEnd], most_rows: int) -> Iterator[_Chunk]:
    """Chunks of as many consecutive groups as fit into `most_rows`; a larger group forms its own chunk."""
    start, first = GroupEnd(0, 0, 0), 0
    for group, end in enumerate(group_ends):
        is_last = group + 1 == len(group_ends)
        if is_last or group_ends[group + 1].row - start.row > most_rows:
            yield _Chunk(slice(first, group + 1), *(slice(a, b) for a, b in zip(start, end, strict=True)))
            start, first = end, group + 1


def _check_group_ends(group_ends: Sequence[GroupEnd], labels: Tensor, cu_seqlens: Tensor, rows: Tensor | None) -> None:
    totals = GroupEnd(len(labels), len(labels) if rows is None else len(rows), len(cu_seqlens) - 1)
    starts = [GroupEnd(0, 0, 0), *group_ends]
    rises = all(a <= b for x, y in pairwise(starts) for a, b in zip(x, y, strict=True))
    if not group_ends or not rises or group_ends[-1] != totals:
        raise ValueError(
            f"group_ends must rise to {totals}, the numbers of rows, tokens and sequences, got {group_ends}"
        )
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = cu_seqlens[[end.sequence for end in group_ends]].tolist()
    if ends != [end.token for end in group_ends]:
        raise ValueError(f"group_ends must match the ends of sequences, at tokens {ends}, got {group_ends}")
    for start, end in pairwise(starts):
        own = torch.arange(start.token, end.token) if rows is None else rows[start.token : end.token]
        if len(own) and not (start.row <= int(own.min()) and int(own.max()) < end.row):
            raise ValueError(f"rows must lie in their own group, {start.row} to {end.row}, got {own.tolist()}")
