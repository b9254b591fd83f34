"""The longest pair on GPUs of 8 to 80 GB by the estimate of `fastdpo plan`: the table of docs/memory.md.

    python benchmarks/what_fits.py            # prints a line per model, training and GPU
    python benchmarks/what_fits.py --write    # and writes results/what_fits.jsonl and the table
    python benchmarks/what_fits.py --docs     # the table from the results as they are

Models are built from their shapes, without weights. Lengths are read off lines through a few estimates; `fastdpo plan`
may find a little longer ones. Nothing has been measured on a GPU. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from scaling_model import MODELS as LLAMAS
from shared import pages
from transformers import Qwen3Config

from fastdpo.cli.plan_names import GB, kept_activations, training_name
from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.records import Record, groups, read
from fastdpo.training.memory.card.estimates import pair_tokens
from fastdpo.training.memory.card.plans import Estimates
from fastdpo.training.memory.card.settings import Settings

RESULTS, PAGE = pages.RESULTS / "what_fits.jsonl", pages.DOCS / "memory.md"
LORA_R = 16
CARDS = (8, 16, 24, 48, 80)  # GB
MODELS = {
    "Llama-3.1-8B": LLAMAS["8B"],
    "Llama-3.2-1B": LLAMAS["1B"],
    "Qwen3-0.6B": Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    ),
}  # fmt: skip
LIMITS = {"Llama-3.1-8B": 131072, "Llama-3.2-1B": 131072, "Qwen3-0.6B": 40960}  # tokens of prompt and response
WAYS: dict[str, Callable[[Settings], bool]] = {
    "all weights, fp32": lambda settings: settings.method == "full" and settings.weight_rounding == "nearest",
    "all weights, bf16": lambda settings: settings.method == "full" and settings.weight_rounding != "nearest",
    f"LoRA, r = {LORA_R}": lambda settings: settings.method == "lora",
    f"QLoRA, r = {LORA_R}": lambda settings: settings.method == "qlora",
}


def is_plain(settings: Settings) -> bool:
    """Whether it is AdamW with checkpointing, and nothing that costs more time or changes the optimizer."""
    is_usual = settings.optim == "adamw_torch_fused" or settings.weight_rounding != "nearest"
    return is_usual and settings.checkpointing and not (settings.tiles or settings.offload or settings.in_backward)


def records_of(name: str, config: Any, cards: Sequence[int] = CARDS) -> list[Record]:
    """A record per way to train and GPU: tokens of the longest pair with the plain settings, and with any, 0 if none
    fits."""
    plans = Estimates(config, LORA_R).longest([int(card * GB) for card in cards])
    found = []
    for way, belongs in WAYS.items():
        own = [(settings, tokens) for settings, tokens in plans if belongs(settings)]
        for place, card in enumerate(cards):
            plain = max(tokens[place] for settings, tokens in own if is_plain(settings))
            best, longest = max(((settings, tokens[place]) for settings, tokens in own), key=lambda pair: pair[1])
            names = f"{training_name(best)}, {kept_activations(best)}, {best.reference}, {best.optim}"
            record = {"workload": name, "method": way, "x": card, "plain": plain, "longest": longest}
            found.append({**record, "settings_of_longest": names if longest else None})
    return found


def table(records: Sequence[Record]) -> str:
    """Markdown: a line per model and training, a column per GPU."""
    cards = sorted({record["x"] for record in records})
    lines = [f"| model | training | {' | '.join(f'{card} GB' for card in cards)} |", f"|---|---|{'---|' * len(cards)}"]
    for (model, way), own in groups(records, ("workload", "method")).items():
        cells = {record["x"]: cell(record) for record in own}
        lines.append(f"| {model} | {way} | {' | '.join(cells[card] for card in cards)} |")
    return "\n".join(lines) + "\n"


def cell(record: Record) -> str:
    """Both lengths; "any" for one that the model's own limit of a sequence cannot reach."""
    limit = pair_tokens(LIMITS[record["workload"]])
    shown = [
        "no" if not tokens else "any" if tokens >= limit else f"{tokens:,}"
        for tokens in (record["plain"], record["longest"])
    ]
    return " / ".join(dict.fromkeys(shown))


def write_docs() -> None:
    PAGE.write_text(pages.filled(PAGE.read_text(), {RESULTS.name: table(read(RESULTS))}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the project's results and docs/memory.md")
    parser.add_argument("--docs", action="store_true", help="docs/memory.md from the results as they are")
    options = parser.parse_args(argv)
    if not options.docs:
        facts = machine_facts()
        for name, config in MODELS.items():
            records = [{**facts, **record} for record in records_of(name, config)]
            for record in records:
                print(json.dumps({key: value for key, value in record.items() if key not in facts}), flush=True)
            append_lines(str(RESULTS) if options.write else None, records)
    if options.write or options.docs:
        write_docs()
    return 0


if __name__ == "__main__":
    sys.exit(main())
