"""Training all weights in bf16 against fp32 weights: losses of the demo's model over 200 steps, and a plot of them.

    python benchmarks/bench_full_weights.py [--quick] [--steps N] [--seeds N] [--noise-seeds N] [--shares ...]
                                            [--task FOLDER] [--plot FILE.png] [--out FILE.jsonl]

Every way trains on the same pairs in the same order, with bf16 autocast, at the demo's learning rate and at a twentieth
of it, where rounding to the nearest bf16 number loses most updates. A record holds the loss on held-out pairs at the
end and its difference from that of fp32 weights with the same seed. Noise is what the order of the rows makes of it:
the standard deviation between seeds of the runs with fp32 weights, of which there may be more. A way is the same as
fp32 weights if the mean difference is within two standard errors of noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastdpo.alignment.task import SIZES, Task, cached_task
from fastdpo.evidence.bench.measure import append_lines, machine_facts

FP32 = "fp32 weights"
_8BIT = {"optim": "adamw_bnb_8bit"}
_BACKWARD = {"optimizer_in_backward": True}
WAYS: dict[str, dict[str, Any]] = {
    FP32: {},
    "nearest": {"weight_rounding": "nearest"},
    "stochastic": {"weight_rounding": "stochastic"},
    "kahan": {"weight_rounding": "kahan"},
    "stochastic, 8-bit moments": {"weight_rounding": "stochastic", **_8BIT},
    "stochastic, 8-bit moments, in backward": {"weight_rounding": "stochastic", **_8BIT, **_BACKWARD},
    "kahan, in backward, two passes": {
        "weight_rounding": "kahan",
        **_BACKWARD,
        "clipping_in_backward": "two_passes",
    },
}
SHARES = (1.0, 1 / 20)  # of the demo's learning rate
PAIRS, HELDOUT = 8, 256  # pairs of a step, and of the evaluation at the end


def run(task: Task, way: str, rate: float, seed: int, steps: int, folder: str) -> dict[str, Any]:
    """Losses of every step, and the loss on held-out pairs at the end. `folder` keeps the reference's log-probs."""
    from fastdpo import DPOConfig, DPOTrainer

    model = copy.deepcopy(task.reference).to(torch.float32 if way == FP32 else torch.bfloat16)
    settings = {**task.dpo_settings(), "learning_rate": rate, "seed": seed, "max_steps": steps, "bf16": True}
    settings |= {"logging_steps": 1, "optim": "adamw_torch", "max_grad_norm": 1.0, **WAYS[way]}
    settings["use_cpu"] = not torch.cuda.is_available()
    settings |= {"per_device_train_batch_size": PAIRS, "reference": "cached", "ref_cache_dir": folder}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(folder, **settings, training_warnings=False),
        train_dataset=task.train_rows,
        eval_dataset=task.heldout_rows[:HELDOUT],
        processing_class=task.tokenizer,
    )
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    heldout = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"way": way, "rate": rate, "seed": seed, "losses": losses, "heldout": heldout, "cpu_seconds": seconds}


def compared(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per learning rate and way: means over seeds, the difference from fp32 weights, and the noise of the latter."""
    lines = []
    for rate in sorted({record["rate"] for record in records}, reverse=True):
        own = [record for record in records if record["rate"] == rate]
        exact = {record["seed"]: record["heldout"] for record in own if record["way"] == FP32}
        noise = statistics.stdev(exact.values()) if len(exact) > 1 else 0.0
        for way in WAYS:
            runs = [record for record in own if record["way"] == way]
            if not runs:
                continue
            differences = [record["heldout"] - exact[record["seed"]] for record in runs]
            mean, error = statistics.mean(differences), noise * (2 / len(runs)) ** 0.5
            lines.append(
                {
                    "rate": rate,
                    "way": way,
                    "heldout": statistics.mean(record["heldout"] for record in runs),
                    "difference": mean,
                    "standard_error": error,
                    "is_same": abs(mean) <= 2 * error,
                    "cpu_seconds": statistics.median(record["cpu_seconds"] for record in runs),
                }
            )
    return lines


def plot(records: list[dict[str, Any]], path: Path, width: int = 10) -> None:
    """Losses of each way, means over the seeds that all ways have and over `width` steps; the band is the range of all
    fp32 runs, of which there may be more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({record["rate"] for record in records}, reverse=True)
    figure, axes = pyplot.subplots(1, len(rates), figsize=(6 * len(rates), 4.5), squeeze=False)
    for axis, rate in zip(axes[0], rates, strict=True):
        own = [record for record in records if record["rate"] == rate]
        shared = {r["seed"] for r in own if r["way"] != FP32}
        for way in WAYS:
            runs = [r["losses"] for r in own if r["way"] == way]
            if not runs:
                continue
            smooth = torch.tensor(runs).unfold(1, width, 1).mean(2)
            steps = torch.arange(smooth.shape[1]) + width
            if way == FP32:
                axis.fill_between(steps, smooth.amin(0), smooth.amax(0), color="0.85", label="fp32, range over seeds")
                runs = [r["losses"] for r in own if r["way"] == way and r["seed"] in shared] or runs
                smooth = torch.tensor(runs).unfold(1, width, 1).mean(2)
            axis.plot(steps, smooth.mean(0), label=way, color="black" if way == FP32 else None, linewidth=1.2)
        axis.set(title=f"learning rate {rate:.0e}", xlabel="step", ylabel=f"loss, mean of {width} steps")
    axes[0][0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of two seeds")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way")
    parser.add_argument("--noise-seeds", type=int, default=0, help="runs of fp32 weights, where they are to be more")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the demo's learning rate")
    parser.add_argument("--task", type=Path, help="folder where the demo's reference and pairs are kept")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out")
    options = parser.parse_args()
    steps, seeds, noise_seeds = options.steps, options.seeds, options.noise_seeds
    if options.quick:
        steps, seeds, noise_seeds = 6, 2, 0
    size = SIZES["small"]
    with tempfile.TemporaryDirectory() as scratch:
        task = cached_task(size, 0, options.task or Path(scratch, "task"))
        records = []
        for seed in range(max(seeds, noise_seeds)):
            for share in options.shares:
                for way in WAYS if seed < seeds else [FP32]:
                    records.append(run(task, way, share * size.dpo_learning_rate, seed, steps, scratch))
                    told = {key: value for key, value in records[-1].items() if key != "losses"}
                    print(json.dumps(told), file=sys.stderr, flush=True)
            if options.plot is not None:
                plot(records, options.plot)
    lines = compared(records)
    for line in lines:
        print(json.dumps(line))
    append_lines(options.out, [{"benchmark": "full_weights", **machine_facts(), **line} for line in lines])


if __name__ == "__main__":
    main()
