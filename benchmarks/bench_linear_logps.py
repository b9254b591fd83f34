"""The head op against plain PyTorch: forward and backward of summed log-probs, on the shapes of one preference step.

    python benchmarks/bench_linear_logps.py [--runs N] [--out FILE.jsonl]
    pytest benchmarks/bench_linear_logps.py

Baselines: full logits on every row, and full logits on the response rows alone. Rates are matmul FLOPs,
2 * rows * H * V for each of the products that the method must do (plain: 3, recompute: 4), over the time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pytest
import torch
from measure import interleaved_ms, machine_facts
from torch import Tensor

from fastdpo import linear_logps


@dataclass(frozen=True)
class Shape:
    """`num_rows` response rows out of `num_tokens`, hidden size, vocabulary."""

    num_tokens: int
    num_rows: int
    hidden_size: int
    vocab_size: int
    dtype: str

    def __str__(self) -> str:
        return f"T{self.num_tokens}-R{self.num_rows}-H{self.hidden_size}-V{self.vocab_size}-{self.dtype}"


CPU_SHAPES = [Shape(2048, 1024, 512, 32000, "float32")]
GPU_SHAPES = [Shape(32768, 16384, 4096, 128256, "bfloat16"), Shape(16384, 8192, 4096, 151936, "bfloat16")]


def plain(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> Tensor:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    logits = (hidden_states @ lm_head_weight.T).to(dtype)  # (T, V)
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def step(logps: Callable[..., Tensor], hidden_states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the weighted sum of log-probs; the weights are what a preference loss hands back."""
    values = logps(hidden_states, weight, labels)
    weights = torch.linspace(-1, 1, values.shape[0], device=values.device)
    return torch.autograd.grad((values * weights).sum(), [hidden_states, weight])


def ours(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor) -> Tensor:
    return linear_logps(hidden_states, lm_head_weight, labels).logps


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states (num_tokens, H) and head (V, H) that want gradients, and labels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, shape.dtype)
    torch.manual_seed(0)
    hidden_states = torch.randn(shape.num_tokens, shape.hidden_size, device=device, dtype=dtype)
    weight = torch.randn(shape.vocab_size, shape.hidden_size, device=device, dtype=dtype) * 0.02
    labels = torch.randint(shape.vocab_size, (shape.num_tokens,), device=device)
    return hidden_states.requires_grad_(), weight.requires_grad_(), labels


def methods(shape: Shape) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """One training step of the head by each method, on the same random inputs."""
    hidden_states, weight, labels = inputs(shape)
    rows = hidden_states.detach()[-shape.num_rows :].requires_grad_()
    row_labels = labels[-shape.num_rows :]
    return {
        "plain, all rows": lambda: step(plain, hidden_states, weight, labels),
        "plain, response rows": lambda: step(plain, rows, weight, row_labels),
        "fastdpo": lambda: step(ours, rows, weight, row_labels),
    }


def check(shape: Shape) -> None:
    """A wrong result gives no number: both gradients against fp64, on 128 rows, beside plain PyTorch's own error."""
    hidden_states, weight, labels = inputs(Shape(128, 128, shape.hidden_size, shape.vocab_size, shape.dtype))
    exact = step(
        plain, hidden_states.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), labels
    )

    def errors(method: Callable[..., Tensor]) -> list[float]:
        gradients = step(method, hidden_states, weight, labels)
        return [((g - e).norm() / e.norm()).item() for g, e in zip(gradients, exact, strict=True)]

    for error, plain_error in zip(errors(ours), errors(plain), strict=True):
        if error > 2 * plain_error + 1e-7:
            raise AssertionError(f"{shape}: a gradient is off by {error:.1e}, plain PyTorch by {plain_error:.1e}")


def shapes() -> list[Shape]:
    return GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES


@pytest.mark.parametrize("method", ["plain, all rows", "plain, response rows", "fastdpo"])
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_head_op(benchmark, shape: Shape, method: str) -> None:
    check(shape)
    benchmark.pedantic(methods(shape)[method], rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each method")
    parser.add_argument("--out", help="append one JSON line per measurement to this file")
    options = parser.parse_args()
    facts = machine_facts()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    for shape in shapes():
        check(shape)
        print(f"\n{shape}\n{'method':<24}{'ms':>10}{'min':>10}{'max':>10}{'TFLOP/s':>10}")
        for method, times in interleaved_ms(methods(shape), options.runs).items():
            num_rows = shape.num_tokens if method == "plain, all rows" else shape.num_rows
            num_products = 4 if method == "fastdpo" else 3
            flops = 2 * num_products * num_rows * shape.hidden_size * shape.vocab_size
            rate = flops / times["ms"] / 1e9
            print(f"{method:<24}{times['ms']:>10.1f}{times['ms_min']:>10.1f}{times['ms_max']:>10.1f}{rate:>10.3f}")
            if options.out:
                record = {
                    **facts,
                    **asdict(shape),
                    "method": method,
                    "pass": "forward+backward",
                    "flops": flops,
                    **times,
                }
                with open(options.out, "a") as file:
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
