"""What `on_oversized_row split` costs and saves: time and peak memory of a ranking whole, and in parts.

    python benchmarks/bench_row_parts.py [--quick] [--rounds N] [--out FILE.jsonl]

Rows of K responses to a prompt, in one micro-batch, in parts of about half of their tokens, and response by response;
in parts, the prompt runs once for all of them, or with each as where it does not fit. Ways take turns; the time is the
median of CPU seconds of a step (of wall seconds on a GPU), the peak that of live bytes beyond weights and gradients.
Gradients are compared with those of the whole row before anything is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from shared.special_tokens import make_tokenizer

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.memory import peak_live_bytes

MOST_ERROR = 1e-5  # of the gradient, in fp32
SHAPES = ((4, 1024, 512), (2, 2048, 512), (4, 4096, 256), (2, 512, 1024))  # responses; tokens of prompt and of each
QUICK = ((4, 48, 32),)


def make_model(quick: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64 if quick else 256, "intermediate_size": 192 if quick else 768}
    shape = {"num_hidden_layers": 2 if quick else 6, "num_attention_heads": 4, "vocab_size": 4096}
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape, max_position_embeddings=8192))


def make_row(num_responses: int, prompt: int, response: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(10, 4000, (length,), generator=generator).tolist()

    responses = [tokens(response) for _ in range(num_responses)]
    return {
        "prompt_ids": tokens(prompt),
        "responses": responses,
        "preferences": [[i, i + 1] for i in range(num_responses - 1)],
    }


class Way:
    """A trainer whose steps are measured."""

    def __init__(self, folder: str, row: dict[str, Any], quick: bool, limit: int | None, *, repeats: bool) -> None:
        settings: dict[str, Any] = {"loss_type": "plackett_luce", "reference_free": True, "max_length": None}
        settings |= {"gradient_checkpointing": True, "report_to": "none", "disable_tqdm": True, "bf16": False}
        if limit is not None:
            settings |= {"max_tokens_per_microbatch": limit, "on_oversized_row": "split"}
        args = DPOConfig(folder, save_strategy="no", per_device_train_batch_size=1, **settings)
        self.trainer = DPOTrainer(make_model(quick), args=args, train_dataset=[row], processing_class=make_tokenizer())
        self.trainer.create_optimizer()
        self.trainer.model.activation_checkpointing_enable({"use_reentrant": False})
        if repeats:
            self.trainer.out_of_memory.repeats_prompt = "the benchmark compares"
        self.seconds: list[float] = []

    def step(self) -> None:
        inputs = self.trainer.collator(list(self.trainer.train_dataset))
        self.trainer.training_step(self.trainer.model, inputs)

    def gradient(self) -> torch.Tensor:
        self.trainer.model.zero_grad(set_to_none=True)
        self.step()
        return torch.cat([p.grad.flatten() for p in self.trainer.model.parameters()])

    def timed(self) -> None:
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        started = clock()
        self.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(clock() - started)


def measured(shape: tuple[int, int, int], quick: bool, rounds: int) -> list[dict[str, Any]]:
    """The records of all ways to run one row."""
    count, prompt, response = shape
    row, whole = make_row(count, prompt, response), prompt + count * response
    parts = {"responses": prompt + response}
    if count > 2:
        parts["two parts"] = prompt + count * response // 2
    limits = {("whole", False): None, **{(name, repeats): n for name, n in parts.items() for repeats in (False, True)}}
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            (name, repeats): Way(f"{folder}/{i}", row, quick, limit, repeats=repeats)
            for i, ((name, repeats), limit) in enumerate(limits.items())
        }
        exact = ways["whole", False].gradient()
        errors = {key: float((way.gradient() - exact).norm() / exact.norm()) for key, way in ways.items()}
        assert max(errors.values()) <= MOST_ERROR, errors
        peaks = {key: peak_live_bytes(way.step) for key, way in ways.items()}
        for _ in range(rounds):
            for way in ways.values():
                way.timed()
    return [
        {
            "benchmark": "row_parts",
            "way": name,
            "prompt_runs": "once" if name == "whole" or not repeats else "with every part",
            "responses": count,
            "prompt_tokens": prompt,
            "response_tokens": response,
            "tokens_at_once": min(limits[name, repeats] or whole, whole),
            "seconds": statistics.median(way.seconds),
            "spread": max(way.seconds) - min(way.seconds),
            "peak_bytes": peaks[name, repeats],
            "gradient_error": errors[name, repeats],
        }
        for (name, repeats), way in ways.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out")
    options = parser.parse_args()
    for shape in QUICK if options.quick else SHAPES:
        records = measured(shape, options.quick, 2 if options.quick else options.rounds)
        for record in records:
            print(json.dumps(record), flush=True)
        append_lines(options.out, [{**machine_facts(), **record} for record in records])


if __name__ == "__main__":
    main()
