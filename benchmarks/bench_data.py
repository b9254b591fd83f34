"""How long a run takes until it can start: from conversations in memory to a trainer that is ready, ours and TRL's.

    python benchmarks/bench_data.py [--quick] [--rows N] [--kinds ...] [--rounds N] [--out FILE.jsonl]

Rows are made of random words, of the lengths of an instruction dataset, for a byte-level tokenizer of 8,000 tokens with
a ChatML template; the model is tiny, so that what takes time is the data. Every turn is a process of its own, with an
empty cache, ours and TRL's take turns. "data" is the preparation of the rows alone, "ready" the whole constructor of
the trainer; CPU seconds are those of all threads of the process while the data is prepared. Memory is the process's
peak, resident, less what it had before. Ours looks for every string of every row in what the template made of it; the
tokens of both are compared, pair by pair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.steps.worker import QUIET

METHODS = ("TRL", "fastdpo")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")
# words of a message: of the system, of each question, of each earlier answer, of the last answers; earlier turns
KINDS = {"short": (0, 60, 0, 100, 0), "turns": (40, 60, 100, 100, 2)}


def make_words(generator: random.Random) -> list[str]:
    """2,000 words of three to nine letters, as frequent ones of a language are."""
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    return ["".join(generator.choices(letters, range(26, 0, -1), k=generator.randint(3, 9))) for _ in range(2000)]


def make_rows(kind: str, num_rows: int) -> list[dict[str, Any]]:
    """Preference rows in messages, the same in every process."""
    num_system, num_question, num_earlier, num_answer, num_turns = KINDS[kind]
    generator = random.Random(0)
    words = make_words(generator)

    def message(role: str, mean: int) -> dict[str, str]:
        count = max(1, int(generator.gauss(mean, mean / 4)))
        return {"role": role, "content": " ".join(generator.choices(words, k=count))}

    rows = []
    for _ in range(num_rows):
        prompt = [message("system", num_system)] if num_system else []
        for _ in range(num_turns):
            prompt += [message("user", num_question), message("assistant", num_earlier)]
        prompt.append(message("user", num_question))
        rows.append(
            {
                "prompt": prompt,
                "chosen": [message("assistant", num_answer)],
                "rejected": [message("assistant", num_answer)],
            }
        )
    return rows


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<pad>", "</s>", *SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(make_words(random.Random(0)))], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = CHATML
    return tokenizer


def make_model(vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, **sizes))


def turn(line: str) -> dict[str, Any]:
    """Seconds and memory of one method, in this process. `line` is JSON: the method, the kind and number of rows."""
    job = json.loads(line)
    from datasets import Dataset

    tokenizer = make_tokenizer()
    dataset = Dataset.from_list(make_rows(job["kind"], job["rows"]))
    model, reference = make_model(len(tokenizer)), make_model(len(tokenizer))
    settings = {"max_length": 2048, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False}
    if job["method"] == "TRL":
        import trl

        trainer_class, config = trl.DPOTrainer, trl.DPOConfig(job["folder"], **settings)
    else:
        import fastdpo

        trainer_class, config = fastdpo.DPOTrainer, fastdpo.DPOConfig(job["folder"], **settings)
    spent: dict[str, float] = {}
    prepare = trainer_class._prepare_dataset

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        prepared = prepare(self, *args, **kwargs)
        spent.update(data_s=time.perf_counter() - wall, data_cpu_s=time.process_time() - cpu)
        return prepared

    trainer_class._prepare_dataset = timed
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        trainer = trainer_class(model, reference, config, train_dataset=dataset, processing_class=tokenizer)
        spent["ready_s"] = time.perf_counter() - start
        spent["peak_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    finally:
        trainer_class._prepare_dataset = prepare
    return {**spent, "tokens": fingerprint(trainer.train_dataset)}


def fingerprint(dataset: Any) -> str:
    """A digest of the tokens of all pairs, in order, whichever trainer has made them."""
    digest = hashlib.blake2b(digest_size=16)
    for row in dataset:
        sides = row["responses"] if "responses" in row else (row["chosen_ids"], row["rejected_ids"])
        digest.update(repr([row["prompt_ids"], *map(list, sides)]).encode())
    return digest.hexdigest()


def in_new_process(job: dict[str, Any]) -> dict[str, Any]:
    """As `turn`, or {"error": ...}."""
    command = [sys.executable, str(Path(__file__)), "--turn", json.dumps(job)]
    env = {**os.environ, **QUIET, "HF_DATASETS_CACHE": job["folder"]}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        return {"error": f"exit code {result.returncode}: {' '.join(result.stderr.strip().splitlines()[-1:])}"}
    return json.loads(lines[-1])


def measure(kind: str, num_rows: int, num_rounds: int) -> dict[str, Any]:
    """The record of one kind of rows: median, minimum and maximum of every figure, by method."""
    turns: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    record: dict[str, Any] = {"kind": kind, "rows": num_rows, "rounds": num_rounds, "cores": os.cpu_count()}
    for _ in range(num_rounds):
        for method, taken in turns.items():
            with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as folder:
                figures = in_new_process({"method": method, "kind": kind, "rows": num_rows, "folder": folder})
            if "error" in figures:
                return {**record, "error": f"{method}: {figures['error']}"}
            taken.append(figures)
    if len({figures["tokens"] for taken in turns.values() for figures in taken}) > 1:
        return {**record, "error": "tokens differ"}
    for method, taken in turns.items():
        record[method] = {}
        for name in ("data_s", "data_cpu_s", "ready_s", "peak_mib"):
            values = [figures[name] for figures in taken]
            record[method][name] = statistics.median(values)
            record[method] |= {f"{name}_min": min(values), f"{name}_max": max(values)}
    return record


def text(record: dict[str, Any]) -> str:
    """The record as rows of a table."""
    title = f"| {record['kind']}, {record['rows']:,} rows |"
    if "error" in record:
        return f"{title} {record['error']} | | | | | |"
    lines = []
    for method in METHODS:
        figures, base = record[method], record["TRL"]
        cells = [
            f"{figures[name]:.1f} ({figures[f'{name}_min']:.1f} to {figures[f'{name}_max']:.1f})"
            for name in ("ready_s", "data_s", "data_cpu_s")
        ]
        ratio = f"{figures['ready_s'] / base['ready_s']:.2f}"
        lines.append(f"{title} {method} | {' | '.join(cells)} | {ratio} | {figures['peak_mib']:.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="NAME")
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each method")
    parser.add_argument("--out", help="append one JSON line per kind of rows to this file")
    parser.add_argument("--quick", action="store_true", help="500 rows, one round")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.turn is not None:
        print(json.dumps(turn(options.turn)))
        return
    facts = machine_facts()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    print(
        "\n| rows | method | s until ready | s of data | CPU s of data | x | peak MiB |\n|---|---|---|---|---|---|---|"
    )
    num_rows, num_rounds = (500, 1) if options.quick else (options.rows, options.rounds)
    for kind in options.kinds:
        record = measure(kind, num_rows, num_rounds)
        print(text(record), flush=True)
        append_lines(options.out, [{**facts, **record}])


if __name__ == "__main__":
    main()
