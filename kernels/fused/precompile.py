"""Compiles the kernels for a head on all cores at once, before the first launch; also for absent GPUs.

    python -m fastdpo.kernels.precompile --hidden-size 4096 --vocab-size 128256 [--capability 9.0]

In: the sizes of heads. Out: compiled kernels in Triton's cache on disk, for all processes of this machine, and a line
for each kernel that does not compile. A kernel takes seconds to compile, and all kernels of a training step or a tuner
take minutes if they are compiled one after the other.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastdpo.kernels import launch
from fastdpo.kernels.backward import fill_logit_grads
from fastdpo.kernels.choices import choice_forward, fill_choice_grads
from fastdpo.kernels.forward import fused_forward, fused_forward_with_grads
from fastdpo.kernels.sparse import sparse_head_gradients
from fastdpo.kernels.token_sums import row_grads, token_sums

ROWS = 256  # of the tensors that are handed over; no kernel is compiled anew for their number
METRICS = ("entropy", "mean_logits", "is_top1")  # that training asks for by default


@dataclass
class Compiled:
    """The compiled kernels, by kernel and launch options; and the failures, with the compiler's messages."""

    names: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@contextmanager
def compiling_only(capability: tuple[int, int] | None = None, workers: int | None = None) -> Iterator[Compiled]:
    """Context manager that compiles launches in parallel and does not run them, so result tensors do not change.

    When the context ends, all compilation is finished and in Triton's cache; failures do not raise.

    Args:
        capability: capability of the GPU to compile for; None for the current one.
        workers: number of threads; None for one per core. The compiler releases Python's lock.
    """
    target = _target(capability)
    backend, done, started = make_backend(target), Compiled(), time.monotonic()
    futures: dict[str, tuple[str, Future[Any]]] = {}
    run = JITFunction.run

    def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        kwargs["debug"] = kwargs.get("debug", kernel.debug) or triton.knobs.runtime.debug
        if hasattr(triton.knobs.compilation, "instrumentation_mode"):
            kwargs["instrumentation_mode"] = triton.knobs.compilation.instrumentation_mode
        bound, specialization, options = bind(*args, **kwargs)
        key = f"{kernel.__name__} {specialization} {options}"
        if key in futures:
            return
        options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(kernel, signature, constexprs, attrs)
        name = f"{kernel.__name__}, {options.num_warps} warps, {options.num_stages} stages"
        compiling = pool.submit(triton.compile, source, target=target, options=options.__dict__)
        futures[key] = (name, compiling)

    with launch.as_if_on(capability) if capability is not None else nullcontext():
        with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            JITFunction.run = compile_launch
            try:
                yield done
            finally:
                JITFunction.run = run
        for key, (name, future) in futures.items():
            error = future.exception()
            done.names.append(name)
            if error is not None:
                done.failures[key] = f"{type(error).__name__}: {str(error)[:300]}"
    done.seconds = time.monotonic() - started


def _target(capability: tuple[int, int] | None) -> GPUTarget:
    if capability is not None:
        return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.runtime.driver.active.get_current_target()


def launch_head(
    hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device | str, options: bool
) -> None:
    """Makes every launch of training, of the trainers' metrics and of backward for such a head.

    Args:
        options: use a bias, a softcap and all statistics, instead of the arguments of training; also several labels per
            row.
    """
    hidden_states = torch.empty(ROWS, hidden_size, dtype=dtype, device=device)
    weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
    labels = torch.empty(ROWS, dtype=torch.int64, device=device)
    bias = torch.empty(vocab_size, dtype=dtype, device=device) if options else None
    softcap = 30.0 if options else None
    out = torch.empty(ROWS, -(-vocab_size // 16) * 16, dtype=dtype, device=device)[:, :vocab_size]
    head = (hidden_states, weight, bias, labels, 1.0, softcap)
    for outputs in ((), (*METRICS, "log_sum_sq_probs", "lse") if options else METRICS):
        values = fused_forward(*head, outputs)
        fused_forward_with_grads(out, *head, outputs)
    lse = values["lse_whole"], values["lse_rest"]
    fill_logit_grads(out, hidden_states, weight, bias, labels, *lse, lse[0], 0, vocab_size, 1.0, softcap)
    if options:
        choices = labels[:, None]
        choice_forward(*head[:3], choices, labels, *head[4:], ("entropy", "max_logit"))
        fill_choice_grads(out, *head[:3], choices, choices.float(), *lse, *lse, 0, *head[4:])
    _launch_skipping(*head, lse)
    _launch_sums(values["logps"], labels, options)


def _launch_skipping(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_scale: float,
    softcap: float | None,
    lse: tuple[Tensor, Tensor],
) -> None:
    blocks = launch.device_blocks(hidden_states, "skipping")
    fused_forward(hidden_states, weight, bias, labels, logit_scale, softcap, (), keep_partials=True)
    num_tiles = triton.cdiv(len(hidden_states), blocks.block_t), triton.cdiv(len(weight), blocks.block_v)
    kept = torch.zeros(num_tiles, dtype=torch.bool, device=weight.device)
    sparse_head_gradients(
        hidden_states,
        weight,
        bias,
        labels,
        *lse,
        lse[0],
        kept,
        block_t=blocks.block_t,
        block_v=blocks.block_v,
        logit_scale=logit_scale,
        softcap=softcap,
        hidden_dtype=weight.dtype,
        weight_dtype=weight.dtype,
        bias_dtype=None if bias is None else weight.dtype,
        max_tile_elements=2**20,
    )


def _launch_sums(logps: Tensor, labels: Tensor, options: bool) -> None:
    ends = torch.empty(5, dtype=torch.int64, device=labels.device)
    rows = torch.empty(ROWS, dtype=torch.int64, device=labels.device)
    weights = torch.empty(ROWS, device=labels.device) if options else None
    token_sums([logps], labels, ends, rows, weights, 0, torch.float32)
    token_sums([logps, logps, logps > 0], None, ends, rows, None, 0, torch.float64)
    row_grads(logps[:4], ROWS, ends, rows, weights, 0, (0, ROWS), torch.float32)


def precompile(
    sizes: list[tuple[int, int]],
    dtypes: list[torch.dtype],
    capability: tuple[int, int] | None = None,
    *,
    options: bool = False,
    say: Callable[[str], None] = print,
) -> Compiled:
    """Compiles the launches of heads of these sizes, (H, V)."""
    device = "cuda" if capability is None else "meta"
    with compiling_only(capability) as compiled:
        for hidden_size, vocab_size in sizes:
            for dtype in dtypes:
                launch_head(hidden_size, vocab_size, dtype, device, options)
    say(f"{len(compiled.names)} kernels in {compiled.seconds:.0f} s, {len(compiled.failures)} did not compile")
    for key, error in compiled.failures.items():
        say(f"FAILED: {key}: {error}")
    return compiled


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdpo.kernels.precompile", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, nargs="+", required=True)
    parser.add_argument("--vocab-size", type=int, nargs="+", required=True)
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"])
    parser.add_argument("--options", action="store_true", help="include a bias, a softcap and every statistic")
    parser.add_argument("--capability", help="compile for a GPU that is not installed, such as 9.0")
    given = parser.parse_args(arguments)
    capability = None
    if given.capability is not None:
        major, _, minor = given.capability.partition(".")
        capability = int(major), int(minor or 0)
    elif not torch.cuda.is_available():
        parser.error("--capability must be given where there is no GPU")
    sizes = [(h, v) for h in given.hidden_size for v in given.vocab_size]
    compiled = precompile(sizes, [getattr(torch, d) for d in given.dtype], capability, options=given.options)
    return 1 if compiled.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
