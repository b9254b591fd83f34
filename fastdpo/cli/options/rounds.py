"""Options that `generate`, `iterate` and `sweep` share: of the judge, and of the engine that samples responses."""

from __future__ import annotations

import argparse

from fastdpo.cli.options.values import json_object


def add_judge_options(parser: argparse.ArgumentParser) -> None:
    """Adds what an endpoint needs besides its URL, which is the judge's name."""
    parser.add_argument("--judge_model", "--judge-model", help="Name of the endpoint's model.")
    parser.add_argument(
        "--judge_timeout",
        "--judge-timeout",
        type=float,
        default=60.0,
        help="Seconds that the endpoint has for an answer. Default: 60.",
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=("auto", "transformers", "vllm"),
        default="auto",
        help="What samples the responses. Default: vLLM if it is installed and there is a GPU, else transformers.",
    )
    parser.add_argument(
        "--vllm_args",
        "--vllm-args",
        type=json_object,
        help='Arguments of vllm.LLM, as JSON: {"tensor_parallel_size": 2}.',
    )
