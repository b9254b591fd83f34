"""Backends that run a packed row in one call of a variable-length kernel: torch's own `varlen_attn`, and flash-attn 2,
3 and 4, loaded by transformers.

Queries are the unchanged row; keys and values are gathered so that every branch follows its prefix; attention is causal
and aligned at the bottom right. The features of a function are read from its signature, because releases differ: torch
2.10's varlen_attn had `is_causal` and no `scale`, 2.11's has `window_size` and `scale`, 2.13's `enable_gqa` too. A call
that needs a missing feature is refused, never approximated.

Not run on a GPU yet: the tests replace the kernels by an emulation and check the arguments against the signature of the
installed torch.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.modeling.attention.call import AttentionCall
from fastdpo.modeling.attention.gather import gather_keys

_HALF = (torch.float16, torch.bfloat16)
_SAME = 2e-2  # relative difference that sums of 16-bit products in another order explain; a wrong head is off by 1


class VarlenBackend:
    """The shared part of the kernels: limits, the gathered layout, and head dims padded to a multiple of 8."""

    name: str
    title: str
    max_head_dim = 256
    device_types: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = _HALF
    capabilities: tuple[int, int] = (8, 99)  # least and largest major compute capability

    def load(self) -> Callable[..., Any] | None:
        """The kernel's Python function; None if it is not installed."""
        raise NotImplementedError

    @cached_property
    def function(self) -> Callable[..., Any] | None:
        return self.load()

    @cached_property
    def parameters(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters) if self.function is not None else frozenset()

    def refusal(self, call: AttentionCall) -> str | None:
        device = call.query.device
        if device.type not in self.device_types:
            return f"runs on {' and '.join(self.device_types)} only"
        if call.dtype not in self.dtypes:
            takes = " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"takes {takes}, not {str(call.dtype).removeprefix('torch.')}"
        if device.type == "cuda":
            major, least, largest = _major_capability(device), *self.capabilities
            if not least <= major <= largest:
                return f"needs a GPU of compute capability {least} to {largest}, not {major}"
        if self.function is None:
            return "is not installed"
        if max(call.query.shape[-1], call.value.shape[-1]) > self.max_head_dim:
            return f"takes head dims up to {self.max_head_dim}, not {call.query.shape[-1]}"
        return self._missing(call)

    def _missing(self, call: AttentionCall) -> str | None:
        """The feature that the call needs and the function lacks."""
        if call.chunk is not None:
            return "has no attention in chunks"
        if call.window is not None and "window_size" not in self.parameters:
            return "has no sliding window"
        if call.softcap is not None and "softcap" not in self.parameters:
            return "has no softcap"
        if call.dropout > 0 and "dropout_p" not in self.parameters:
            return "has no dropout"
        return "has no attention sinks" if call.sinks is not None else None

    def attend(self, call: AttentionCall) -> Tensor:
        varlen = call.layout.varlen
        # the kernels load 8 entries at once; zeros in a longer head dim change no product
        width = -(-max(call.query.shape[-1], call.value.shape[-1]) // 8) * 8
        rows = [x[0].transpose(0, 1).to(call.dtype) for x in (call.query, call.key, call.value)]
        query, key, value = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in rows)
        key, value = gather_keys(key, varlen), gather_keys(value, varlen)
        output = self._run(query, key, value, call)
        return output[None, :, :, : call.value.shape[-1]]

    def _run(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """query (T, num_heads, width); key and value (K, num_kv_heads, width) -> (T, num_heads, width)."""
        raise NotImplementedError


class TorchVarlen(VarlenBackend):
    """`torch.nn.attention.varlen.varlen_attn`, torch >= 2.10."""

    name = "varlen"
    title = "torch's varlen_attn, one call per layer"

    @cached_property
    def _grouped(self) -> dict[tuple[Any, ...], bool]:  # results of `_takes_fewer_heads`
        return {}

    def load(self) -> Callable[..., Any] | None:
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return None
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn

    def _run(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        assert self.function is not None
        varlen = call.layout.varlen
        options: dict[str, Any] = {}
        if "window_size" in self.parameters:  # to the left and right of the query; (-1, 0) is causal
            options["window_size"] = (-1 if call.window is None else call.window - 1, 0)
        if "is_causal" in self.parameters:
            options["is_causal"] = True
        if "scale" in self.parameters:
            options["scale"] = call.scale
        else:
            query = query * (call.scale * query.shape[-1] ** 0.5)  # it divides by the root of the (padded) head dim
        if call.is_grouped and "enable_gqa" in self.parameters:
            options["enable_gqa"] = True
        elif call.is_grouped and not self._takes_fewer_heads(query, key):
            key, value = _repeated(key, value, query.shape[1])
        lengths = (varlen.cu_queries, varlen.cu_keys, varlen.max_queries, varlen.max_keys)
        output: Tensor = self.function(query, key, value, *lengths, **options)
        return output

    def _takes_fewer_heads(self, query: Tensor, key: Tensor) -> bool:
        """Whether a function without an argument for grouped heads still accepts fewer heads of keys and values.

        Tested once for each device, dtype and shape of heads, outside of any tracing. flash-attn itself accepts them,
        and copies of the keys for every query head would be most of a layer's memory.
        """
        kind = (query.device, query.dtype, query.shape[1:], key.shape[1])
        if kind not in self._grouped and type(query) is Tensor and not torch.compiler.is_compiling():
            self._grouped[kind] = self._is_right_with_fewer_heads(query, key)
        return self._grouped.get(kind, False)

    def _is_right_with_fewer_heads(self, query: Tensor, key: Tensor) -> bool:
        """Compares output and gradients with those for copied keys and values, on two sequences of over a tile."""
        generator, rows = torch.Generator().manual_seed(0), 200
        ends = torch.tensor([0, 70, rows], dtype=torch.int32, device=query.device)
        shapes = [(rows, *query.shape[1:]), *[(rows, *key.shape[1:])] * 2, (rows, *query.shape[1:])]
        *inputs, weight = (torch.randn(shape, generator=generator).to(query) for shape in shapes)

        def results(*, copied: bool) -> list[Tensor]:
            assert self.function is not None
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            kv = _repeated(leaves[1], leaves[2], len(query[0])) if copied else leaves[1:]
            causal: dict[str, Any] = {"is_causal": True} if "is_causal" in self.parameters else {"window_size": (-1, 0)}
            output = self.function(leaves[0], *kv, ends, ends, 130, 130, **causal)
            return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]

        try:
            with torch.enable_grad():
                found, expected = results(copied=False), results(copied=True)
        except Exception:  # any exception means that it does not accept them
            return False
        if [x.shape for x in found] != [x.shape for x in expected]:
            return False
        return all(float((x - y).norm() / y.norm()) < _SAME for x, y in zip(found, expected, strict=True))


def _repeated(key: Tensor, value: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Repeats keys and values so that every query head has its own."""
    groups = num_heads // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


class FlashAttn(VarlenBackend):
    """`flash_attn_varlen_func` of one generation of flash-attn, if its package is installed."""

    def __init__(self, generation: int, capabilities: tuple[int, int], max_head_dim: int = 256) -> None:
        self.generation = generation
        self.capabilities = capabilities
        self.max_head_dim = max_head_dim
        self.name = f"flash{generation}"
        self.title = f"flash-attn {generation}, one call per layer"

    def load(self) -> Callable[..., Any] | None:
        from transformers import modeling_flash_attention_utils as loader
        from transformers import utils

        if not getattr(utils, f"is_flash_attn_{self.generation}_available")():
            return None  # checked first: the loader would search for a kernel on the Hub
        functions, _ = loader.lazy_import_flash_attention(f"flash_attention_{self.generation}")
        varlen: Callable[..., Any] = functions[1]
        return varlen

    def _missing(self, call: AttentionCall) -> str | None:
        if call.sinks is None or call.chunk is not None:
            return super()._missing(call)
        if not self.parameters & {"s_aux", "learnable_sink"}:
            return "has no attention sinks"
        if call.sinks.requires_grad and torch.is_grad_enabled():
            return "has no gradient of attention sinks"
        return None

    def _run(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        assert self.function is not None
        varlen = call.layout.varlen
        options: dict[str, Any] = {"causal": True, "softmax_scale": call.scale}
        if call.window is not None:
            options["window_size"] = (call.window - 1, 0)
        if call.softcap is not None:
            options["softcap"] = call.softcap
        if call.dropout > 0:
            options["dropout_p"] = call.dropout
        if call.sinks is not None:
            options["s_aux" if "s_aux" in self.parameters else "learnable_sink"] = call.sinks.to(query.dtype)
        if "deterministic" in self.parameters:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        result = self.function(
            query,
            key,
            value,
            cu_seqlens_q=varlen.cu_queries,
            cu_seqlens_k=varlen.cu_keys,
            max_seqlen_q=varlen.max_queries,
            max_seqlen_k=varlen.max_keys,
            **options,
        )
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output


@lru_cache
def _major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
