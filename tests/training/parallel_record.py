"""What works on several processes: the tests record their outcomes, and docs/scaling.md shows the record as a table.

In a test, around the comparison with one process, or after the message of a refusal is checked:

    with works("FSDP2", "LoRA, micro-batches", processes=2, steps=1):
        assert_like_one(...)
    refuses("FSDP2", "micro-batches by free memory", "max_tokens_per_microbatch must be a number with FSDP")

KINDS are the columns of the table and FEATURES its rows. What works is named by features, or by modes of MODES, which
stand for several. The record is parallel_record.jsonl, one line for each cell, count of processes and count of steps. A
test whose outcome is not in the record fails. To renew the record, run the tests with FASTDPO_PARALLEL_RECORD=1, then
this file as a script: it sorts the record and writes the table into the page. Delete the record first to drop what no
test shows any more.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from shared.pages import filled

RECORD = Path(__file__).with_name("parallel_record.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
RENEWS = "FASTDPO_PARALLEL_RECORD"

KINDS = ("DDP", "FSDP2", "HSDP", "ZeRO 1", "ZeRO 2", "ZeRO 3", "TP", "FSDP2 x TP", "SP", "FSDP2 x SP")
FEATURES = (
    "full weights",
    "tied embeddings",
    "LoRA",
    "LoRA on the head",
    "cached reference",
    "frozen reference",
    "adapter reference",
    "no reference",
    "shared prompts",
    "padded rows",
    "accumulation",
    "gradient checkpointing",
    "uneven pairs",
    "uneven micro-batches",
    "micro-batches by free memory",
    "fewer rows than processes",
    "sft",
    "listwise loss",
    "evaluation",
    "balance_ranks",
    "num_eval_samples",
    "sync_ref_model",
    "resuming",
    "resuming on another number of processes",
    "TRL's trainer (`accelerate`)",
)
_FULL = ("full weights", "shared prompts", "frozen reference")
_LORA = ("LoRA", "shared prompts", "adapter reference")
MODES = {  # those of sharded_runs.py
    "cached reference": ("full weights", "shared prompts", "cached reference"),
    "frozen reference": _FULL,
    "reference of another class": _FULL,
    "LoRA": _LORA,
    "LoRA on the head": (*_LORA, "LoRA on the head"),
    "LoRA, cached reference": ("LoRA", "shared prompts", "cached reference"),
    "LoRA, checkpointing": (*_LORA, "gradient checkpointing"),
    "LoRA, micro-batches": (*_LORA, "uneven micro-batches"),
    "micro-batches": (*_FULL, "uneven micro-batches"),
    "accumulation": (*_FULL, "accumulation"),
    "checkpointing": (*_FULL, "gradient checkpointing"),
    "tiles, checkpointing": (*_FULL, "gradient checkpointing"),
    "tied embeddings": (*_FULL, "tied embeddings"),
    "no reference, sft": ("full weights", "shared prompts", "no reference", "sft"),
    "padded": ("full weights", "frozen reference", "padded rows"),
    "listwise": (*_FULL, "listwise loss"),
}


@contextmanager
def works(kind, *modes_or_features, processes, steps=1):
    """Records, if nothing is raised inside, that losses and gradients are those of one process."""
    yield
    for feature in _features(modes_or_features):
        _keep({"kind": _known(kind, KINDS), "feature": feature, "processes": processes, "steps": steps})


def refuses(kind, feature, words):
    """Records that this is refused with an error that begins with these words."""
    _keep({"kind": _known(kind, KINDS), "feature": _known(feature, FEATURES), "refused": words})


def _features(modes_or_features):
    found = (MODES[name] if name in MODES else (_known(name, FEATURES),) for name in modes_or_features)
    return sorted({feature for features in found for feature in features})


def _known(name, names):
    assert name in names, f"{name!r} is none of {names}; add it there if the table needs it"
    return name


def _keep(entry):
    line = json.dumps(entry)
    if os.environ.get(RENEWS):
        with RECORD.open("a") as file:
            file.write(line + "\n")
    else:
        assert line in RECORD.read_text().splitlines(), f"{line} is not in {RECORD.name}: renew it as its module says"


def entries():
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    found = {line: json.loads(line) for line in lines}.values()
    return sorted(found, key=lambda e: (KINDS.index(e["kind"]), FEATURES.index(e["feature"]), json.dumps(e)))


def table():
    """The record as Markdown, with the words of refusals below."""
    cells, notes = {}, []
    for entry in entries():
        if "refused" in entry:
            if entry["refused"] not in notes:
                notes.append(entry["refused"])
            shown = f"refused ({notes.index(entry['refused']) + 1})"
        else:
            shown = f"{entry['processes']} x {entry['steps']}"
        cells.setdefault((entry["feature"], entry["kind"]), []).append(shown)
    kinds = [kind for kind in KINDS if any(k == kind for _, k in cells)]
    lines = [f"| | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for feature in FEATURES:
        if any(f == feature for f, _ in cells):
            lines.append(f"| {feature} | {' | '.join(', '.join(cells.get((feature, k), [])) for k in kinds)} |")
    said = [f"{number}. `{words}`" for number, words in enumerate(notes, 1)]
    return "\n".join([*lines, *(["", "Refused with:", "", *said] if said else [])]) + "\n"


if __name__ == "__main__":
    RECORD.write_text("".join(json.dumps(entry) + "\n" for entry in entries()))
    PAGE.write_text(filled(PAGE.read_text(), {RECORD.name: table()}))
