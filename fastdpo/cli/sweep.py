"""`fastdpo sweep`: training runs over a grid of settings, with one table at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpo.cli.forwarded import check_forwarded, resuming, train_run
from fastdpo.cli.measured import kl_words, spread
from fastdpo.cli.options.early import check_data
from fastdpo.cli.options.parser import RaisingParser
from fastdpo.cli.options.rounds import add_judge_options

if TYPE_CHECKING:
    from fastdpo.cli.forwarded import TrainRun
    from fastdpo.rounds.generate import Sampling
    from fastdpo.rounds.loading import Loader

START_ANSWERS, ANSWERS = "start_answers.json", "answers.json"  # to --eval_prompts; of a run, in its folder
NOT_FORWARDED = ("--output_dir", "--output-dir")


def main(argv: list[str]) -> None:
    """Runs the unfinished runs.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    options, train_options = _parser().parse_known_args(argv)
    check_forwarded(train_options, NOT_FORWARDED, "sweep sets it for each run")
    if options.gpu_memory is not None and not options.dry_run:
        raise ValueError(f"gpu_memory must be given with --dry_run, got {options.gpu_memory!r} without it")
    from fastdpo.rounds.sweep import combinations_of, finished, name_of, read_params, sweep

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

    planned = [train_run(_words(common, run, output / name_of(run))) for run in runs]  # before the first run
    console = make_console()
    if options.dry_run:
        for run in runs:
            words = " ".join(_words(common, run, output / name_of(run)))
            console.print(f"fastdpo train {words}", soft_wrap=True, markup=False, highlight=False)
        from fastdpo.cli.sweep_plan import memory_table

        with console.status("estimating memory"):
            table = memory_table(runs, planned, options.gpu_memory)
        console.print(table)
        return
    settings = {"model": options.model, "dataset": options.dataset, "seed": options.seed, "options": train_options}
    measure = _Measure(options, output) if options.judge else None
    if measure is not None:
        measure.check(planned)
        settings |= measure.settings()
        finished(output, settings)
        measure.start(planned[0])  # before the first run: an endpoint that does not answer is told now

    def run_one(run: dict[str, str], folder: Path) -> dict[str, Any]:
        console.rule(name_of(run))
        _train(_words(common, run, folder), folder)
        return {"metrics": _metrics(folder), **({} if measure is None else measure(folder, planned[runs.index(run)]))}

    results = sweep(runs, output, run_one, settings)
    console.print(_table(results))
    wrote = [str(output / "results.jsonl")]
    if measure is not None and len(results) > 1:
        wrote.append(str(_page(output, results, measure.start(planned[0]))))
    done = f"wrote {', '.join(wrote)}; `fastdpo compare` shows runs side by side"
    console.print(done, soft_wrap=True, markup=False)


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
    add("--dry_run", "--dry-run", action="store_true", help="Check all settings; print the runs and their memory.")
    add("--gpu_memory", "--gpu-memory", help="Memory to plan for with --dry_run, such as 24GB. Default: the device's.")
    add("--judge", help="Also measure reward and KL on the prompts of --eval_prompts; as for `fastdpo generate`.")
    add_judge_options(parser)
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
        from fastdpo.rounds.generate import read_prompts

        if options.eval_prompts is None:
            raise ValueError("eval_prompts must be given with --judge, got none: the judge scores answers to them")
        check_data("eval_prompts", options.eval_prompts)
        self.options, self.output = options, output
        self.prompts = read_prompts(load_preference_dataset(options.eval_prompts))
        if len(self.prompts) < 2:
            raise ValueError(f"eval_prompts must hold at least two prompts, got {len(self.prompts)}")

    def check(self, planned: Sequence[TrainRun]) -> None:
        """Raises ValueError for a judge or prompts that cannot work, before the first run."""
        from fastdpo.rounds.generate import check_prompts

        for of_run in planned:
            loader = self._loader(of_run)
            loader.check(self.options.model)
            check_prompts(loader.tokenizer(self.options.model), self.prompts)
            self._sampling(of_run).check()

    def settings(self) -> dict[str, Any]:
        from fastdpo.rounds.state import digest

        names = ("judge", "judge_model", "max_new_tokens", "seed")
        settings = {name: getattr(self.options, name) for name in names}
        return {**settings, "eval_prompts": [self.options.eval_prompts, digest(self.prompts)]}

    def start(self, of_run: TrainRun) -> dict[str, float]:
        """What the start gives. It is measured once, and again if the settings have changed."""
        from fastdpo.rounds.state import as_stored, read_json, write_json

        path, now = self.output / "start.json", as_stored({"model": self.options.model, **self.settings()})
        stored = read_json(path)
        if stored.get("settings") != now:
            stored = {"settings": now, "metrics": self._measured(self.options.model, of_run)}
            write_json(path, stored)
        metrics: dict[str, float] = stored["metrics"]
        return metrics

    def __call__(self, folder: Path, of_run: TrainRun) -> dict[str, float]:
        return self._measured(str(folder), of_run)

    def _measured(self, name: str, of_run: TrainRun) -> dict[str, float]:
        from fastdpo.rounds.measure import measure

        loader, file = self._loader(of_run), self.output / START_ANSWERS
        model, tokenizer = loader.model(name), loader.tokenizer(self.options.model)
        judge = loader.judge(model, tokenizer)
        start = None if name == self.options.model else loader.model(self.options.model)
        own_file = None if start is None else Path(name) / ANSWERS
        return measure(model, tokenizer, judge, self.prompts, self._sampling(of_run), start, file, own_file)

    def _loader(self, of_run: TrainRun) -> Loader:
        options = self.options
        return of_run.loader(options.judge, judge_model=options.judge_model, judge_timeout=options.judge_timeout)

    def _sampling(self, of_run: TrainRun) -> Sampling:
        from fastdpo.rounds.generate import Sampling

        options, kwargs = self.options, of_run.args.chat_template_kwargs
        return Sampling(2, options.max_new_tokens, seed=options.seed, chat_template_kwargs=kwargs)


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
        figures = [spread(line, key) if f"{key}_stderr" in line else f"{line[key]:.1%}" for key in measured]
        table.add_row(*line["params"].values(), *cells, *figures)
    if measured:
        table.caption, table.caption_justify = f"± one standard error. {kl_words()}", "left"
    return table


