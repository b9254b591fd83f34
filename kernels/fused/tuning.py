"""Times the block shapes that fit a GPU and keeps the fastest; it never runs automatically.

    python -m fastdpo.kernels.tuning --hidden-size 4096 --vocab-size 128256 [--capability 9.0, to compile only]

All candidates are compiled first, on all cores at once; then they are timed, a few milliseconds each. In: the sizes of
a head. Out: `Tuning`, and an entry in the file that `use_tuned_blocks` reads. A candidate's numbers are compared with
the default's before timing: a candidate that is wrong or does not compile is listed and excluded. Not tuned: the shapes
for a bias, a softcap or statistics, and those of skipping, whose size determines what is skipped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastdpo.kernels import tuned
from fastdpo.kernels.backward import fill_logit_grads
from fastdpo.kernels.forward import fused_forward, fused_forward_with_grads
from fastdpo.kernels.launch import Blocks, candidate_blocks, device_blocks
from fastdpo.kernels.logits import is_interpreted
from fastdpo.kernels.precompile import Compiled, compiling_only
from fastdpo.kernels.products import product_blocks, product_candidates, products
from fastdpo.kernels.rounds import plan_rounds

GAIN = 0.98  # a candidate must take less than this share of the default's time to replace it
EAGER_ELEMENTS = 2**27  # logits' gradients made in forward: 256 MiB of bf16
NUM_VOCAB = 4096  # vocabulary ids in the measured block of the backward pass


class Trial(NamedTuple):
    """One candidate: its time, or the reason for its exclusion."""

    family: str
    blocks: Any  # Blocks or ProductBlocks
    ms: float | None
    refusal: str | None = None


@dataclass(frozen=True)
class Tuning:
    key: tuned.Key
    path: Path
    trials: list[Trial]  # the default of a family comes first
    best: dict[str, Any]  # family: Blocks or ProductBlocks


class Task(NamedTuple):
    """The measurement of a family's candidates."""

    default: Any
    candidates: list[Any]
    run: Callable[[Any], list[Tensor]]  # the results with these blocks; may be called any number of times


def tune(
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    num_rows: int = 4096,
    cache: str | Path | None = None,
    *,
    seconds: float = float("inf"),
    measure: Callable[[Callable[[], Any]], float] | None = None,
) -> Tuning:
    """Finds the fastest blocks of every kernel family for a head of this size, and writes them to `cache`.

    Args:
        hidden_size: H, any size. vocab_size: V. num_rows: T of the measured inputs.
        dtype: dtype of hidden states and weight: fp16, bf16 or fp32.
        device: None for the current CUDA device.
        cache: the file; None for `tuned.default_path()`. Its other entries stay.
        seconds: time for all candidates, in equal shares per family; candidates beyond it are listed as left out.
        measure: returns the milliseconds of a call; None for the median on the device, with a cold L2 cache.
    Raises:
        ValueError: no CUDA device, another dtype, a size below 1, or a `cache` with other content.
    """
    device = _usable_device(device)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be fp16, bf16 or fp32, got {dtype}")
    if min(hidden_size, vocab_size, num_rows) < 1:
        raise ValueError(f"sizes must be at least 1, got {(hidden_size, vocab_size, num_rows)}")
    path = tuned.default_path() if cache is None else Path(cache)
    if path.exists():
        tuned.load(path)  # refuses the file before minutes of measuring
    measure = measure or _median_ms
    start = time.monotonic()

    g = torch.Generator(device).manual_seed(0)
    hidden_states = torch.randn(num_rows, hidden_size, generator=g, device=device).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=g, device=device).mul_(2 / hidden_size**0.5).to(dtype)
    labels = torch.randint(0, vocab_size, (num_rows,), generator=g, device=device)
    key = tuned.key_of(hidden_states)
    trials: list[Trial] = []
    best: dict[str, Any] = {}
    with tuned.blocks_of({}), torch.cuda.device(device if device.type == "cuda" else -1):
        if device.type == "cuda":
            compile_candidates(hidden_states, weight, labels)
        for i, (family, make_task) in enumerate(TASKS.items()):
            task = make_task(hidden_states, weight, labels)
            deadline = start + seconds * (i + 1) / len(TASKS)  # the next family gets the time that a family leaves over
            best[family], tried = _fastest(family, task, measure, deadline)
            trials += tried
    tuned.save(path, key, {family: blocks._asdict() for family, blocks in best.items()})
    return Tuning(key, path, trials, best)


