"""What the cost model of docs/scaling.md says about models of 1B to 405B weights on 1 to 1,024 GPUs.

    python benchmarks/scaling_model.py [--write]

Prints a table: for every model, training method and number of GPUs, the layout with the fastest step of those that fit.
--write puts it into docs/scaling.md. Nothing is measured on a GPU. Activations of many equal layers are on the line
through those of two and of four layers. About a minute on one core.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from shared import pages
from transformers import LlamaConfig

from fastdpo.training.memory.cluster.hardware import Cluster, make_cluster
from fastdpo.training.memory.cluster.layouts import layouts_for
from fastdpo.training.memory.cluster.plans import REFERENCES, ClusterPlan, MethodModel, plan_layout
from fastdpo.training.memory.dry_run import StepPeak

PAGE = pages.DOCS / "scaling.md"
GB = 1e9
GPU_MEMORY, PAIR_TOKENS, NUM_PAIRS, LORA_R = int(80 * GB), 4096, 1024, 16
CLUSTERS = ((1, 1), (8, 1), (8, 8), (8, 128))
FEW, MORE = 2, 4  # layers of the dry runs
MODELS = {  # Llama 3.1 and 3.2
    "1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True,
    ),
    "8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    ),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    ),
    "405B": LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256,
    ),
}  # fmt: skip


class ManyLayers(MethodModel):
    """A MethodModel whose peaks are extrapolated from few layers."""

    def __init__(self, config: Any, method: str, checkpointing: bool) -> None:
        super().__init__(config, method, checkpointing, LORA_R)
        self._few = [
            MethodModel(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": count}), method, checkpointing, LORA_R)
            for count in (FEW, MORE)
        ]

    def peak(self, tokens: int) -> StepPeak:
        first, second = (model.peak(tokens) for model in self._few)
        steps = (self.sizes.num_layers - FEW) / (MORE - FEW)
        parts = {f.name: (getattr(first, f.name), getattr(second, f.name)) for f in fields(StepPeak)}
        return StepPeak(**{name: int(few + (more - few) * steps) for name, (few, more) in parts.items()})


def best(models: list[MethodModel], cluster: Cluster) -> ClusterPlan:
    """The fastest that fits; the one that holds least if none does."""
    plans = [
        plan_layout(model, layout, cluster, reference, PAIR_TOKENS, NUM_PAIRS)
        for model in models
        for reference in REFERENCES[model.method]
        for layout in layouts_for(cluster, model.sizes)
    ]
    fitting = [plan for plan in plans if plan.time is not None]
    if not fitting:
        return min(plans, key=lambda plan: plan.memory.total)
    return min(fitting, key=lambda plan: plan.time.total if plan.time else 0)


def line(name: str, num_gpus: int, plan: ClusterPlan) -> str:
    memory, time = plan.memory, plan.time
    state = (memory.weights + memory.optimizer + memory.gradients) / GB
    cells = [name, plan.method, f"{num_gpus:,}"]
    if time is None:
        needed = memory.total / GB
        return "| " + " | ".join([*cells, f"does not fit: {needed:,.0f} GB", *[""] * 6]) + " |"
    layout = plan.layout.name + (", checkpointing" if plan.checkpointing else "")
    network = time.overlapped + time.blocking
    figures = [f"{state:.1f}", f"{plan.tokens:,}", f"{time.sent / GB:.1f}", f"{time.compute:.2f}", f"{network:.2f}"]
    return "| " + " | ".join([*cells, layout, *figures, f"{time.total:.2f}"]) + " |"


def table() -> str:
    names = "model | train | GPUs | fastest that fits | state, GB | longest pair | sent, GB | compute, s | network, s"
    lines = [f"| {names} | step, s |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, config in MODELS.items():
        for method in ("full", "lora"):
            models: list[MethodModel] = [ManyLayers(config, method, checkpointing) for checkpointing in (False, True)]
            for gpus, nodes in CLUSTERS:
                cluster = make_cluster(gpus, nodes, GPU_MEMORY, "h100", "nvlink,ib400")
                lines.append(line(name, cluster.num_gpus, best(models, cluster)))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/scaling.md")
    options = parser.parse_args()
    found = table()
    print(found)
    if options.write:
        PAGE.write_text(pages.filled(PAGE.read_text(), {"scaling_model.py": found}))


if __name__ == "__main__":
    main()
