"""How far the estimate of memory is off, on the CPU: the table of docs/memory.md, and the cost of LoRA on the LM head.

    python benchmarks/bench_memory.py            # prints a line per kind of training, and one per way to run the head
    python benchmarks/bench_memory.py --write    # and writes results/memory.jsonl and the two pages
    python benchmarks/bench_memory.py --docs     # the pages from the results as they are

A trainer on a small Llama takes one step, which gives the optimizer its state; then a whole step is measured, on rows
of one length, so that the batch is the largest one that the estimate expects. Both figures are bytes beyond weights,
reference and optimizer state, which the estimate has exactly: gradients, activations and the head. "4 bits" needs
bitsandbytes. The head op runs alone, forward and backward, on random hidden states.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from shared import pages
from shared.special_tokens import make_tokenizer

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.evidence.bench.measure import append_lines, machine_facts, peak_mib
from fastdpo.evidence.bench.records import Record, read
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.ops.sequence_loss import sequence_loss
from fastdpo.training.memory.estimate import MIB, estimate_peak_memory

RESULTS = pages.RESULTS / "memory.jsonl"
PAGE, ADAPTERS = pages.DOCS / "memory.md", pages.DOCS / "adapters.md"
ROWS = ((8, 60, 40), (2, 500, 250))  # pairs of a step; tokens of prompt and of each response
CHECKPOINTING = {"gradient_checkpointing": True}
IN_BACKWARD = {"optimizer_in_backward": True, "optim": "adamw_torch_fused", "weight_rounding": "stochastic"}
IN_BACKWARD |= {"max_grad_norm": 0.0, **CHECKPOINTING}
KINDS: dict[str, dict[str, Any]] = {  # settings; "lora", "bits" and "dtype" say what the model is
    "all weights, fp32": {},
    "all weights, fp32, checkpointing": CHECKPOINTING,
    "all weights, bf16 autocast": {"bf16": True},
    "all weights, bf16, updates in backward": {"dtype": torch.bfloat16, "bf16": True, **IN_BACKWARD},
    "LoRA, fp32": {"lora": True},
    "LoRA on a bf16 base, bf16 autocast, checkpointing": {
        "lora": True,
        "dtype": torch.bfloat16,
        "bf16": True,
        **CHECKPOINTING,
    },
    "LoRA on 4 bits, the rest in fp32, bf16 autocast": {"lora": True, "bits": 4, "bf16": True},
    "LoRA on 4 bits, the rest in bf16, bf16 autocast": {
        "lora": True,
        "bits": 4,
        "bf16": True,
        "model_init_kwargs": {"dtype": "bfloat16"},
    },
    "all weights, fp32, padded": {"packing": "padded"},
}
HEAD = {"tokens": 1024, "hidden": 512, "vocab": 32000, "r": 16}
ALONE, COLUMNS, COPY = "no adapter", "LoRA", "W + sBA"


def make_trainer(folder: str, kind: str, rows: tuple[int, int, int]) -> DPOTrainer:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    settings = dict(KINDS[kind])
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=8000))
    model = model.to(settings.pop("dtype", torch.float32))
    more: dict[str, Any] = {}
    if settings.pop("lora", False):
        more["peft_config"] = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    if settings.pop("bits", None):
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model.save_pretrained(f"{folder}/base")
        model = f"{folder}/base"
    settings = {"bf16": False, "packing": "packed", **settings, "use_cpu": True, "disable_tqdm": True}
    settings |= {"report_to": "none", "save_strategy": "no", "max_length": None, "max_steps": 1}
    args = DPOConfig(f"{folder}/out", per_device_train_batch_size=rows[0], **settings)
    data = [make_row(rows[1], rows[2], index) for index in range(rows[0])]
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=make_tokenizer(), **more)


def make_row(prompt: int, response: int, seed: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = {"prompt_ids": prompt, "chosen_ids": response, "rejected_ids": response}
    return {name: torch.randint(3, 8000, (length,), generator=generator).tolist() for name, length in lengths.items()}


def workload_of(rows: tuple[int, int, int]) -> str:
    return "{} pairs, {} + 2 x {} tokens".format(*rows)


def error_of_estimate(kind: str, rows: tuple[int, int, int]) -> Record:
    """Bytes of a step beyond weights, reference and optimizer state, as estimated and as measured."""
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as folder:
        trainer = make_trainer(folder, kind, rows)
        estimate = estimate_peak_memory(trainer)
        trainer.train()
        inputs = next(iter(trainer.get_train_dataloader()))

        def step() -> Any:
            trainer.model.zero_grad()
            trainer.training_step(trainer.model, inputs, rows[0])
            gradients = [p.grad for p in trainer.model.parameters()]
            trainer.model.zero_grad()
            return gradients

        measured = peak_live_bytes(step)
    estimated = estimate.total - estimate.weights - estimate.reference - estimate.optimizer
    found = {"measured_bytes": measured, "estimated_bytes": estimated}
    return {"workload": workload_of(rows), "method": kind, "steps": 1, **found}


def cost_of_adapter(way: str) -> Record:
    """MiB that the head op adds, forward and backward, with a frozen weight W and an adapter B A of rank r."""
    tokens, hidden_size, vocab_size, r = HEAD.values()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 0.02) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    weight, hidden = normal(vocab_size, hidden_size), normal(tokens, hidden_size, scale=1.0).requires_grad_()
    down, up = normal(r, hidden_size).requires_grad_(), normal(vocab_size, r).requires_grad_()
    labels = torch.randint(vocab_size, (tokens,), generator=generator)
    ends = torch.arange(0, tokens + 1, tokens // 8)
    groups = [(int(end), int(end), number) for number, end in enumerate(ends[1:], 1)]

    def step() -> Any:
        operands: dict[str, Any] = {"hidden_states": hidden, "lm_head_weight": weight}
        if way == COLUMNS:
            operands = {"hidden_states": torch.cat([hidden, hidden @ down.T], 1), "lm_head_weight": weight}
            operands["adapter_weight"] = up
        elif way == COPY:
            operands["lm_head_weight"] = weight + up @ down
        loss, _ = sequence_loss(
            **operands, labels=labels, cu_seqlens=ends, group_ends=groups, loss_of=lambda sums, *_: sums.sum()
        )
        return torch.autograd.grad(loss, [hidden] if way == ALONE else [hidden, down, up])

    return {"workload": "head", "method": way, **HEAD, "peak_mib": peak_mib(step)}


def table(records: Sequence[Record]) -> str:
    """Markdown: a line per kind of training, with both figures and their ratio for each of ROWS."""
    steps = [record for record in records if "measured_bytes" in record]
    workloads = list(dict.fromkeys(record["workload"] for record in steps))
    lines = [f"| training | {' | '.join(f'{name}: MiB measured / estimated' for name in workloads)} |"]
    lines.append("|---" * (1 + len(workloads)) + "|")
    for kind in KINDS:
        cells = []
        for workload in workloads:
            own = [record for record in steps if (record["method"], record["workload"]) == (kind, workload)]
            cells.append(cell(own[-1]) if own else "not measured")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(record: Record) -> str:
    measured, estimated = record["measured_bytes"], record["estimated_bytes"]
    return f"{measured / MIB:.1f} / {estimated / MIB:.1f} ({estimated / measured - 1:+.1%})"


def words_of_adapter(records: Sequence[Record]) -> str:
    """What docs/adapters.md says of LoRA on the head."""
    peaks = {record["method"]: f"{record['peak_mib']:.0f}" for record in records if record["workload"] == "head"}
    return f"the op adds {peaks[COLUMNS]} MiB instead of {peaks[ALONE]}; computing W + sBA would add {peaks[COPY]}"


def write_docs() -> None:
    PAGE.write_text(pages.filled(PAGE.read_text(), {RESULTS.name: table(read(RESULTS))}))
    if words_of_adapter(read(RESULTS)) not in ADAPTERS.read_text():
        print(f"{ADAPTERS} must say: {words_of_adapter(read(RESULTS))}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(map(repr, KINDS))}; default: all")
    parser.add_argument("--write", action="store_true", help="into the project's results and docs/memory.md")
    parser.add_argument("--docs", action="store_true", help="docs/memory.md from the results as they are")
    options = parser.parse_args(argv)
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"KIND must be among {', '.join(map(repr, KINDS))}, got {unknown[0]!r}")
    if not options.docs:
        facts, out = machine_facts(), str(RESULTS) if options.write else None
        measurements: list[Callable[[], Record]] = []
        for kind in options.kinds or KINDS:
            measurements += [lambda kind=kind, rows=rows: error_of_estimate(kind, rows) for rows in ROWS]
        if not options.kinds:
            measurements += [lambda way=way: cost_of_adapter(way) for way in (ALONE, COLUMNS, COPY)]
        for measure in measurements:
            record = measure()
            shown = cell(record) if "measured_bytes" in record else f"{record['peak_mib']:.1f} MiB"
            print(f"{record['workload']}; {record['method']}: {shown}", flush=True)
            append_lines(out, [{**facts, **record}])
    if options.write or options.docs:
        write_docs()
    return 0


if __name__ == "__main__":
    sys.exit(main())
