"""`fastdpo data inspect | clean | convert`: checks, cleans and converts preference data before training.

In: a file, folder or name of preferences in any form. Out: from `inspect` a table of verdicts (or JSON, or an HTML
page), from `clean` the rows without faults and a log of the others, from `convert` explicit conversational pairs.
`inspect` ends with exit code 1 if a check is bad; with --fail_on look, if any check is not ok. Refuses data that does
not exist or has no known form.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

from fastdpo.cli.options.early import check_data, check_folder, check_output
from fastdpo.cli.options.parser import RaisingParser, TakesCommas
from fastdpo.cli.options.values import OrNone, json_object

SUBCOMMANDS = {
    "inspect": "check the data: form, duplicates, contradictions, leaks, length bias, truncated or lost content",
    "clean": "write the rows without these faults, and a log line for each removed row",
    "convert": "write any form as explicit conversational pairs",
}
STYLES = {"ok": "green", "look": "yellow", "bad": "bold red", "skipped": "dim"}
SHOWN_ROWS = 3  # examples of each check in the table


class _Parser(TakesCommas, RaisingParser):
    """Takes lists separated by commas, and raises mistakes as ValueError."""


def main(argv: list[str]) -> int:
    """Runs a subcommand. Returns 1 if the data is worse than --fail_on allows.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, SUBCOMMANDS))
        lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in SUBCOMMANDS.items())
        print(f"usage: fastdpo data <subcommand> FILE [options]\n\nsubcommands:\n{lines}\n")
        print("fastdpo data inspect --help shows its options, and so on.")
        return 0
    if argv[0] not in SUBCOMMANDS:
        raise ValueError(f"subcommand of data must be one of {', '.join(SUBCOMMANDS)}, got {argv[0]!r}")
    options = _parser(argv[0]).parse_args([_underscored(word) for word in argv[1:]])
    check_data("data", options.data)
    check_output("html", getattr(options, "html", None), options.data)
    if getattr(options, "eval", None) is not None:
        check_data("eval", options.eval)
    if getattr(options, "model", None) is not None:
        check_folder("model", options.model)
    return {"inspect": _inspect, "clean": _clean, "convert": _convert}[argv[0]](options)


def _parser(name: str) -> argparse.ArgumentParser:
    what = SUBCOMMANDS[name]
    parser = _Parser(prog=f"fastdpo data {name}", description=what[0].upper() + what[1:] + ".", allow_abbrev=False)
    add = parser.add_argument
    add("data", metavar="FILE", help="File, folder or name of the preferences, as for fastdpo train --dataset.")
    if name != "inspect":
        add("-o", "--out", required=True, metavar="OUT", help="JSON Lines to write (.jsonl, .jsonl.gz).")
    add("--split", default="train", help="Split of a folder or a published dataset. Default: train.")
    add("--dataset_config", help="Configuration of a published dataset.")
    add("--dataset_format", default="auto", help="Form of the rows. Default: recognized by the columns.")
    add("--columns", help="The dataset's own column names: prompt=instruction,rejected=worst,ignore=notes.")
    if name == "convert":
        return parser
    add("--eval", metavar="FILE", help="Evaluation data. Its prompts should not be in the training data.")
    add("--eval_split", default="test", help="Split of a folder or a published dataset. Default: test.")
    add("--model", help="Folder or name. Only its tokenizer is loaded, for the checks of tokens.")
    add("--trust_remote_code", action="store_true", help="Run code from the Hub, as in from_pretrained.")
    add("--chat_template", help="Template of the run: a file, Jinja text, or a name. Default: the tokenizer's.")
    add("--chat_template_kwargs", type=json_object, help='Variables for it, as JSON: {"enable_thinking": false}.')
    add(
        "--max_length",
        type=OrNone(int),
        default=1024,
        help="Tokens of prompt and answer to keep, or none for all. Default: 1024.",
    )
    add("--max_prompt_length", type=OrNone(int), help="Tokens of the prompt to keep. Default: all.")
    add("--truncation_mode", default="keep_start", help="keep_start or keep_end. Default: keep_start.")
    if name == "clean":
        add("--remove", nargs="+", metavar="FAULT", help=_remove_help())
        add("--log", metavar="FILE", help="JSON Lines of removed rows. Default: OUT's name with .removed.jsonl.")
        return parser
    add("--no_near", action="store_true", help="Do not look for near duplicates, which take most of the time.")
    add(
        "--fail_on", choices=("bad", "look"), default="bad", help="Verdict from which the exit code is 1. Default: bad."
    )
    add("--json", action="store_true", help="Print one JSON object instead of tables.")
    add("--html", metavar="PAGE", help="Write a self-contained HTML page with examples of each finding.")
    add("--num_examples", type=int, default=5, help="Examples of each finding on the page. Default: 5.")
    return parser


def _remove_help() -> str:
    return (
        "Faults for which a row is removed: unusable, eval_prompts, duplicates, contradictions, cycles, equal_answers,"
        " near_duplicates; with --model also one_side_cut, ends_cut, special_tokens, lost_content. Default: unusable,"
        " duplicates, contradictions, cycles, and with --eval eval_prompts."
    )


