"""`fastdpo rank`: ranks models on preference pairs by the responses that they prefer, or from a file of comparisons.

In: with --models, models or the folder of a run, and preference data; without, comparisons in Arena's columns
(model_a, model_b, winner). Out: tables; with -o JSON Lines; with --html a page. Log-probs are cached, so a stopped run
continues where it stopped. Options that apply only to the other use are refused.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastdpo.cli.options.early import check_output
from fastdpo.cli.options.parser import RaisingParser, ShowsDefaults
from fastdpo.cli.options.table import add_options
from fastdpo.ranking.ratings import MEASURE_NAMES, counted

if TYPE_CHECKING:
    from fastdpo.ranking.bradley_terry import Strengths
    from fastdpo.ranking.comparisons import Comparisons
    from fastdpo.ranking.models import RankedModels

DATA = ["dataset_split", "dataset_config"]
OPTIONS = (  # the options of `fastdpo train` that log-probs depend on
    "tokenizer chat_template chat_template_kwargs pad_token max_length max_prompt_length truncation_mode on_long_row"
    " on_bad_row on_lost_content dataset_format dataset_num_proc dtype trust_remote_code bf16 fp16 ref_cache_dir"
    " ref_max_memory ref_tokens_per_batch packing prefix_sharing attention_backend impl workspace_bytes use_cpu"
    " disable_tqdm"
)
ENGINE = OPTIONS.split()
_OF_MODELS = ("reference", "by", "wins", *ENGINE)
WINS = {
    "right": "it prefers the chosen response and the other one does not",
    "margin": "its margin is larger than that of the other one",
}
_OF_COMPARISONS = ("cluster", "length", "exclude")


def main(argv: list[str]) -> None:
    """Ranks, prints and writes.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    options = _parser().parse_args(argv)
    given = vars(options)
    has_models = options.models is not None
    misplaced = next((name for name in (_OF_COMPARISONS if has_models else _OF_MODELS) if name in given), None)
    if misplaced is not None:
        rule = "must not be given with --models" if has_models else "must not be given without --models"
        why = "applies only to a file of comparisons" if has_models else "applies only to models on preference pairs"
        raise ValueError(f"{misplaced} {rule}, got {given[misplaced]!r}: it {why}")
    if not 0 < options.confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {options.confidence}")
    for name in ("output", "html"):
        check_output(name, given[name], options.data)
    if options.html is not None:
        from fastdpo.report.plots import require_matplotlib

        require_matplotlib()
    if has_models:
        _rank_models(options, given)
    else:
        _rank_comparisons(options, given)


def _parser() -> RaisingParser:
    parser = RaisingParser(
        prog="fastdpo rank",
        usage="fastdpo rank --models A B ... --data PAIRS [options]\n       fastdpo rank --data COMPARISONS [options]",
        description="Ranks models by Bradley-Terry strengths: on preference pairs, by which responses each model"
        " prefers; or from a file of comparisons with the columns model_a, model_b and winner.",
        formatter_class=ShowsDefaults,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data",
        required=True,
        help="Preference pairs in any form that `fastdpo train` reads, or comparisons (JSON, JSON Lines, CSV, Parquet)."
        " A file, a directory, or a name. Required.",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="Write one JSON object per model: model, rating, ...")
    parser.add_argument("--html", metavar="PAGE", help="Write a page with plots.")
    parser.add_argument("--confidence", type=float, default=0.95, help="Of all intervals.")
    parser.add_argument("--anchor", metavar="MODEL", help="Model with 1000 points. Default: the mean of all models.")
    add_options(parser, DATA)
    parser.add_argument(
        "--columns",
        default=argparse.SUPPRESS,
        help="Your names of columns: prompt=instruction,rejected=worst, or model_a=generator_1,winner=preference.",
    )
    models = parser.add_argument_group("models on preference pairs")
    models.add_argument(
        "--models", nargs="+", metavar="MODEL", help="Names or folders, also of adapters; or one run with checkpoints."
    )
    late: dict[str, Any] = {"default": argparse.SUPPRESS}  # so that only given options are set
    models.add_argument("--reference", metavar="MODEL", help="Also compare log-probs relative to this model.", **late)
    models.add_argument(
        "--by",
        choices=("sum", "mean", "reference"),
        help="Score of a response: its summed log-prob, per token, or relative to the reference. Default: reference if"
        " there is one, else sum.",
        **late,
    )
    models.add_argument(
        "--wins",
        choices=("right", "margin"),
        help="right: a model wins if it is right about a pair and the other is not. margin: the larger margin wins."
        " Default: right.",
        **late,
    )
    add_options(models, ENGINE)
    compared = parser.add_argument_group("a file of comparisons")
    compared.add_argument(
        "--cluster",
        metavar="COLUMN",
        help="Column that identifies the prompt; none: all rows are independent. Default: the first existing column of"
        " prompt_id, question_id, prompt, question and instruction.",
        **late,
    )
    compared.add_argument(
        "--length",
        action="store_true",
        help="Fit the effect of length and rank at equal length. Reads length_a and length_b, Arena's conv_metadata, or"
        " the characters of response_a and response_b.",
        **late,
    )
    compared.add_argument("--exclude", nargs="+", metavar="MODEL", help="Models to leave out.", **late)
    return parser


