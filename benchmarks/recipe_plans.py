"""What `fastdpo plan` says of the settings in recipes/sizes: the table of its page.

    python benchmarks/recipe_plans.py                         # prints the line of each file
    python benchmarks/recipe_plans.py --write                 # and writes results/recipe_plans.jsonl and the table
    python benchmarks/recipe_plans.py --write hh_0.5b_24gb    # of one file
    python benchmarks/recipe_plans.py --docs                  # the table from the results as they are

Models are built from their shapes, without weights, and of the plan only the line with a file's own settings is
computed. Nothing has been measured on a GPU. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict

import yaml
from scaling_model import MODELS as LLAMAS
from shared import pages
from transformers import Qwen2Config, Qwen3Config

from fastdpo.cli.plan_names import GB
from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.records import Record, read
from fastdpo.training.memory.card.estimates import pair_tokens
from fastdpo.training.memory.card.plans import Estimates
from fastdpo.training.memory.card.settings import Settings
from fastdpo.training.memory.cluster.hardware import make_cluster
from fastdpo.training.memory.cluster.layouts import layouts_for
from fastdpo.training.memory.cluster.plans import MethodModel, plan_layout

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
LAYOUT = "FSDP2"  # of several GPUs


def gpus_of(name: str) -> tuple[int, int]:
    """Number of GPUs, and the memory of each in bytes, from the end of a file's name: 8x80gb."""
    found = re.search(r"_(?:(\d+)x)?(\d+)gb$", name)
    assert found is not None
    return int(found[1] or 1), int(int(found[2]) * GB)


def command_of(name: str) -> str:
    """The options of `fastdpo plan` whose output has the line."""
    given, (gpus, memory) = yaml.safe_load(FILES[name].read_text()), gpus_of(name)
    options = f"--gpu_memory {memory / GB:g}GB --max_length {given['max_length']}"
    options += f" --gpus {gpus}" if gpus > 1 else ""
    return options + (f" --lora_r {given['lora_r']}" if given.get("use_peft") else "")


def settings_of(name: str) -> Settings:
    """The line of the plan that has a file's own settings."""
    given = yaml.safe_load(FILES[name].read_text())
    optim = given.get("optim", "adamw_torch_fused")
    return Settings(
        "qlora" if given.get("load_in_4bit") else "full",
        given.get("gradient_checkpointing", True),  # on by default on a GPU
        given.get("reference", "adapter" if given.get("use_peft") else "frozen"),
        OPTIMIZERS.get(optim, optim),
        weight_rounding=given.get("weight_rounding", "nearest"),
    )


def record_of(name: str) -> Record:
    """The longest pair and the bytes of that line; no other line is computed."""
    given, settings, (gpus, memory) = yaml.safe_load(FILES[name].read_text()), settings_of(name), gpus_of(name)
    config, least, lora_r = CONFIGS[given["model"]], pair_tokens(given["max_length"]), given.get("lora_r", 16)
    if gpus > 1:
        cluster = make_cluster(gpus, 1, memory, "h100", "nvlink,ib400")
        model = MethodModel(config, settings.method, settings.checkpointing, lora_r)
        (layout,) = (layout for layout in layouts_for(cluster, model.sizes) if layout.name == LAYOUT)
        shared = plan_layout(model, layout, cluster, settings.reference, least, num_pairs=64)
        tokens, sizes = shared.tokens, {part: int(size) for part, size in shared.memory.parts().items()}
    else:
        (plan,) = Estimates(config, lora_r, [settings]).plans(memory, least)
        tokens, sizes = plan.tokens, plan.estimate.parts()
    found = {"longest_pair_tokens": tokens, "bytes": {**sizes, "total": sum(sizes.values())}}
    return {"workload": name, "plan": command_of(name), "settings": asdict(settings), **found}


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
