"""How a training step grows: forward and backward of fastdpo and of a plain loop at four lengths, vocabularies, batch
sizes or numbers of responses.

In: a workload's model and the kind of sweep. Out: one record per size and method, with milliseconds, the most MiB that
the step adds and the gradients among them, and the tokens with and without shared prompts. A method whose loss or
gradient differs from the plain loop's has the reason in the place of its figures.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.evidence.bench.cases import VOCABULARIES
from fastdpo.evidence.bench.measure import MIB, interleaved_ms, peak_mib
from fastdpo.evidence.bench.steps.methods import BETA, plain_logps
from fastdpo.evidence.bench.steps.workloads import Workload
from fastdpo.types import IGNORE_INDEX, TokenizedGroup

PLAIN, OURS, UNSHARED = "plain, response rows", "fastdpo", "fastdpo, unshared"
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}  # relative, of loss and gradient's norm


@dataclass(frozen=True)
class Size:
    """One point of a sweep."""

    x: int  # the swept number
    vocab: int
    num_prompts: int
    num_responses: int
    prompt: int  # tokens
    response: int

    @property
    def raw_tokens(self) -> int:
        """Tokens of all sequences, each with its own prompt."""
        return self.num_prompts * self.num_responses * (self.prompt + self.response)

    @property
    def unique_tokens(self) -> int:
        """Tokens with every prompt once."""
        return self.num_prompts * (self.prompt + self.num_responses * self.response)


def sizes(kind: str, workload: Workload) -> list[Size]:
    """Four sizes. Lengths end at `max_length` or 1,024 tokens, vocabularies at the model's, if it is above 100,000, or
    at Llama 3's; there are as many prompts as the step has pairs, or half of them for several responses."""
    prompt, response = workload.mean_lengths or (120, 50)
    base = Size(0, workload.vocab_size, workload.pairs_per_step, 2, prompt, response)
    if kind == "vocab":
        return [replace(base, x=size, vocab=size) for size in vocab_sizes(workload)]
    if kind == "length":
        longest = min(workload.max_length, 1024)
        found = [longest // n for n in (8, 4, 2, 1)]
        return [replace(base, x=n, prompt=n - n // 2, response=n // 2) for n in found]
    if kind == "batch":
        return [replace(base, x=n, num_prompts=n) for n in (1, 2, 4, 8)]
    few = max(1, workload.pairs_per_step // 2)
    return [replace(base, x=n, num_prompts=few, num_responses=n) for n in (2, 4, 8, 16)]


def vocab_sizes(workload: Workload) -> list[int]:
    largest = workload.vocab_size if workload.vocab_size > 100_000 else VOCABULARIES["llama3"]
    return [largest // n for n in (8, 4, 2, 1)]


def grown(kind: str, workload: Workload, num_runs: int) -> Iterator[list[dict[str, Any]]]:
    """The records of each size, when they are there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size in sizes(kind, workload):
        model = replace(workload, vocab_size=size.vocab).make_model(str(device))
        yield _measured(model, size, device, workload.dtype, num_runs)
        del model
        gc.collect()


def _measured(model: nn.Module, size: Size, device: torch.device, dtype: str, num_runs: int) -> list[dict[str, Any]]:
    gradients = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    facts = {"x": size.x, "raw_tokens": size.raw_tokens, "unique_tokens": size.unique_tokens}
    records: dict[str, dict[str, Any]] = {}
    jobs: dict[str, Callable[[], Any]] = {}
    expected: tuple[float, float] | None = None
    for name, step in _steps(model, size, device).items():
        records[name] = {"method": name, **facts}
        try:
            found = step()
            expected = expected or found
            off = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
            if not off <= TOLERANCE[dtype]:
                raise AssertionError(f"loss and gradient norm {found} where {expected} is expected")
            records[name] |= {"off": off, "peak_mib": peak_mib(step), "results_mib": gradients / MIB}
            jobs[name] = step
        except Exception as error:  # one method's failure is a line in the table, not the end of the run
            records[name]["error"] = f"{type(error).__name__}: {error}".split("\n")[0]
    for name, times in interleaved_ms(jobs, num_runs).items():
        records[name] |= {**times, "runs": num_runs}
    return list(records.values())


def _steps(model: Any, size: Size, device: torch.device) -> dict[str, Callable[[], tuple[float, float]]]:
    """Functions that return the loss and the norm of its gradient; the plain loop comes first."""
    from fastdpo.data.batches.packing import pack_pairs
    from fastdpo.modeling.packed import packed_logps

    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(4, size.vocab, (length,), generator=generator).tolist()

    preferences = tuple((0, other) for other in range(1, size.num_responses))
    groups = [
        TokenizedGroup(
            ids(size.prompt), [ids(size.response) for _ in range(size.num_responses)], preferences=preferences
        )
        for _ in range(size.num_prompts)
    ]
    sequences = torch.tensor([[*group.prompt_ids, *response] for group in groups for response in group.responses])
    labels = sequences.clone()
    labels[:, : size.prompt] = IGNORE_INDEX
    padded = {"input_ids": sequences, "attention_mask": torch.ones_like(sequences), "labels": labels}
    padded = {name: x.to(device) for name, x in padded.items()}

    own = copy.deepcopy(model)  # the other one's attention takes packed rows alone

    def plain_margins() -> Tensor:
        logps = plain_logps(own, padded).view(size.num_prompts, size.num_responses)
        return (logps[:, :1] - logps[:, 1:]).flatten()

    def packed_margins(batch: Any) -> Callable[[], Tensor]:
        def margins() -> Tensor:
            pairs = packed_logps(model, batch)
            return pairs.chosen - pairs.rejected

        return margins

    def step(model: nn.Module, margins: Callable[[], Tensor]) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            loss = -F.logsigmoid(BETA * margins()).mean()
            loss.backward()
            grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
            norm = torch.stack([grad.float().norm() for grad in grads]).norm()
            model.zero_grad(set_to_none=True)
            return float(loss.detach()), float(norm)

        return run

    batches = {name: pack_pairs(groups, prefix_sharing=name == OURS).to(device) for name in (OURS, UNSHARED)}
    steps = {name: step(model, packed_margins(batch)) for name, batch in batches.items()}
    return {PLAIN: step(own, plain_margins), **steps}
