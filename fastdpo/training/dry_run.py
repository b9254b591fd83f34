"""One training step on tensors without storage, to see what it would hold at once: no formula per architecture.

In: a model made by `shape_only`, and the shape of a packed row. Out: the bytes that live at the peak of forward and
backward beyond the weights, by part. Layers, autocast, adapters and checkpointing are the model's own code; attention
and the LM head, whose code looks at numbers, are replaced by functions that allocate what the real ones do. Nothing is
computed, no weight is read: 32 layers of a 7B model take about two seconds on a CPU.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo.data.varlen import varlen_layout
from fastdpo.modeling.attention.call import AttentionCall, PackedLayout
from fastdpo.modeling.attention.sdpa import BranchSdpa
from fastdpo.modeling.attention.varlen import VarlenBackend
from fastdpo.modeling.packed import bare_model, is_prepared, unprepare_model
from fastdpo.ops.eager import max_chunk_rows
from fastdpo.ops.engine import engine_of
from fastdpo.ops.head import padded
from fastdpo.ops.matmul import accumulator_dtype

PARTS = ("casts", "gradients", "head", "activations")
_DRY_ATTENTION = "fastdpo_dry_run"


@dataclass(frozen=True)
class RowShape:
    """What one micro-batch looks like, as far as memory goes."""

    segments: tuple[tuple[int, int, int, int], ...]  # as in PackedBatch
    num_rows: int  # hidden states that go through the LM head
    sequences: tuple[int, int] | None = None  # (S, L) of a padded batch, which has no segments

    @property
    def num_tokens(self) -> int:
        return self.sequences[0] * self.sequences[1] if self.sequences else self.segments[-1][1]


@dataclass(frozen=True)
class StepPeak:
    """Bytes beyond the weights at the moment when most is held; the parts add up to the total."""

    casts: int  # copies of weights in autocast's dtype
    gradients: int  # of the weights, as far as they are there
    head: int  # the head op's workspace, dH, and dW until it becomes the weight's gradient
    activations: int  # everything else

    @property
    def total(self) -> int:
        return self.casts + self.gradients + self.head + self.activations


def fake_mode() -> Any:
    """The mode under which a shape-only model is made and run."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def shape_only(model: nn.Module, mode: Any) -> nn.Module:
    """A copy of the model whose weights have shapes and dtypes and no memory; 4-bit layers become bf16 ones."""
    with mode:
        memo: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            empty: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_weight = isinstance(tensor, nn.Parameter) and tensor.dtype.is_floating_point
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_weight else empty
        dry: nn.Module = copy.deepcopy(model, memo)
        for parent in list(dry.modules()):
            for name, child in parent.named_children():
                if type(child).__name__ == "Linear4bit":  # of bitsandbytes
                    given: Any = child
                    sizes = (given.in_features, given.out_features, given.bias is not None)
                    setattr(parent, name, nn.Linear(*sizes, dtype=torch.bfloat16).requires_grad_(False))
        bare = bare_model(dry)
        if is_prepared(bare):
            unprepare_model(bare)
    return dry


def dry_step(
    model: nn.Module,
    row: RowShape,
    mode: Any,
    *,
    impl: str,
    varlen: bool,
    autocast: torch.dtype | None = None,
    accumulates: bool = False,
    with_grad: bool = True,
    workspace_bytes: int | None = None,
) -> StepPeak:
    """What forward and backward of one micro-batch hold at their peak.

    Args:
        model: from `shape_only`, or made under `mode`.
        impl: "triton" or "tiled", whose workspace the head has.
        varlen: whether attention is one call over gathered keys, or one call per branch with its mask.
        autocast: dtype of autocast; None: off.
        accumulates: gradients of an earlier micro-batch are there already.
    """
    bare = bare_model(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    with mode:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if accumulates else None
        live = _LiveBytes([*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)])
        context = nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast)
        with live:
            with context:
                hidden_states = _hidden_states(bare, row, varlen)
                rows = hidden_states.flatten(0, 1).index_select(0, torch.zeros(row.num_rows, dtype=torch.int64))
                weight = bare.get_output_embeddings().weight
                with live.tagged("head"):
                    loss = _HeadAllocations.apply(rows, weight, autocast or weight.dtype, impl, workspace_bytes)
            del hidden_states, rows
            if with_grad and loss.requires_grad:  # type: ignore[union-attr]
                loss.backward()  # type: ignore[union-attr]
        peak = live.peak([p.grad for p in trained if p.grad is not None and not accumulates])
        own = sum(p.numel() * p.element_size() for p in trained) if accumulates else 0
        for parameter in trained:
            parameter.grad = None
    return StepPeak(**{**peak, "gradients": peak["gradients"] + own})


def _hidden_states(bare: Any, row: RowShape, varlen: bool) -> Tensor:
    from transformers import AttentionInterface

    AttentionInterface.register(_DRY_ATTENTION, _dry_attention)
    shape = row.sequences or (1, row.num_tokens)
    ids = torch.zeros(shape, dtype=torch.int64)
    layout: dict[str, Any] = {}
    if not row.sequences:
        packed = PackedLayout(row.segments, varlen_layout(row.segments), "varlen" if varlen else "sdpa")
        layout = {"position_ids": ids, "packed_layout": packed}
    configs = {id(m.config): m.config for m in bare.modules() if hasattr(getattr(m, "config", None), "model_type")}
    for config in configs.values():
        config._attn_implementation_internal = _DRY_ATTENTION
    hidden_states: Tensor = bare.base_model(input_ids=ids, use_cache=False, **layout).last_hidden_state
    return hidden_states