def compile_candidates(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, capability: tuple[int, int] | None = None
) -> Compiled:
    """Compiles every family's candidates at once; failures show up again, and are listed, when a candidate is tried.

    Args:
        hidden_states, weight, labels: the tensors of the measurement, or tensors on the device "meta".
        capability: capability of an absent GPU; None for the current one.
    """
    with compiling_only(capability) as compiled:
        for make_task in TASKS.values():
            task = make_task(hidden_states, weight, labels)
            for blocks in dict.fromkeys((task.default, *task.candidates)):
                task.run(blocks)
    return compiled


def _forward_task(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Task:
    def run(blocks: Blocks) -> list[Tensor]:
        values = fused_forward(hidden_states, weight, None, labels, 1.0, None, ("lse",), blocks)
        return [values["logps"], values["lse"]]

    return Task(device_blocks(hidden_states), candidate_blocks(hidden_states), run)


def _eager_task(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Task:
    num_rows = max(1, min(hidden_states.shape[0], EAGER_ELEMENTS // weight.shape[0]))
    hidden_states, labels = hidden_states[:num_rows], labels[:num_rows]
    out = torch.empty((num_rows, weight.shape[0]), dtype=weight.dtype, device=weight.device)

    def run(blocks: Blocks) -> list[Tensor]:
        fused_forward_with_grads(out, hidden_states, weight, None, labels, 1.0, None, (), blocks)
        return [out]

    return Task(device_blocks(hidden_states, "eager"), _one_tile_per_program(hidden_states), run)


def _logit_grads_task(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Task:
    values = fused_forward(hidden_states, weight, None, labels, 1.0, None, ())
    ones = torch.ones_like(values["logps"])
    block, num_vocab = weight[:NUM_VOCAB], weight.shape[0]
    out = torch.empty((hidden_states.shape[0], block.shape[0]), dtype=weight.dtype, device=weight.device)

    def run(blocks: Blocks) -> list[Tensor]:
        lse = values["lse_whole"], values["lse_rest"]
        fill_logit_grads(out, hidden_states, block, None, labels, *lse, ones, 0, num_vocab, 1.0, None, blocks)
        return [out]

    return Task(device_blocks(hidden_states, "logit_grads"), _one_tile_per_program(hidden_states), run)


def _one_tile_per_program(x: Tensor) -> list[Blocks]:
    """The candidates without persistent programs, which only the sums kernel supports."""
    return [blocks for blocks in candidate_blocks(x) if not blocks.persistent]


def _products_task(hidden_states: Tensor, weight: Tensor, labels: Tensor) -> Task:
    tile = device_blocks(hidden_states, "skipping")
    block = weight[:NUM_VOCAB]
    shape = (triton.cdiv(hidden_states.shape[0], tile.block_t), triton.cdiv(block.shape[0], tile.block_v))
    rounds = plan_rounds(torch.ones(shape, dtype=torch.bool, device=weight.device), shape[0] * shape[1], True)
    tiles = torch.zeros((rounds.num_slots, tile.block_t, tile.block_v), dtype=weight.dtype, device=weight.device)
    tiles[:, ::3, ::5] = 0.5
    unit = torch.ones(1, device=weight.device)
    grad_weight = torch.empty_like(block)
    grad_hidden = torch.empty_like(hidden_states, dtype=torch.float32)

    def run(blocks: Any) -> list[Tensor]:
        products(grad_weight, tiles, hidden_states, rounds.tiles, unit, True, True, blocks)(0)
        products(grad_hidden.zero_(), tiles, block, rounds.rows, unit, False, False, blocks)(0)
        return [grad_weight, grad_hidden]

    return Task(product_blocks(tiles, hidden_states), product_candidates(tiles), run)


TASKS = {"forward": _forward_task, "eager": _eager_task, "logit_grads": _logit_grads_task, "products": _products_task}


def _fastest(
    family: str, task: Task, measure: Callable[[Callable[[], Any]], float], deadline: float
) -> tuple[Any, list[Trial]]:
    """The best blocks and every trial, the default's first."""
    expected = [x.clone() for x in task.run(task.default)]
    default_ms = measure(lambda: task.run(task.default))
    trials = [Trial(family, task.default, default_ms)]
    best, best_ms = task.default, GAIN * default_ms
    for blocks in task.candidates:
        if blocks == task.default:
            continue
        trial = _try(family, task, blocks, expected, measure, deadline)
        trials.append(trial)
        if trial.ms is not None and trial.ms < best_ms:
            best, best_ms = blocks, trial.ms
    return best, trials


def _try(
    family: str,
    task: Task,
    blocks: Any,
    expected: list[Tensor],
    measure: Callable[[Callable[[], Any]], float],
    deadline: float,
) -> Trial:
    if time.monotonic() > deadline:
        return Trial(family, blocks, None, "no time left")
    for x in task.run(task.default):
        x.fill_(torch.nan)  # reused buffers: elements that a candidate does not write must not look written
    try:
        found = task.run(blocks)
        errors = [_relative_error(x, y) for x, y in zip(found, expected, strict=True)]
        if not all(error <= _tolerance(y) for error, y in zip(errors, expected, strict=True)):
            return Trial(family, blocks, None, f"numbers differ from the default's by {max(errors):.1e}")
        return Trial(family, blocks, measure(lambda: task.run(blocks)))
    except Exception as error:  # any exception of the compiler or the driver for this shape
        return Trial(family, blocks, None, f"{type(error).__name__}: {str(error)[:200]}")


def _relative_error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-300))


def _tolerance(x: Tensor) -> float:
    """The tolerance: two roundings of a result; fp32 results are sums in another order."""
    return 1e-5 if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps


def _median_ms(call: Callable[[], Any]) -> float:
    return triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")


def _usable_device(device: torch.device | str | None) -> torch.device:
    if device is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    device = torch.device("cpu" if device is None else device)
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted()):
        raise ValueError(f"tuning needs a CUDA device, got {device}")
    return device


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastdpo.kernels.tuning", description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--num-rows", type=int, default=4096)
    parser.add_argument("--cache", type=Path, help=f"file to write, default {tuned.default_path()}")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="start no new candidate after this time; all kernels share it",
    )
    parser.add_argument(
        "--capability", help="only compile the candidates, for a GPU that is not installed, such as 9.0"
    )
    options = parser.parse_args(arguments)
    if options.capability is not None:
        return _compile_alone(options)
    sizes = options.hidden_size, options.vocab_size, getattr(torch, options.dtype)
    try:
        found = tune(*sizes, num_rows=options.num_rows, cache=options.cache, seconds=options.seconds)
    except ValueError as error:
        parser.error(str(error))
    for trial in found.trials:
        outcome = f"{trial.ms:9.3f} ms" if trial.ms is not None else f"left out: {trial.refusal}"
        mark = "*" if trial.blocks == found.best[trial.family] else " "
        print(f"{mark} {trial.family:12} {'x'.join(str(int(x)) for x in trial.blocks):24} {outcome}")
    print(f"wrote {found.path}")
    return 0


def _compile_alone(options: argparse.Namespace) -> int:
    major, _, minor = options.capability.partition(".")
    settings = {"dtype": getattr(torch, options.dtype), "device": "meta"}
    compiled = compile_candidates(
        torch.empty(options.num_rows, options.hidden_size, **settings),
        torch.empty(options.vocab_size, options.hidden_size, **settings),
        torch.empty(options.num_rows, dtype=torch.int64, device="meta"),
        (int(major), int(minor or 0)),
    )
    for key, error in compiled.failures.items():
        print(f"left out: {key}: {error}")
    print(f"{len(compiled.names)} kernels in {compiled.seconds:.0f} s, {len(compiled.failures)} did not compile")
    return 1 if compiled.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
