"""`fastdpo sweep`: training runs over a grid of settings, with one table at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdpo.cli.forwarded import check_forwarded, resuming
from fastdpo.cli.options.parser import RaisingParser

NOT_FORWARDED = ("--output_dir", "--output-dir")


def main(argv: list[str]) -> None:
    """Runs the unfinished runs.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    options, train_options = _parser().parse_known_args(argv)
    check_forwarded(train_options, NOT_FORWARDED, "sweep sets it for each run")
    from fastdpo.rounds.sweep import combinations_of, name_of, read_params, sweep

    params = read_params(options.param)
    given = {word.lstrip("-").partition("=")[0].replace("-", "_") for word in train_options if word.startswith("--")}
    for name in params:
        if name in given or name in ("model", "dataset"):
            raise ValueError(f"param must not name an option that is set for all runs, got {name}")
    runs = combinations_of(params, options.random, options.seed)
    output = Path(options.output_dir)
    common = ["--model", options.model, "--dataset", options.dataset, "--seed", str(options.seed), *train_options]
    if not {"reference", "precompute_ref_log_probs", "reference_free", "use_peft"} & (given | params.keys()):
        common += ["--reference", "cached"] if _all_have_a_reference(params) else []
    from fastdpo.cli.console import make_console
    from fastdpo.cli.options.early import look

    for run in runs:  # check every value before the first run
        look("train", _words(common, run, output / name_of(run)))
    console = make_console()
    if options.dry_run:
        for run in runs:
            console.print(f"fastdpo train {' '.join(_words(common, run, output / name_of(run)))}")
        return
    settings = {"model": options.model, "dataset": options.dataset, "judge": options.judge, "options": train_options}
    measure = _Measure(options, output) if options.judge else None

    def run_one(run: dict[str, str], folder: Path) -> dict[str, Any]:
        console.rule(name_of(run))
        _train(_words(common, run, folder), folder)
        return {"metrics": _metrics(folder), **({} if measure is None else measure(folder))}

    results = sweep(runs, output, run_one, settings)
    console.print(_table(results))
    wrote = [str(output / "results.jsonl")]
    if measure is not None and len(results) > 1:
        wrote.append(str(_page(output, results, measure.start())))
    console.print(f"wrote {', '.join(wrote)}; `fastdpo compare` shows runs side by side")


def _parser() -> RaisingParser:
    parser = RaisingParser(
        prog="fastdpo sweep",
        description="Trains with every combination of some settings. All runs share tokenized data and the reference's"
        " log-probs, which are cached.",
        epilog="All further options are those of `fastdpo train`, the same in all runs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--param", action="append", default=[], metavar="NAME=V1,V2", help="A setting and its values. Repeatable.")
    add("--random", type=int, metavar="N", help="Run N combinations drawn at random. Default: all.")
    add("--model", required=True, help="Model to train: a folder or a name on the Hub.")
    add("--dataset", required=True, help="Preference data, as for `fastdpo train`.")
    add("--output_dir", "--output-dir", required=True, help="Folder of the runs and of results.jsonl.")
    add("--dry_run", "--dry-run", action="store_true", help="Check all settings and print the runs.")
    add("--judge", help="Also measure reward and KL on the prompts of --eval_prompts; as for `fastdpo generate`.")
    add("--judge_model", "--judge-model", help="Name of the endpoint's model.")
    add("--eval_prompts", "--eval-prompts", metavar="FILE", help="Prompts to measure on, with --judge.")
    add("--max_new_tokens", "--max-new-tokens", type=int, default=256, help="Maximum answer tokens. Default: 256.")
    add("--seed", type=int, default=0, help="Seed of training, sampling and --random. Default: 0.")
    return parser


def _all_have_a_reference(params: dict[str, list[str]]) -> bool:
    """Whether reference log-probs can be computed once for all runs."""
    from fastdpo.losses import LOSSES

    return all(LOSSES[name].reference for name in params.get("loss_type", ()) if name in LOSSES)


def _words(common: list[str], run: dict[str, str], folder: Path) -> list[str]:
    return [*common, "--output_dir", str(folder), *(word for k, v in run.items() for word in (f"--{k}", v))]