def _rank_comparisons(options: argparse.Namespace, given: Mapping[str, Any]) -> None:
    from fastdpo.cli.options.early import check_data
    from fastdpo.data.forms.mapping import as_columns
    from fastdpo.ranking.bradley_terry import fit_bradley_terry
    from fastdpo.ranking.comparisons import MODELS, WINNER, read_comparisons

    check_data("data", options.data)
    comparisons = read_comparisons(
        options.data,
        split=given.get("dataset_split", "train"),
        config_name=given.get("dataset_config"),
        cluster=given.get("cluster"),
        columns=as_columns(given.get("columns"), (*MODELS, WINNER)),
    )
    if "exclude" in given:
        comparisons = comparisons.without(given["exclude"])
    _check_anchor(options.anchor, comparisons.models)
    strengths = fit_bradley_terry(comparisons, length="length" in given)
    clusters = (
        "comparisons are independent" if comparisons.clusters is None else counted(strengths.num_clusters, "prompt")
    )
    facts = [("data", options.data), ("comparisons", f"{len(comparisons.outcomes):,}"), ("clusters", clusters)]
    facts += [("left out", f"{reason}: {count:,}") for reason, count in comparisons.left_out.items()]
    _finish(options, comparisons, strengths, facts)


def _rank_models(options: argparse.Namespace, given: Mapping[str, Any]) -> None:
    from fastdpo.cli.options.early import check_data, check_folder, check_model

    check_data("data", options.data)
    models = _models(options.models)
    for model in models:
        check_model("models", model)
    check_model("reference", given.get("reference"))
    check_folder("tokenizer", given.get("tokenizer"))
    _check_anchor(options.anchor, models)

    from fastdpo.cli.console import make_console
    from fastdpo.data.sources.loading import load_preference_dataset
    from fastdpo.ranking.models import rank_models
    from fastdpo.training import DPOConfig
    from fastdpo.training.setup.models import load_tokenizer

    console, reference = make_console(), given.get("reference")
    settings = {name: given[name] for name in (*ENGINE, "columns") if name in given}
    dtype, tokenizer = settings.pop("dtype", None), settings.pop("tokenizer", None)
    if dtype is not None:
        settings["model_init_kwargs"] = {"dtype": dtype.removeprefix("torch.")}
    args = DPOConfig("not_used", **settings)
    data = load_preference_dataset(options.data, given.get("dataset_split", "train"), given.get("dataset_config"))
    done: list[str] = []

    def on_model(name: str) -> None:
        done.append(name)
        number = len([other for other in done if other != "reference"])
        which = "reference" if name == "reference" else f"model {number} of {len(models)}: {name}"
        console.print(which, style="dim", markup=False, highlight=False, soft_wrap=True)

    ranked = rank_models(
        models,
        args,
        data,
        reference=reference,
        processing_class=None if tokenizer is None else load_tokenizer(tokenizer, args.init_kwargs()),
        by=given.get("by", "sum" if reference is None else "reference"),
        wins=given.get("wins", "right"),
        confidence=options.confidence,
        on_model=on_model,
    )
    _finish(options, ranked.comparisons, ranked.strengths, _facts(options, given, ranked), ranked)


