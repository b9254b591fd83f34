"""`fastdpo generate`: makes preference pairs from a model's own responses, labelled by a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdpo.cli.options.early import check_data, check_model, check_output
from fastdpo.cli.options.parser import RaisingParser
from fastdpo.cli.options.rounds import add_engine_options, add_judge_options
from fastdpo.cli.options.values import json_object
from fastdpo.cli.records import write_records
from fastdpo.locks import locked

WAYS = ("best_worst", "best_random", "all", "ranking")


def main(argv: list[str]) -> None:
    """Generates, judges, pairs and writes.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    options = _parser().parse_args(argv)
    check_output("output", options.output, options.prompts)
    check_data("prompts", options.prompts)
    check_model("model", options.model)
    from fastdpo.rounds.generate import Pairing, Sampling

    sampling = Sampling(
        options.num,
        options.max_new_tokens,
        options.temperature,
        options.batch_size,
        options.seed,
        options.chat_template_kwargs,
    )
    pairing = Pairing(options.pairs, options.margin, options.balance_lengths)
    sampling.check()
    pairing.check()
    output = Path(options.output)
    if options.max_prompts is not None and options.max_prompts < 1:
        raise ValueError(f"max_prompts must be at least 1, got {options.max_prompts}")
    loader = _loader(options)
    loader.check(options.model)
    with locked(output, "output", is_file=True):
        _generate(options, loader, sampling, pairing, output)


def _generate(options: Any, loader: Any, sampling: Any, pairing: Any, output: Path) -> None:
    from fastdpo.cli.console import make_console
    from fastdpo.cli.progress import progress_bar
    from fastdpo.data.sources.loading import load_preference_dataset
    from fastdpo.rounds.generate import (
        check_prompts,
        generate_scored,
        make_rows,
        read_prompts,
        source_of,
        summary_of,
    )

    console = make_console()
    prompts = read_prompts(load_preference_dataset(options.prompts, options.dataset_split))[: options.max_prompts]
    check_prompts(loader.tokenizer(options.model), prompts)
    writer, tokenizer, judge = loader.sampler(options.model)
    samples = output.with_name(f"{output.name}.samples.jsonl")
    engine = loader.engine_of(options.model)
    key = {"model": options.model, "judge": options.judge, "judge_model": options.judge_model, "engine": engine}
    with progress_bar(console, "generating", len(prompts)) as progress:
        scored = generate_scored(writer, tokenizer, prompts, judge, sampling, samples, key=key, progress=progress)
    source = source_of(options.model, options.judge, options.judge_model, sampling, engine)
    rows, counted = make_rows(scored, pairing, source, options.seed)
    made = summary_of(scored, rows, counted)
    if not rows:
        raise ValueError(
            f"prompts must give at least one pair, got {counted.num_ties} ties, {counted.num_duplicates} duplicates and"
            f" {counted.num_unscored} responses without a score{_verdicts(made)}; try a higher temperature or num, or"
            " another judge"
        )
    write_records(output, rows)
    console.print(_table(made, pairing.way))
    console.print(f"wrote {output}; all responses with their scores are in {samples}", soft_wrap=True, markup=False)


