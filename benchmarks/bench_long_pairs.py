"""What tiles, checkpoints on the host and updates in backward save on a long pair, and what they cost.

    python benchmarks/bench_long_pairs.py [--quick] [--tokens N ...] [--kinds full lora] [--tile_rows N]
                                          [--out FILE.jsonl]

A Llama of 31 million weights runs forward and backward over one pair: with checkpointing alone, and with everything on.
Times are CPU seconds of a step; peaks are bytes of live tensors beyond weights and gradients from before. Host buffers
come from NumPy and are not counted, as on a GPU. A record also holds the peak that the dry run estimates, and the
largest difference of the gradients from those with checkpointing alone. Weights are fp32, so that this is rounding
only. With all weights trained, everything includes steps in backward; the update is a stand-in that needs one temporary
tensor of the weight's size.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo import TokenizedPair, pack_pairs
from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling import packed_loss, prepare_model
from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.offload import DryCopies, PlainCopies, offload_checkpoints
from fastdpo.modeling.tiles import use_tiles
from fastdpo.training.memory.dry_run import RowShape, dry_step, fake_mode, shape_only

MOST_ERROR = 1e-5  # of losses and gradients, relative
BETA = 0.1


def make_model(kind: str, quick: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64 if quick else 512, "intermediate_size": 192 if quick else 1376}
    shape = {"num_hidden_layers": 3 if quick else 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    more: dict[str, Any] = {"max_position_embeddings": 65536, "tie_word_embeddings": True}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **shape, **more, vocab_size=1000 if quick else 16000))
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # of zeros, A has no gradient
                nn.init.normal_(parameter, std=0.02)
        model.enable_input_require_grads()
    bare_model(model).gradient_checkpointing_enable()
    return prepare_model(model).train()


def make_batch(tokens: int, vocab_size: int) -> Any:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    return pack_pairs([TokenizedPair(ids(tokens // 2), ids(tokens // 4), ids(tokens // 4))])


class Step:
    """Forward and backward of the batch, whose gradients end with it, or one by one in backward."""

    def __init__(self, model: Any, batch: Any, in_backward: bool) -> None:
        self.model, self.batch, self.in_backward = model, batch, in_backward
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.loss, self.error, self.cpu_seconds = 0.0, 0.0, 0.0
        self.known: dict[int, Tensor] = {}  # gradients to compare with, by place
        self.kept: dict[int, Tensor] | None = None  # where they are kept, if so
        if in_backward:
            for place, parameter in enumerate(self.trained):
                parameter.register_post_accumulate_grad_hook(lambda p, place=place: self._end(place, p))

    def _end(self, place: int, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self.kept is not None:
            self.kept[place] = gradient
        elif place in self.known:
            known = self.known[place]
            self.error = max(self.error, float((gradient - known).norm() / known.norm()))
        parameter.grad = None

    def __call__(self) -> None:
        started = time.process_time()
        loss, _ = packed_loss(
            self.model, self.batch, lambda sums, *_: -torch.nn.functional.logsigmoid(BETA * (sums[0] - sums[1]))
        )
        loss.backward()
        self.cpu_seconds, self.loss = time.process_time() - started, float(loss.detach())
        if not self.in_backward:
            for place, parameter in enumerate(self.trained):
                self._end(place, parameter)

    def gradients(self) -> dict[int, Tensor]:
        self.kept = found = {}
        self()
        self.kept = None
        return found


def measure(kind: str, tokens: int, tile_rows: int, quick: bool) -> list[dict[str, Any]]:
    """Records of both ways; the first one is checkpointing alone."""
    known: dict[int, Tensor] = {}
    first: dict[str, Any] = {}
    records = []
    for everything in (False, True):
        model = make_model(kind, quick)
        batch = make_batch(tokens, model.config.vocab_size)
        if everything:
            use_tiles(model, tile_rows)
        mode = fake_mode()
        dry: Any = shape_only(model, mode)
        if everything:
            offload_checkpoints(bare_model(dry), DryCopies())
            offload_checkpoints(bare_model(model), PlainCopies())
        in_backward = everything and kind == "full"
        row = RowShape(batch.segments, len(batch.labels))
        of_update = (lambda p: p.numel() * p.element_size()) if in_backward else None
        estimate = dry_step(dry, row, mode, impl="tiled", varlen=False, update_bytes=of_update)
        step = Step(model, batch, in_backward)
        if everything:
            step.known = known
        else:
            known = step.gradients()
        peak = peak_live_bytes(step)
        record = {
            "kind": kind,
            "tokens": tokens,
            "everything": everything,
            "tile_rows": tile_rows if everything else None,
            "weights": sum(p.numel() for p in model.parameters()),
            "loss": step.loss,
            "peak_bytes": peak,
            "estimated_bytes": estimate.total,
            "estimated_parts": vars(estimate),
            "cpu_seconds": step.cpu_seconds,
        }
        if everything:
            record["gradient_error"] = step.error
            record["peak_ratio"] = peak / first["peak_bytes"]
            record["time_ratio"] = step.cpu_seconds / first["cpu_seconds"]
            loss_error = abs(step.loss - first["loss"]) / abs(first["loss"])
            if max(step.error, loss_error) > MOST_ERROR:
                raise AssertionError(f"gradients differ by {step.error:.1e}, losses by {loss_error:.1e}")
        else:
            first = record
        records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a short pair")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--kinds", nargs="+", choices=("full", "lora"), default=["lora", "full"])
    parser.add_argument("--tile_rows", type=int, default=256)
    parser.add_argument("--out")
    options = parser.parse_args()
    facts = machine_facts()
    for tokens in [256] if options.quick else options.tokens:
        for kind in options.kinds:
            records = measure(kind, tokens, 32 if options.quick else options.tile_rows, options.quick)
            for record in records:
                print(json.dumps(record), flush=True)
            append_lines(options.out, [{"benchmark": "long_pairs", **facts, **record} for record in records])


if __name__ == "__main__":
    main()
