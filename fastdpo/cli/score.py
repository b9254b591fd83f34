"""`fastdpo score`: the implicit reward of every response of a dataset, and how often it agrees with the preferences.

In: a model, optionally a reference, and data in any form that `fastdpo train` reads. Out: a JSON line for each row, a
table, and with --html a page. Log-probs are stored in the cache of references, so that a stopped run can continue.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdpo.cli.options.early import check_data, check_model, check_output
from fastdpo.cli.options.parser import RaisingParser
from fastdpo.cli.records import write_records

BENCHMARKS = ("rewardbench", "rewardbench2")


def main(argv: list[str]) -> None:
    """Scores, writes and prints.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    options = _parser().parse_args(argv)
    _check(options)
    from fastdpo.cli.console import make_console
    from fastdpo.data.sources.loading import load_preference_dataset
    from fastdpo.rewards.best_of import best_row, in_given_order
    from fastdpo.rewards.implicit import default_reference
    from fastdpo.rewards.rewardbench import benchmark_rows, benchmark_scores
    from fastdpo.rewards.scores import score, summarize, summarize_per_token
    from fastdpo.training import DPOConfig

    console = make_console()
    data: Any = load_preference_dataset(options.data, options.dataset_split, options.dataset_config)
    examples = list(data) if options.benchmark else []
    if options.benchmark:
        data = benchmark_rows(options.benchmark, examples)
    unscored = None if options.benchmark or options.columns else in_given_order(data)
    data = data if unscored is None else unscored
    args = DPOConfig(
        "not_used",
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        columns=options.columns,
        dataset_format=options.dataset_format,
        chat_template=options.chat_template,
        trust_remote_code=options.trust_remote_code,
        ref_cache_dir=options.ref_cache_dir,
        bf16=options.bf16,
        use_cpu=options.use_cpu,
        model_init_kwargs=None if options.dtype is None else {"dtype": options.dtype},
    )
    reference = options.reference or default_reference(options.model)
    found = score(options.model, reference, data, args, beta=options.beta)
    credits = _credits(options, reference, found, args) if options.per_token else None
    texts = _texts(data, args, found.rows)
    records = [{**texts.get(row.row, {}), **asdict(row)} for row in found.rows]
    if unscored is not None:
        records = [{**record, "preferences": [], "margins": []} for record in records]
    for record, of_row in zip(records, credits or (), strict=False):
        record["credits"] = [list(zip(one.tokens, one.values, strict=True)) for one in of_row]
    if options.output is not None:
        write_records(options.output, records)
    if options.best is not None:
        write_records(options.best, [best_row(row, **texts[row.row]) for row in found.rows if row.row in texts])
    summaries = [summarize(found.rows), summarize_per_token(found.rows)] if unscored is None else []
    subsets = benchmark_scores(options.benchmark, examples, found.rows) if options.benchmark else []
    if options.html is not None:
        _page(Path(options.html), options, found, credits, summaries)
    if options.json:
        about = [{**asdict(line), "accuracy": line.accuracy, "interval": line.interval} for line in summaries]
        print(json.dumps({"summaries": about, "subsets": [asdict(line) for line in subsets]}, indent=1))
        return
    console.print(_table(summaries, found, reference))
    console.print(_best_of(found.rows))
    if subsets:
        console.print(_subset_table(options.benchmark, subsets))
    for path in filter(None, (options.output, options.best, options.html)):
        console.print(f"wrote {path}", soft_wrap=True, markup=False)