def _inspect(options: argparse.Namespace) -> int:
    if options.num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {options.num_examples}")
    from fastdpo.inspection.inspect import inspect_data
    from fastdpo.inspection.page import write_data_page

    found = inspect_data(
        options.data,
        split=options.split,
        config_name=options.dataset_config,
        look_for_near=not options.no_near,
        progress=_bar,
        **_settings_and_more(options),
    )
    page = None if options.html is None else write_data_page(options.html, found, num_examples=options.num_examples)
    if options.json:
        print(json.dumps({**found.as_dict(), "page": None if page is None else str(page)}, indent=1))
    else:
        _print(found, page)
    failing = ("bad",) if options.fail_on == "bad" else ("bad", "look")
    return int(found.verdict in failing)


def _clean(options: argparse.Namespace) -> int:
    from rich.table import Table

    from fastdpo.cli.console import make_console
    from fastdpo.inspection.clean import FAULTS, clean_data

    done = clean_data(
        options.data,
        options.out,
        log=options.log,
        remove=options.remove,
        split=options.split,
        config_name=options.dataset_config,
        progress=_bar,
        **_settings_and_more(options),
    )
    console = make_console()
    if done.removed:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for header in ("removed", "rows", "which"):
            table.add_column(header, justify="right" if header == "rows" else "left")
        for fault, count in done.removed.items():
            table.add_row(fault, f"{count:,}", FAULTS[fault].what)
        console.print(table)
    console.print(f"kept {done.num_kept:,} of {done.num_rows:,} rows: {done.out}", soft_wrap=True, markup=False)
    console.print(f"removed rows, a line each: {done.log}", soft_wrap=True, markup=False)
    return 0


def _convert(options: argparse.Namespace) -> int:
    from fastdpo.cli.console import make_console
    from fastdpo.data.tokens.settings import TokenizationSettings
    from fastdpo.inspection.convert import convert_data

    settings = TokenizationSettings(dataset_format=options.dataset_format, columns=options.columns)
    done = convert_data(
        options.data,
        options.out,
        settings=settings,
        split=options.split,
        config_name=options.dataset_config,
        progress=_bar,
    )
    console = make_console()
    for form, count in done.forms.items():
        console.print(f"read {count:,} rows of the form {form}")
    for reason, count in done.dropped.items():
        console.print(f"left out {count:,} rows: {reason}", markup=False)
    console.print(f"wrote {done.num_pairs:,} pairs: {done.out}", soft_wrap=True, markup=False)
    return 0


def _settings_and_more(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that `inspect_data` and `clean_data` share."""
    from fastdpo.data.tokens.chat.templates import check_template_name, resolve_template
    from fastdpo.data.tokens.settings import TokenizationSettings

    settings = TokenizationSettings(
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        truncation_mode=options.truncation_mode,
        chat_template=None if options.chat_template is None else resolve_template(options.chat_template),
        chat_template_kwargs=options.chat_template_kwargs,
        dataset_format=options.dataset_format,
        columns=options.columns,
    )
    tokenizer = None
    if options.model is not None:
        from fastdpo.training.setup.models import load_tokenizer

        tokenizer = load_tokenizer(options.model, {"trust_remote_code": True} if options.trust_remote_code else None)
        if settings.chat_template is not None:
            check_template_name(settings.chat_template, tokenizer)
    more = {"eval_data": options.eval, "eval_split": options.eval_split}
    return {"settings": settings, "tokenizer": tokenizer, **more}


def _print(found: Any, page: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from fastdpo.cli.console import make_console

    console = make_console()
    table = Table(title=Text(found.name), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what was found", ratio=1)
    table.add_column("rows, such as", no_wrap=True)
    for check in found.checks:
        shown = "; ".join(", ".join(map(str, rows)) for rows in check.examples[:SHOWN_ROWS])
        verdict = Text(check.verdict, style=STYLES[check.verdict])
        table.add_row(check.name, verdict, Text(check.finding), shown if check.verdict != "ok" else "")
    console.print(table)
    if found.tokens:
        console.print(_token_table(found.tokens))
    for check in found.checks:
        if check.remedy and check.verdict in ("look", "bad"):
            console.print(Text(f"{check.name}: {check.remedy}", style=""))
    lines = Table(
        show_header=False, box=None, padding=(0, 2, 0, 0), title="first row, as it is read", title_justify="left"
    )
    for name, text in found.first_row:
        lines.add_row(name, Text(text))
    if found.first_row:
        console.print(lines)
    verdicts = [check.verdict for check in found.checks]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in STYLES if verdict in verdicts)
    console.print(Text(f"{found.verdict} ({counts})", style=STYLES[found.verdict]))
    if page is not None:
        console.print(f"page: {page}", soft_wrap=True, markup=False)


def _token_table(tokens: Any) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("tokens")
    for name in ("mean", "median", "p95", "max", "total"):
        table.add_column(name, justify="right")
    for name, stats in tokens.items():
        figures = (f"{stats.mean:,.1f}", f"{stats.median:,.1f}", f"{stats.p95:,}", f"{stats.max:,}", f"{stats.total:,}")
        table.add_row(name, *figures)
    return table


def _bar(rows: Iterable[Any], what: str) -> Iterable[Any]:
    """A progress bar on stderr, only on a terminal."""
    from tqdm import tqdm

    return tqdm(rows, desc=what, unit=" rows", mininterval=0.5, leave=False, disable=not sys.stderr.isatty())


def _underscored(word: str) -> str:
    """An option with underscores instead of hyphens. Values do not change."""
    if not word.startswith("--"):
        return word
    name, joined, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + joined + value
