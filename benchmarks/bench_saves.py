"""What a checkpoint that can be checked costs: the time of a save with checksums, without them, and by Trainer alone.

    python benchmarks/bench_saves.py [--quick] [--rounds N] [--out FILE.jsonl]

All weights and the state of AdamW, saved to the disk of the temporary folder. Ways take turns, and what they have
written reaches the disk before the next one starts. Also the time at the end of a step that neither logs nor saves:
fastdpo's, which asks for signals, and Trainer's. Times are medians, of wall and of CPU seconds. What checksums take of
a save's CPU seconds is measured inside the save, since a busy machine makes the difference of two saves uncertain.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from shared.special_tokens import make_tokenizer
from transformers import Trainer

from fastdpo import DPOConfig, DPOTrainer, StopOnSignal
from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.training import resuming
from fastdpo.training.saving import manifest

WHOLE, UNCHECKED, TRAINER = "fastdpo", "fastdpo, without checksums", "Trainer"
STEPS = 200


def make_trainer(folder: str, quick: bool) -> DPOTrainer:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64 if quick else 512, "intermediate_size": 192 if quick else 1536}
    shape = {"num_hidden_layers": 2 if quick else 8, "num_attention_heads": 4, "vocab_size": 64 if quick else 16384}
    settings: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "bf16": False}
    args = DPOConfig(folder, max_steps=1, reference_free=True, logging_strategy="no", **settings)
    row = {"prompt_ids": [1, 5], "chosen_ids": [6], "rejected_ids": [7]}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **shape, max_position_embeddings=64))
    return DPOTrainer(model, args=args, train_dataset=[row] * 8 * STEPS, processing_class=make_tokenizer())


@contextmanager
def without_checksums(trainer: Any) -> Iterator[None]:
    write, start = resuming.write_manifest, trainer.checksums.start
    resuming.write_manifest = lambda folder, early=None: None
    trainer.checksums.start = lambda folder: None
    try:
        yield
    finally:
        resuming.write_manifest, trainer.checksums.start = write, start


@contextmanager
def timed_checksums() -> Iterator[list[tuple[float, float]]]:
    """A list that gets the seconds that the save is held up by the manifest, and its CPU seconds; and those of the
    checksums that a thread makes meanwhile, which hold it up for 0.0."""
    spent: list[tuple[float, float]] = []

    def timed(inner: Callable[..., Any], where: Callable[[], bool]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            result = inner(*args, **kwargs)
            if where():
                spent.append((time.perf_counter() - wall if in_main() else 0.0, time.thread_time() - cpu))
            return result

        return run

    def in_main() -> bool:
        return threading.current_thread() is threading.main_thread()

    write, checksum = resuming.write_manifest, manifest._checksum
    resuming.write_manifest = timed(write, in_main)
    manifest._checksum = timed(checksum, lambda: not in_main())
    try:
        yield spent
    finally:
        resuming.write_manifest, manifest._checksum = write, checksum


def save(trainer: Any, way: str) -> None:
    if way == TRAINER:
        Trainer._save_checkpoint(trainer, trainer.model, None)
    elif way == UNCHECKED:
        with without_checksums(trainer):
            trainer._save_checkpoint(trainer.model, None)
    else:
        trainer._save_checkpoint(trainer.model, None)


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def time_saves(trainer: Any, rounds: int) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """Wall and CPU seconds of every save by its way; the bytes of one, and the shares of its checksums in both."""
    found: dict[str, list[tuple[float, float]]] = {WHOLE: [], UNCHECKED: [], TRAINER: []}
    num_bytes, shares = 0, []
    for number in range(rounds + 1):
        for way in list(found)[:: 1 if number % 2 else -1]:
            trainer.state.global_step += 1
            os.sync()
            with timed_checksums() as spent:
                seconds = timed(partial(save, trainer, way))
            folder = trainer._checkpoint_path(None)
            num_bytes = sum(path.stat().st_size for path in folder.iterdir())
            shutil.rmtree(folder)
            if number > 0:  # the first is a warm-up
                found[way].append(seconds)
                if way == WHOLE:
                    checks = [sum(each) for each in zip(*spent, strict=True)]
                    shares.append([part / whole for part, whole in zip(checks, seconds, strict=True)])
    share, cpu_share = (statistics.median(each) for each in zip(*shares, strict=True))
    return found, {"bytes": num_bytes, "checksum_share": share, "checksum_cpu_share": cpu_share}


def time_steps(folder: str) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of what follows each of STEPS steps, which fastdpo's code and Trainer's end in turn."""
    found: dict[str, list[tuple[float, float]]] = {WHOLE: [], TRAINER: []}
    trainer: Any = make_trainer(folder, quick=True)
    trainer.args.max_steps, trainer.args.logging_steps = STEPS, 2 * STEPS
    trainer.add_callback(StopOnSignal())
    ends = {WHOLE: trainer._maybe_log_save_evaluate, TRAINER: Trainer._maybe_log_save_evaluate.__get__(trainer)}

    def end(*args: Any, **kwargs: Any) -> None:
        way = TRAINER if trainer.state.global_step % 2 else WHOLE
        found[way].append(timed(lambda: ends[way](*args, **kwargs)))

    trainer._maybe_log_save_evaluate = end
    trainer.train()
    return {way: seconds[1:-1] for way, seconds in found.items()}  # the last step saves


def records(kind: str, found: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    lines = []
    for way, seconds in found.items():
        wall, cpu = zip(*seconds, strict=True)
        line = {"benchmark": "saves", "kind": kind, "way": way, "rounds": len(seconds)}
        line |= {"seconds": statistics.median(wall), "spread": max(wall) - min(wall)}
        line |= {"cpu_seconds": statistics.median(cpu), "cpu_spread": max(cpu) - min(cpu)}
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, options.quick)
        trainer.train()  # AdamW then has its state
        saves, facts = time_saves(trainer, 2 if options.quick else options.rounds)
        lines = [*records("save", saves), *records("end of a step", time_steps(f"{folder}/steps"))]
        lines[0] |= facts
    for line in lines:
        print(json.dumps(line), flush=True)
    append_lines(options.out, [{**machine_facts(), **line} for line in lines])


if __name__ == "__main__":
    main()
