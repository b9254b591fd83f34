"""The `fastdpo` command: finds the subcommand, and reports a user's mistake in one line with exit code 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib import import_module

import fastdpo
from fastdpo.data.visible import visible

# name -> (module with main(argv), description)
COMMANDS = {
    "train": ("fastdpo.cli.train", "train a model on preference pairs (DPO and related losses)"),
    "sft": ("fastdpo.cli.sft", "fine-tune a model before DPO, on completions or on the chosen responses of pairs"),
    "precompute": ("fastdpo.cli.precompute", "compute reference log-probs ahead of time, for `fastdpo train` to use"),
    "data": ("fastdpo.cli.data", "inspect preference data, clean it, or convert it to explicit conversational pairs"),
    "score": ("fastdpo.cli.score", "score responses with a DPO model's implicit reward; RewardBench"),
    "rank": ("fastdpo.cli.rank", "rank models on preference pairs, or from a file of comparisons, with intervals"),
    "generate": ("fastdpo.cli.generate", "make preference pairs from a model's own responses, labelled by a judge"),
    "iterate": ("fastdpo.cli.iterate", "online DPO: rounds of generate, label, train"),
    "sweep": ("fastdpo.cli.sweep", "train over a grid of settings; one tokenization, one reference cache"),
    "compare": ("fastdpo.cli.compare", "show several runs beside each other: metrics, settings, curves, samples"),
    "report": ("fastdpo.cli.report", "write the HTML report of a run again"),
    "merge": ("fastdpo.cli.merge", "merge an adapter into its base model, and check the result"),
    "chat": ("fastdpo.cli.chat", "talk to a model, or compare two and keep the pairs"),
    "plan": ("fastdpo.cli.plan", "show which settings fit a GPU's memory, and the longest pair that fits"),
    "migrate": ("fastdpo.cli.migrate", "convert a recipe of TRL, Axolotl, LLaMA-Factory or others to a fastdpo config"),
    "debug-batch": (
        "fastdpo.cli.debug_batch",
        "replay the batch of a loss that was not finite: where it went wrong, and its text",
    ),
    "env": ("fastdpo.cli.env", "print what a bug report needs: versions, machine, kernels, attention, self-check"),
    "verify": ("fastdpo.cli.verify", "check the head op's kernels on this machine: numbers, determinism, memory"),
    "bench": ("fastdpo.cli.bench", "measure time and memory of the head and of whole steps on this machine"),
    "demo": (
        "fastdpo.cli.demo",
        "run a small version of the paper's controlled-sentiment experiment, with an HTML report",
    ),
}

HELP = """usage: fastdpo <command> [options]

commands:
{commands}

common options of `fastdpo train` (for all options: fastdpo train --help):
  what      --model PATH_OR_NAME  --dataset FILE_OR_NAME  --output_dir DIR  --config run.yaml
  data      --eval_dataset  --eval_fraction  --max_length  --max_prompt_length  --truncation_mode  --on_bad_row
  DPO       --beta  --loss_type  --label_smoothing  --reference  --ref_model
  steps     --learning_rate  --num_train_epochs  --max_steps  --per_device_train_batch_size
            --gradient_accumulation_steps  --warmup_steps  --lr_scheduler_type
  memory    --use_peft  --lora_r  --load_in_4bit  --gradient_checkpointing  --bf16  --packing  --optim
  logging   --report_to  --logging_steps  --eval_strategy  --eval_steps  --run_name
  saving    --save_strategy  --save_steps  --resume_from_checkpoint  --overwrite_output_dir

  GPUs      --num_processes  --accelerate_config

fastdpo --version prints the version. Write options with hyphens or underscores. Options of TRL's scripts and of the
alignment-handbook also work (--model_name_or_path, --dataset_name, ...).
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code (0, or 1 from `verify`), or 2 for an error that the user can fix."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(HELP.format(commands="\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())))
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"fastdpo {fastdpo.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        nearest = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        print(f"error: command must be one of {', '.join(COMMANDS)}, got {argv[0]!r}{hint}", file=sys.stderr)
        return 2
    # transformers imports bitsandbytes if it is installed, which then logs its missing CPU kernels
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    command: Callable[[list[str]], int | None] = import_module(COMMANDS[argv[0]][0]).main
    try:
        return command(argv[1:]) or 0
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        print("error:", visible(str(error), keeps="\n"), file=sys.stderr)  # it may quote a row
        return 2
    except RuntimeError as error:
        if "requires" not in str(error) or "to be installed" not in str(error):  # a logger that is not there
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