def _parser() -> RaisingParser:
    parser = RaisingParser(
        prog="fastdpo generate", description="Makes preference pairs from a model's responses, labelled by a judge."
    )
    add = parser.add_argument
    add("--model", required=True, help="Model that answers: a folder (also of an adapter) or a name on the Hub.")
    add("--prompts", required=True, help="File, folder or dataset with a column prompt, or with rows for training.")
    add(
        "--judge",
        required=True,
        help="length, shortest, regex:PATTERN, logp, implicit:MODEL[,REFERENCE], classifier:MODEL,"
        " http://URL of an OpenAI-compatible endpoint, or module:function.",
    )
    add_judge_options(parser)
    add("--output", "-o", required=True, metavar="FILE", help="JSON Lines file for the preference rows.")
    add("--num", "-n", type=int, default=4, help="Responses for each prompt. Default: 4.")
    add("--pairs", choices=WAYS, default="best_worst", help="Pairs to keep, or whole rankings. Default: best_worst.")
    add("--margin", type=float, default=0.0, help="Least difference of two scores. Default: any except 0.")
    add(
        "--balance_lengths",
        "--balance-lengths",
        action="store_true",
        help="Drop pairs until the longer response is chosen in half of them.",
    )
    add("--max_prompts", "--max-prompts", type=int, help="Number of prompts to use, from the first. Default: all.")
    add("--max_new_tokens", "--max-new-tokens", type=int, default=512, help="Maximum response tokens. Default: 512.")
    add("--temperature", type=float, default=1.0, help="Sampling temperature, > 0. Default: 1.")
    add("--batch_size", "--batch-size", type=int, default=32, help="Sequences generated at a time. Default: 32.")
    add("--seed", type=int, default=0, help="Seed of sampling. Default: 0.")
    add("--dataset_split", "--dataset-split", default="train", help="Split of a named dataset. Default: train.")
    add("--chat_template", "--chat-template", help="Chat template: a file or Jinja text. Default: the tokenizer's.")
    add(
        "--chat_template_kwargs",
        "--chat-template-kwargs",
        type=json_object,
        help='Variables for it, as JSON: {"enable_thinking": false}.',
    )
    add_engine_options(parser)
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="Dtype of the weights. Default: float32; in vLLM the checkpoint's.",
    )
    add("--use_cpu", "--use-cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    add("--trust_remote_code", "--trust-remote-code", action="store_true", help="Run code from the Hub.")
    return parser


def _loader(options: Any) -> Any:
    from fastdpo.rounds.loading import Loader
    from fastdpo.training import DPOConfig

    args = DPOConfig(
        "not_used",
        max_length=None,
        model_init_kwargs=None if options.dtype is None else {"dtype": options.dtype},
        chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
        trust_remote_code=options.trust_remote_code,
        use_cpu=options.use_cpu,
    )
    return Loader(
        options.judge,
        args,
        judge_model=options.judge_model,
        judge_timeout=options.judge_timeout,
        engine=options.engine,
        vllm_args=options.vllm_args,
    )


def _verdicts(made: Any) -> str:
    """Why an endpoint's comparisons may be ties."""
    if made.agreement is None:
        return ""
    return f" (its verdicts in both orders agree in {made.agreement:.0%}, and {made.num_unread:,} could not be read)"


def _table(made: Any, way: str) -> Any:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    counted = made.counted
    table.add_row("rows", f"{made.num_rows:,} from {made.num_prompts:,} prompts ({way})")
    table.add_row("responses", f"{counted.num_responses:,}")
    table.add_row("duplicates", f"{counted.num_duplicates / max(counted.num_responses, 1):.1%} of the responses")
    if made.num_cut:
        share = made.num_cut / max(counted.num_responses, 1)
        table.add_row(
            "cut off", f"{share:.1%} of the responses, at --max_new_tokens: trained on, they end in mid-sentence"
        )
    if counted.num_unscored:
        table.add_row("without score", f"{counted.num_unscored:,}")
    table.add_row("ties", f"{counted.num_ties:,} pairs; {counted.num_prompts_without_pair:,} prompts gave none")
    if counted.num_balanced_away:
        table.add_row("balanced away", f"{counted.num_balanced_away:,} pairs")
    if counted.lengths:
        share, (low, high) = counted.longer_chosen
        table.add_row("longer chosen", f"{share:.1%} of pairs (95%: {low:.1%} to {high:.1%})")
    table.add_row("length and score", f"correlation {made.correlation:+.2f}")
    if made.agreement is not None:
        table.add_row("both orders", f"{made.agreement:.1%} of verdicts agree; {made.num_unread:,} could not be read")
    return table