def _page(output: Path, results: list[dict[str, Any]], start: dict[str, float]) -> Path:
    from fastdpo.report import Figure, Point, SampleList, Table, frontier, write_report
    from fastdpo.report.run import has_matplotlib
    from fastdpo.rounds.measure import answers_side_by_side
    from fastdpo.rounds.sweep import name_of

    measured = [(name_of(line["params"]), line) for line in results]
    rows = [["start", spread(start, "reward"), "", spread(start, "kl")]]
    rows += [[name, spread(line, "reward"), f"{line['win_rate']:.1%}", spread(line, "kl")] for name, line in measured]
    columns, note = ("run", "judged reward", "win rate", "KL to the start"), f"± one standard error. {kl_words()}"
    sections: list[Any] = [Table("Runs", columns, rows, note=note)]
    if has_matplotlib():
        points = [Point("start", 0.0, start["reward"], 0.0, start["reward_stderr"])]
        points += [
            Point(name, line["kl"], line["reward"], line["kl_stderr"], line["reward_stderr"]) for name, line in measured
        ]
        alt = "; ".join(f"{p.name}: KL {p.kl:.2f}, reward {p.reward:.2f}" for p in points)
        figure = frontier(points, reward_name="judged reward")
        sections.append(Figure("Reward against KL", figure, alt=alt, note="Bars are one standard error."))
    files = {"start": output / START_ANSWERS, **{name: output / name / ANSWERS for name, _ in measured}}
    if samples := answers_side_by_side(files):
        sections.append(SampleList("Answers", samples, "Judged reward", name_column="Run"))
    return write_report(output / "sweep.html", "Sweep", sections)
