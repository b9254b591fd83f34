"""Gradients computed in the forward pass, from the same logits: 4 THV FLOPs for a frozen head, 6 THV for all gradients.

Rows go through the head in chunks whose D, eq. (9), over the whole vocabulary fits a workspace of fixed size. This
avoids a second computation of the logits, but needs the upstream gradients in forward. Two cases:

- A frozen head (`hidden_grad_in_forward`): the gradient of every log-prob is one vector per row, which backward scales.
- A known loss (`RowGradients`, used by `fastdpo.ops.sequence_loss`): the loss gives the rows' upstream gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdpo.ops.head import ALWAYS, Head, padded, row_scale
from fastdpo.ops.matmul import accumulator_dtype, matmul_into, operand, operand_blocks, product_bytes
from fastdpo.ops.shard import Shard

if TYPE_CHECKING:
    from fastdpo.ops.engine import Engine


def max_chunk_rows(
    lm_head_weight: Tensor,
    engine: Engine,
    workspace_bytes: int | None = None,
    weight_sums_bytes: int = 0,
    shard: Shard | None = None,
    group_rows: int = 0,
) -> int:
    """Number of rows whose D fits the workspace; at least 1, and a multiple of the kernels' blocks if one fits.

    Args:
        workspace_bytes: None for the engine's default. If dW is needed, the default grows to half of dW's sums, up to
            the engine's maximum and the free memory: 16,384 rows with V = 128256 and H = 4096 then take 4 chunks, which
            read and write dW's 2.1 GB 7 times instead of 31.
        weight_sums_bytes: bytes of the fp32 sums of dW, 0 if dW is not needed.
        shard: the part of the vocabulary that the weight holds. Every process must make the same chunks, so the largest
            part counts, and the free memory does not.
        group_rows: of the largest group, whose logits are computed twice if they do not fit. The default grows to hold
            them if they are no larger than the weight, up to the engine's maximum for a group.
    """
    device, dtype, num_vocab = lm_head_weight.device, lm_head_weight.dtype, lm_head_weight.shape[0]
    if shard is not None:
        weight_sums_bytes = weight_sums_bytes // num_vocab * shard.largest
        num_vocab = shard.largest
    row_bytes = engine.grads_dtype(dtype).itemsize * padded(num_vocab, engine.row_multiple)
    if workspace_bytes is not None:
        budget = workspace_bytes
    else:
        budget = engine.workspace_bytes if shard else _default_bytes(engine, device, weight_sums_bytes)
        group_bytes = group_rows * row_bytes
        if group_rows <= lm_head_weight.shape[1] and group_bytes <= engine.most_group_bytes:
            budget = max(budget, group_bytes)
    if weight_sums_bytes:
        budget -= min(product_bytes(device, dtype), budget // 2)
    rows = budget // row_bytes
    return max(1, rows // engine.chunk_multiple * engine.chunk_multiple or rows)


def default_workspace_bytes(engine: Engine, weight_sums_bytes: int, free: int | None = None) -> int:
    """Half of dW's sums, within the engine's bounds and half of the free memory; None: as much is free as it takes."""
    wanted = min(engine.most_workspace_bytes, max(engine.workspace_bytes, weight_sums_bytes // 2))
    if free is not None:
        wanted = max(engine.workspace_bytes, min(wanted, free // 2))  # half: chunks need more than D
    return wanted


def _default_bytes(engine: Engine, device: torch.device, weight_sums_bytes: int) -> int:
    wanted = default_workspace_bytes(engine, weight_sums_bytes)
    if wanted > engine.workspace_bytes and device.type == "cuda":
        # no queries to the driver during graph capture
        free = 0 if torch.cuda.is_current_stream_capturing() else free_bytes(device)
        wanted = default_workspace_bytes(engine, weight_sums_bytes, free)
    return wanted


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a GPU: free memory, plus unused memory in PyTorch's allocator."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return max(0, min(free, allowed)) + reserved - torch.cuda.memory_allocated(device)


def even_chunks(rows: slice, most: int, multiple: int = 1) -> Iterator[slice]:
    """The smallest number of chunks of at most `most` rows, of nearly equal size.

    If `most` is a multiple of `multiple`, so are all chunks except the last.
    """
    num_rows = rows.stop - rows.start
    size = -(-num_rows // max(1, -(-num_rows // most)))
    if most % multiple == 0:
        size = padded(size, multiple)
    for start in range(rows.start, rows.stop, max(1, size)):
        yield slice(start, min(start + size, rows.stop))


def workspace(num_rows: int, lm_head_weight: Tensor, engine: Engine) -> Tensor:
    """(num_rows, V), uninitialized; rows may be padded."""
    dtype, V = engine.grads_dtype(lm_head_weight.dtype), lm_head_weight.shape[0]
    space = torch.empty(num_rows, padded(V, engine.row_multiple), dtype=dtype, device=lm_head_weight.device)
    return space[:, :V]


def hidden_grad_in_forward(
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64
    head: Head,
    engine: Engine,
) -> tuple[dict[str, Tensor], Tensor]:
    """The forward values, each (T,), and d logp_t / d hidden_states_t, (T, H) fp32 or fp64."""
    T, names = labels.shape[0], (*ALWAYS, *head.outputs)
    if T == 0:
        return engine.forward(hidden_states, lm_head_weight, bias, labels, head), _sums_like(hidden_states)
    grads = RowGradients(hidden_states, lm_head_weight, bias, (True, False, False))
    most = max_chunk_rows(lm_head_weight, engine, head.workspace_bytes, shard=head.shard)
    chunks = list(even_chunks(slice(0, T), most, engine.chunk_multiple))
    space = workspace(chunks[0].stop, lm_head_weight, engine)
    found = []
    for rows in chunks:
        d = space[: rows.stop - rows.start]
        values = engine.forward_with_grads(d, hidden_states[rows], lm_head_weight, bias, labels[rows], head)
        one = torch.ones_like(values["logps"])
        grads.add(rows, d, row_scale(one, values["lse_rest"], labels[rows], head))
        found.append(values)
    assert grads.hidden is not None
    return {name: torch.cat([values[name] for values in found]) for name in names}, grads.hidden


class RowGradients:
    """dH, dW and db, (11) and (12), summed in fp32 (fp64 for fp64) from chunks of D over the whole vocabulary.

    With an adapter weight (V, r), hidden_states is (T, H + r) or wider, dH is (T, H + r), and dW is the adapter's. With
    `leaves_out`, rows without weight are left out of the products. The host must count them, so by default this is off
    on a GPU.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        wanted: tuple[bool, bool, bool],
        adapter_weight: Tensor | None = None,
        leaves_out: bool | None = None,
    ):
        # column blocks of the hidden states, each with its weight; the last one may be trained
        self.blocks = [(slice(0, lm_head_weight.shape[1]), lm_head_weight)]
        if adapter_weight is not None:
            H, r = lm_head_weight.shape[1], adapter_weight.shape[1]
            self.blocks.append((slice(H, H + r), adapter_weight))
        self.trained, trained_weight = self.blocks[-1]
        self.hidden_states, self.lm_head_weight = hidden_states, lm_head_weight
        self.leaves_out = not hidden_states.is_cuda if leaves_out is None else leaves_out
        self.hidden = _sums_like(hidden_states[:, : self.trained.stop]) if wanted[0] else None
        self.weight = _sums_like(trained_weight) if wanted[1] else None
        self.bias = _sums_like(bias) if wanted[2] and bias is not None else None
        self.is_first = True

    def add(self, rows: slice, d: Tensor, scale: Tensor) -> None:
        """Adds D (rows, V), which may be overwritten, and c (rows,); each row of dH must be added once."""
        hidden_states = self.hidden_states[rows]
        hidden = None if self.hidden is None else self.hidden[rows]
        if self.leaves_out:
            kept = scale.nonzero()[:, 0]
            if len(kept) < len(scale):
                for new, old in enumerate(kept.tolist()):
                    if new < old:
                        d[new].copy_(d[old])
                if hidden is not None:
                    some = hidden.new_empty(len(kept), hidden.shape[1])
                    self._add(hidden_states[kept], d[: len(kept)], scale[kept], some)
                    hidden.zero_().index_copy_(0, kept, some)
                else:
                    self._add(hidden_states[kept], d[: len(kept)], scale[kept], None)
                return
        self._add(hidden_states, d, scale, hidden)

    def _add(self, hidden_states: Tensor, d: Tensor, scale: Tensor, hidden: Tensor | None) -> None:
        """Computes the products of these rows; writes their dH to `hidden`."""
        if len(scale) == 0:
            return
        # only if it is needed: with a frozen head the copy of its rows would be wasted
        scaled = None if self.weight is None else hidden_states[:, self.trained] * scale[:, None]
        dtype = operand(self.lm_head_weight[:1]).dtype
        for vocab in operand_blocks(self.lm_head_weight):
            d_block = d[:, vocab].to(dtype)
            if hidden is not None:
                beta = 0.0 if vocab.start == 0 else 1.0
                for columns, weight in self.blocks:
                    matmul_into(hidden[:, columns], d_block, operand(weight[vocab]), beta=beta)
            if self.weight is not None and scaled is not None:
                matmul_into(self.weight[vocab], d_block.T, scaled.to(dtype), beta=0.0 if self.is_first else 1.0)
            if self.bias is not None:
                added = scale @ d_block.to(scale.dtype)
                self.bias[vocab] = added if self.is_first else self.bias[vocab] + added
            del d_block  # where it is a cast, before the next one is made
        if hidden is not None:
            hidden *= scale[:, None]
        self.is_first = False

    @property
    def weight_sums_bytes(self) -> int:
        return 0 if self.weight is None else self.weight.numel() * self.weight.element_size()

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The sums, with zeros for rows that were not added."""
        if self.is_first:
            for grad in (self.weight, self.bias):
                if grad is not None:
                    grad.zero_()
        return self.hidden, self.weight, self.bias


def _sums_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=accumulator_dtype(x.dtype), device=x.device)