def _parser() -> RaisingParser:
    parser = RaisingParser(
        prog="fastdpo score", description="Scores every response with a DPO model's implicit reward."
    )
    add = parser.add_argument
    add("--model", required=True, help="Model to score with: a folder (also of an adapter) or a name on the Hub.")
    add("--reference", help="Reference of its training. Default: for an adapter its base model, otherwise none.")
    add("--data", required=True, help="Preference data as for `fastdpo train`, or prompts with a list `responses`.")
    add("--output", "-o", metavar="FILE", help="Write a JSON line for each row.")
    add("--best", metavar="FILE", help="Write each prompt with its best response (best of n), for `fastdpo sft`.")
    add("--beta", type=float, default=0.1, help="Beta of the training. Default: 0.1.")
    add("--per_token", "--per-token", action="store_true", help="Also compute each token's share of the reward.")
    add("--html", metavar="PAGE", help="Write a page. With --per_token, it colours the text.")
    add("--examples", type=int, default=20, help="Rows on the page. Default: 20.")
    add("--benchmark", choices=BENCHMARKS, help="Read the data as this benchmark's file, and score its subsets.")
    add("--json", action="store_true", help="Print the summary as JSON.")
    add("--max_length", "--max-length", type=int, help="Tokens kept of prompt and response. Default: all.")
    add("--max_prompt_length", "--max-prompt-length", type=int, help="Tokens kept of the prompt. Default: all.")
    add("--dataset_split", "--dataset-split", default="train", help="Split of a named dataset. Default: train.")
    add("--dataset_config", "--dataset-config", help="Configuration (subset) of a named dataset.")
    add("--dataset_format", "--dataset-format", default="auto", help="Form of the rows. Default: by their columns.")
    add("--columns", help="The dataset's own column names, such as prompt=question,chosen=good.")
    add("--chat_template", "--chat-template", help="Chat template: a file or Jinja text. Default: the tokenizer's.")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="Dtype of the weights. Default: float32.")
    add("--bf16", action="store_true", default=None, help="bf16 autocast. Default: on if the GPU supports it.")
    add("--use_cpu", "--use-cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    add("--ref_cache_dir", "--ref-cache-dir", help="Folder of cached log-probs. Default: as for `fastdpo train`.")
    add("--trust_remote_code", "--trust-remote-code", action="store_true", help="Run code from the Hub.")
    return parser


def _check(options: Any) -> None:
    if not options.beta > 0:
        raise ValueError(f"beta must be > 0, got {options.beta}")
    if options.examples < 1:
        raise ValueError(f"examples must be at least 1, got {options.examples}")
    if options.benchmark and options.columns:
        raise ValueError(
            f"columns must not be given with --benchmark, got {options.columns!r}: the columns of {options.benchmark}"
            " are known"
        )
    check_data("data", options.data)
    check_model("model", options.model)
    check_model("reference", options.reference)
    for name in ("output", "best", "html"):
        check_output(name, getattr(options, name), options.data)


def _texts(data: Any, args: Any, rows: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """Prompt and responses by number of the row, in the order in which they are scored; rows of token ids have none."""
    from fastdpo.inspection.source import TOKENIZED, Source

    sizes = {row.row: len(row.rewards) for row in rows}
    return {
        read.number: {"prompt": read.row.prompt, "responses": list(read.row.responses)}
        for read in Source(data, args.tokenization_settings()).rows()
        if read.row is not None and read.form != TOKENIZED and len(read.row.responses) == sizes.get(read.number)
    }


def _best_of(rows: Sequence[Any]) -> str:
    sizes = sorted({len(row.rewards) for row in rows})
    mean = sum(sum(row.rewards) / len(row.rewards) for row in rows) / len(rows)
    best = sum(row.rewards[row.best] for row in rows) / len(rows)
    number = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return f"best of {number} responses: mean reward {best:.4f}, of all responses {mean:.4f}"


def _credits(options: Any, reference: str | None, found: Any, args: Any) -> list[Any]:
    """The credits of all rows if they are written to a file, otherwise only of the rows on the page."""
    from fastdpo.rewards.credits import token_credits
    from fastdpo.training.setup.models import resolve_tokenizer

    dataset = found.dataset
    if options.output is None:
        dataset = dataset.select(range(min(options.examples, len(dataset))))
    tokenizer = resolve_tokenizer(options.model, None, args)
    return list(token_credits(options.model, reference, dataset, tokenizer, args, beta=options.beta))


def _table(summaries: Sequence[Any], found: Any, reference: str | None) -> Any:
    from rich import box
    from rich.table import Table

    title = f"{len(found.rows)} rows; reference: {reference or 'none, rewards are beta * log-prob'}"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for column in ("reward", "pairs", "accuracy", "95% interval", "ties", "mean margin (nats)"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for line in summaries:
        low, high = line.interval
        table.add_row(
            line.name,
            f"{line.num_pairs:,}",
            f"{line.accuracy:.4f}",
            f"{low:.3f} to {high:.3f}",
            f"{line.num_ties:,}",
            f"{line.mean_margin:.4f}",
        )
    if not summaries:
        table.title = f"{title}; no preferences, so no accuracy"
    table.caption = "\n".join(found.report.remarks())
    table.caption_justify = "left"
    return table


def _subset_table(benchmark: str, subsets: Sequence[Any]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=benchmark, box=box.SIMPLE, title_justify="left")
    for column in ("subset", "rows", "score", "95% interval"):
        table.add_column(column, justify="left" if column == "subset" else "right")
    for line in subsets:
        interval = "" if line.interval is None else f"{line.interval[0]:.3f} to {line.interval[1]:.3f}"
        table.add_row(line.name, f"{line.num_rows:,}", f"{line.score:.4f}", interval)
    return table


def _page(path: Path, options: Any, found: Any, credits: Sequence[Any] | None, summaries: Sequence[Any]) -> None:
    from fastdpo.references.rows import read_groups
    from fastdpo.report import Table, write_report
    from fastdpo.rewards.page import ColouredRow, ColouredText
    from fastdpo.training import DPOConfig
    from fastdpo.training.setup.models import resolve_tokenizer

    lines = [
        [s.name, f"{s.num_pairs:,}", f"{s.accuracy:.4f}", f"{s.interval[0]:.3f} to {s.interval[1]:.3f}"]
        for s in summaries
    ]
    sections: list[Any] = [Table("Agreement with the preferences", ("reward", "pairs", "accuracy", "95%"), lines)]
    if credits is not None:
        tokenizer = resolve_tokenizer(options.model, None, DPOConfig("not_used"))
        numbers = range(min(options.examples, len(found.rows)))
        rows = []
        for row, group, of_row in zip(found.rows, read_groups(found.dataset, numbers), credits, strict=False):
            better = {best for best, _ in row.preferences}
            names = ["chosen" if k in better else "rejected" for k in range(len(of_row))]
            if not summaries:  # no preferences
                names = ["best" if k == row.best else f"response {k + 1}" for k in range(len(of_row))]
            prompt = tokenizer.decode(group.prompt_ids, skip_special_tokens=True).strip()
            rows.append(ColouredRow(prompt, list(zip(names, of_row, strict=True))))
        note = "Green tokens raise the reward, red tokens lower it. The credits of a response sum to its reward."
        sections.append(ColouredText("Reward by token", rows, note))
    write_report(path, "Implicit rewards", sections, subtitle=f"{options.model} on {options.data}")