class _LiveBytes(TorchDispatchMode):
    """Takes down when each storage is made and when it ends."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.events: list[tuple[int, int, str]] = []  # (number of the storage, bytes, tag); the end has bytes < 0
        self.numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.weights = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.count, self.tag = 0, ""

    def tagged(self, tag: str) -> Any:
        return _Tag(self, tag)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_grouped = func is torch.ops.aten._grouped_mm.default
        result = _grouped_mm(*args, **(kwargs or {})) if is_grouped else func(*args, **(kwargs or {}))
        tag = self.tag
        if not tag and func is torch.ops.aten._to_copy.default and args[0].untyped_storage() in self.weights:
            tag = "casts"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage(), tag or "activations")
        return result

    def _see(self, storage: Any, tag: str) -> None:
        if storage in self.numbers or storage in self.weights:
            return
        number, size = self.count, storage.nbytes()
        self.count += 1
        self.numbers[storage] = number
        self.events.append((number, size, tag))
        weakref.finalize(storage, self.events.append, (number, -size, tag)).atexit = False

    def peak(self, gradients: Sequence[Tensor]) -> dict[str, int]:
        """Bytes by part at the peak; storages that ended up as gradients of weights are counted as these."""
        final = {self.numbers.get(gradient.untyped_storage()) for gradient in gradients}
        now, best = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
        total = most = 0
        for number, size, tag in self.events:
            now["gradients" if number in final else tag] += size
            total += size
            if total > most:
                most, best = total, dict(now)
        return best


def _grouped_mm(a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """The result of experts' matmuls, whose shape PyTorch only knows in bf16; `offs` cuts the side without experts."""
    if a.dim() == b.dim() == 2:
        shape: tuple[int, ...] = (len(offs), a.shape[0], b.shape[1])
    elif a.dim() == b.dim() == 3:
        shape = (*a.shape[:2], b.shape[2])
    else:
        shape = (a.shape[-2], b.shape[-1])
    return torch.empty(shape, dtype=out_dtype or a.dtype)


class _Tag:
    def __init__(self, live: _LiveBytes, tag: str) -> None:
        self.live, self.tag = live, tag

    def __enter__(self) -> None:
        self.live.tag = self.tag

    def __exit__(self, *_: Any) -> None:
        self.live.tag = ""


class _HeadAllocations(torch.autograd.Function):
    """The allocations of `fastdpo.ops.sequence_loss`: D in the workspace, fp32 sums, casts to the operands' dtype."""

    @staticmethod
    def forward(ctx: Any, hidden_states, weight, dtype, impl, workspace_bytes):  # type: ignore[override]
        engine = engine_of(impl)
        h, w = hidden_states.to(dtype), weight.to(dtype)
        acc = accumulator_dtype(dtype)
        (R, H), V = h.shape, w.shape[0]
        sums = [torch.empty(x.shape, dtype=acc) if x.requires_grad else None for x in (hidden_states, weight)]
        rows = min(R, max_chunk_rows(w, engine, workspace_bytes))
        d = torch.empty(rows, padded(V, engine.row_multiple), dtype=engine.grads_dtype(dtype))
        scaled = torch.empty(rows, H, dtype=acc)
        del d, scaled
        ctx.dtypes = hidden_states.dtype, weight.dtype
        ctx.save_for_backward(*sums)
        return torch.empty((), dtype=acc)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        grads = [
            None if x is None else x.mul_(grad) if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None)


class _Attention(torch.autograd.Function):
    """What a memory-efficient attention keeps: queries, keys, values, the output and a log-sum for each query."""

    @staticmethod
    def forward(ctx: Any, query, key, value, mask):  # type: ignore[override]
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        lse = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse, mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return (*(torch.empty(x.shape, dtype=x.dtype) for x in ctx.saved_tensors[:3]), None)


class _DryAttention(TorchFunctionMode):
    """Puts `_Attention` in the place of scaled_dot_product_attention, which would look for a device to run on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty(mask.shape, dtype=query.dtype)  # what PyTorch makes of it
        return _Attention.apply(query, key, value, mask)


class _DryVarlen(VarlenBackend):
    """Keys gathered as for flash-attn and torch's varlen_attn, and what their kernels keep."""

    name = title = "dry run"

    def load(self) -> Callable[..., Any] | None:
        return None

    def _run(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        output: Tensor = _Attention.apply(query, key, value, None)
        return output


def _dry_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stands in for `packed_attention`, and for a model's own over padded rows, which has a mask."""
    with _DryAttention():
        if packed_layout is None:
            S, _, L, _ = query.shape
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            mask = query.new_empty(S, 1, L, L, dtype=torch.bool)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).contiguous(), None
        is_limited = sliding_window is not None and sliding_window < packed_layout.varlen.max_keys
        window = sliding_window if is_limited else None
        call = AttentionCall(query, key, value, packed_layout, 0.0, 1.0, window, softcap, s_aux)
        backend = _DryVarlen() if packed_layout.backend == "varlen" else BranchSdpa()
        return backend.attend(call), None
