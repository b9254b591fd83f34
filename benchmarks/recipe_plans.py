"""What `fastdpo plan` says of the settings in recipes/sizes: the table of its page.

    python benchmarks/recipe_plans.py                         # prints the line of each file
    python benchmarks/recipe_plans.py --write                 # and writes results/recipe_plans.jsonl and the table
    python benchmarks/recipe_plans.py --write hh_0.5b_24gb    # of one file
    python benchmarks/recipe_plans.py --docs                  # the table from the results as they are

The command runs as a user would run it, on configs with the models' shapes, and the line with a file's own settings is
kept. Nothing has been measured on a GPU. Minutes for all files, most of them for the models of 8B.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from scaling_model import MODELS as LLAMAS
from shared import pages
from transformers import Qwen2Config, Qwen3Config

from fastdpo.cli.main import main as fastdpo
from fastdpo.cli.plan_names import GB
from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.records import Record, read
from fastdpo.training.memory.plan import pair_tokens

RESULTS = pages.RESULTS / "recipe_plans.jsonl"
FOLDER = pages.DOCS.parent / "recipes" / "sizes"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
CONFIGS = {
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LLAMAS["8B"],
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": LLAMAS["8B"],
}  # fmt: skip
OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit"}  # transformers' other names


def options_of(name: str) -> list[str]:
    """The options of `fastdpo plan` for a file: the GPUs of its name, and its lengths and adapter."""
    settings = yaml.safe_load(FILES[name].read_text())
    gpus, memory = re.fullmatch(r".*?_(?:(\d+)x)?(\d+)gb", name).groups()
    words = ["--gpu_memory", f"{memory}GB", "--max_length", str(settings["max_length"])]
    words += ["--gpus", gpus] if gpus else []
    return words + (["--lora_r", str(settings["lora_r"])] if settings.get("use_peft") else [])


def line_of(name: str) -> dict[str, Any]:
    """Values of the plan's line that has the settings of a file, by their keys in `fastdpo plan --json`."""
    settings = yaml.safe_load(FILES[name].read_text())
    found = {
        "method": "qlora" if settings.get("load_in_4bit") else "full",
        "gradient_checkpointing": settings.get("gradient_checkpointing", True),  # on by default on a GPU
    }
    if "--gpus" in options_of(name):
        return {**found, "layout": "FSDP2"}
    optim = settings.get("optim", "adamw_torch_fused")
    return {
        **found,
        "reference": settings.get("reference", "adapter" if settings.get("use_peft") else "frozen"),
        "optim": OPTIMIZERS.get(optim, optim),
        "weight_rounding": settings.get("weight_rounding", "nearest"),
        "tile_rows": None,
        "activation_offloading": False,
        "optimizer_in_backward": False,
    }


def record_of(name: str) -> Record:
    """The line, with what it is asked for.

    Raises:
        ValueError: the plan has no line with the settings of the file, or several.
    """
    model, options, wanted = yaml.safe_load(FILES[name].read_text())["model"], options_of(name), line_of(name)
    lines = [line for line in plan(model, *options) if wanted.items() <= line.items()]
    if len(lines) != 1:
        raise ValueError(f"the plan must have one line with {wanted} for {name}, got {len(lines)}")
    kept = {key: lines[0][key] for key in ("longest_pair_tokens", "bytes")}
    return {"workload": name, "plan": " ".join(options), **wanted, **kept}


@cache
def plan(model: str, *options: str) -> list[dict[str, Any]]:
    """What `fastdpo plan --json` prints for the shape of a model."""
    with tempfile.TemporaryDirectory() as folder:
        CONFIGS[model].save_pretrained(folder)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = fastdpo(["plan", "--model", str(Path(folder, "config.json")), "--json", *options])
    if code != 0:
        raise ValueError(f"fastdpo plan must succeed for {model}, got exit code {code}")
    return json.loads(printed.getvalue())


def table(records: Sequence[Record]) -> str:
    """Markdown: a line per file, in GB."""
    lines = [
        "| settings | `fastdpo plan --model MODEL` | pair at `max_length` | longest pair | weights, gradients, state |"
        " activations, rest | total |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda record: record["workload"]):
        sizes = record["bytes"]
        kept = sum(sizes.get(part, 0) for part in ("weights", "gradients", "optimizer", "reference"))
        least = pair_tokens(yaml.safe_load(FILES[record["workload"]].read_text())["max_length"])
        cells = [f"{least:,}", f"{record['longest_pair_tokens']:,}"]
        cells += [f"{size / GB:.1f}" for size in (kept, sizes["total"] - kept, sizes["total"])]
        lines.append(f"| {record['workload']} | `{record['plan']}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_docs() -> None:
    page = FOLDER / "README.md"
    page.write_text(pages.filled(page.read_text(), {RESULTS.name: table(read(RESULTS))}))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(FILES)}; default: all")
    parser.add_argument("--write", action="store_true", help="into the project's results and the page")
    parser.add_argument("--docs", action="store_true", help="the page from the results as they are")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.files if name not in FILES]:
        parser.error(f"FILE must be among {', '.join(FILES)}, got {unknown[0]}")
    if not options.docs:
        facts = machine_facts()
        for name in options.files or FILES:
            record = record_of(name)
            print(json.dumps(record), flush=True)
            append_lines(str(RESULTS) if options.write else None, [{**facts, **record}])
    if options.write or options.docs:
        write_docs()
    return 0


if __name__ == "__main__":
    sys.exit(main())