def _train(words: list[str], folder: Path) -> None:
    from fastdpo.cli.train import main as train

    code = train([*words, *resuming(folder)])
    if code:
        raise ValueError(f"the run in {folder} ended with exit code {code}")


def _metrics(folder: Path) -> dict[str, float]:
    """The last metrics of evaluation, or of training if there was no evaluation."""
    from fastdpo.training.callbacks.log_history import logs_by_source

    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    sources = logs_by_source(history)
    found = next((entries for source, entries in sources.items() if source != "training"), sources.get("training"))
    return {} if not found else {key: value for key, value in found[-1].items() if key != "step"}


class _Measure:
    """Measures judged reward and KL to the start, on the same prompts for all runs."""

    def __init__(self, options: Any, output: Path) -> None:
        from fastdpo.data.sources.loading import load_preference_dataset
        from fastdpo.rounds.generate import Sampling, read_prompts
        from fastdpo.rounds.judges import check_judge

        if options.eval_prompts is None:
            raise ValueError("eval_prompts must be given with --judge, got none: the judge scores answers to them")
        check_judge(options.judge, options.judge_model)
        self.options, self.file = options, output / "start_answers.json"
        self.prompts = read_prompts(load_preference_dataset(options.eval_prompts))
        self.sampling = Sampling(2, options.max_new_tokens, seed=options.seed)
        self.sampling.check()

    def start(self) -> dict[str, float]:
        return self(self.options.model)

    def __call__(self, name: Any) -> dict[str, float]:
        from fastdpo.rounds.judges import make_judge
        from fastdpo.rounds.measure import measure
        from fastdpo.training import DPOConfig
        from fastdpo.training.setup.models import load_model, resolve_tokenizer

        options, args = self.options, DPOConfig("not_used", max_length=None)
        is_start = str(name) == options.model
        if not is_start and not self.file.exists():
            self(options.model)
        models: list[Any] = []
        for path in dict.fromkeys((str(name), options.model)):
            model: Any = load_model(path, args.init_kwargs())
            models.append(model.to(args.device).eval())
        tokenizer = resolve_tokenizer(options.model, None, args)
        judge = make_judge(options.judge, options.judge_model, model=models[0], tokenizer=tokenizer, args=args)
        start = None if is_start else models[1]
        return measure(models[0], tokenizer, judge, self.prompts, self.sampling, start, self.file)


def _table(results: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    shown = ("loss", "rewards/accuracies", "rewards/margins")
    measured = [key for key in ("reward", "win_rate", "kl") if key in results[0]]
    table = Table(title=f"{len(results)} runs", box=box.SIMPLE, title_justify="left")
    for column in (*results[0]["params"], *shown, *measured):
        table.add_column(column, justify="right")
    for line in results:
        cells = [f"{line['metrics'][key]:.4f}" if key in line["metrics"] else "" for key in shown]
        spread = [
            f"{line[key]:.3f} ± {line[f'{key}_stderr']:.3f}" if f"{key}_stderr" in line else f"{line[key]:.1%}"
            for key in measured
        ]
        table.add_row(*line["params"].values(), *cells, *spread)
    return table


def _page(output: Path, results: list[dict[str, Any]], start: dict[str, float]) -> Path:
    from fastdpo.report import Figure, Point, Table, frontier, write_report
    from fastdpo.report.run import has_matplotlib
    from fastdpo.rounds.sweep import name_of

    measured = [(name_of(line["params"]), line) for line in results]
    rows = [[name, f"{line['reward']:.3f}", f"{line['win_rate']:.1%}", f"{line['kl']:.3f}"] for name, line in measured]
    sections: list[Any] = [Table("Runs", ("run", "judged reward", "win rate", "KL to the start"), rows)]
    if has_matplotlib():
        points = [Point("start", 0.0, start["reward"], 0.0, start["reward_stderr"])]
        points += [
            Point(name, line["kl"], line["reward"], line["kl_stderr"], line["reward_stderr"]) for name, line in measured
        ]
        alt = "; ".join(f"{p.name}: KL {p.kl:.2f}, reward {p.reward:.2f}" for p in points)
        figure = frontier(points, reward_name="judged reward")
        sections.append(Figure("Reward against KL", figure, alt=alt, note="Bars are one standard error."))
    return write_report(output / "sweep.html", "Sweep", sections)