def _facts(options: argparse.Namespace, given: Mapping[str, Any], ranked: RankedModels) -> list[tuple[str, str]]:
    """Facts about the comparison, and reports on the rows, per model if they differ."""
    facts = [("data", options.data), ("pairs", f"{ranked.num_pairs:,}, of {counted(ranked.num_prompts, 'prompt')}")]
    if ranked.num_not_shared:
        facts.append(("pairs left out", f"{ranked.num_not_shared:,}, because not every model can read them"))
    told: dict[str, list[str]] = {}
    for model, scored in ranked.reports.items():
        for line in scored.report.remarks():
            told.setdefault(line, []).append(model)
    for line, models in told.items():
        facts.append(("rows" if len(models) == len(ranked.models) else f"rows, {', '.join(models)}", line))
    if "reference" in given:
        facts.append(("reference", given["reference"]))
    facts.append(("compared by", MEASURE_NAMES[ranked.by]))
    facts.append(("a model wins if", WINS[ranked.wins]))
    return facts


def _models(given: Sequence[str]) -> list[str]:
    """The given models, or the checkpoints of the given run."""
    if len(given) > 1:
        twice = next((model for model in given if given.count(model) > 1), None)
        if twice is not None:
            raise ValueError(f"models must be different, got {twice!r} twice")
        return list(given)
    from fastdpo.ranking.runs import run_checkpoints

    found = run_checkpoints(given[0])
    if len(found) < 2:
        what = f"a run with {len(found)} checkpoint" if found else "one model"
        raise ValueError(
            f"models must be two or more, or the folder of a run with several checkpoints, got {what}: {given[0]}"
        )
    return found


def _check_anchor(anchor: str | None, models: Sequence[str]) -> None:
    if anchor is not None and anchor not in models:
        raise ValueError(f"anchor must be one of {list(models)}, got {anchor!r}")


def _finish(
    options: argparse.Namespace,
    comparisons: Comparisons,
    strengths: Strengths | None,
    facts: list[tuple[str, str]],
    ranked: RankedModels | None = None,
) -> None:
    """Prints the ranking, and writes the requested files."""
    from fastdpo.cli.console import make_console
    from fastdpo.cli.rank_tables import print_ranking
    from fastdpo.cli.records import write_records
    from fastdpo.ranking.ratings import rating_records

    records = rating_records(comparisons, strengths, confidence=options.confidence, anchor=options.anchor)
    if ranked is not None:
        from fastdpo.ranking.models import accuracy_record

        records = [record | accuracy_record(ranked, record["model"]) for record in records]
    is_clustered = comparisons.clusters is not None
    facts.append(("intervals", f"{options.confidence:.0%}" + (", clustered by prompt" if is_clustered else "")))
    if strengths is not None and strengths.length_slope is not None:
        twice = 1 / (1 + math.exp(-strengths.length_slope / 3))
        facts.append(
            (
                "effect of length",
                f"{strengths.length_slope:+.2f} nats (standard error {strengths.length_stderr:.2f}): of two equal"
                f" models, the one whose response is twice as long wins {twice:.0%}",
            )
        )
    if (comparisons.outcomes == 0.5).all():  # their sandwich intervals have no width
        facts.append(("ties only", "no comparison tells the models apart, and neither do ratings and intervals"))
    console = make_console()
    print_ranking(console, comparisons, strengths, records, facts, options.confidence, ranked)
    if options.output is not None:
        console.print(f"ratings: {write_records(options.output, records)}", markup=False, soft_wrap=True)
    if options.html is not None:
        from fastdpo.ranking.page import ranking_sections
        from fastdpo.report import write_report

        why = "" if ranked is None else ranked.no_strengths
        sections = ranking_sections(comparisons, strengths, records, facts, ranked=ranked, no_strengths=why)
        subtitle = f"{len(comparisons.models)} models, {counted(len(comparisons.outcomes), 'comparison')}"
        page = write_report(options.html, "Ranking of models", sections, subtitle=subtitle)
        console.print(f"page: {page}", markup=False, soft_wrap=True)
