"""`fastdpo iterate`: rounds of generate, label, train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpo.cli.forwarded import check_forwarded, resuming, train_run
from fastdpo.cli.measured import kl_words, spread
from fastdpo.cli.options.early import check_data
from fastdpo.cli.options.parser import RaisingParser
from fastdpo.cli.options.rounds import add_engine_options, add_judge_options
from fastdpo.cli.records import write_records

if TYPE_CHECKING:
    from fastdpo.rounds.loading import Loader

LABEL_COLUMNS = ("round", "ties", "duplicates", "cut off", "longer chosen", "length and score", "both orders agree")
START_ANSWERS, ANSWERS = "start_answers.json", "answers.json"  # to the held-out prompts; of a round, in its folder
NOT_FORWARDED = ("--output_dir", "--output-dir", "--dataset", "--ref_model", "--ref-model")


def main(argv: list[str]) -> None:
    """Runs the unfinished rounds.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    options, train_options = _parser().parse_known_args(argv)
    check_forwarded(train_options, NOT_FORWARDED, "iterate sets it in each round")
    check_data("prompts", options.prompts)
    output = Path(options.output_dir)
    words = ["--model", options.model, "--dataset", options.prompts, "--output_dir", options.output_dir]
    trained = train_run([*words, "--seed", str(options.seed), *train_options])  # checked before anything is generated
    from fastdpo.rounds.generate import Pairing
    from fastdpo.rounds.iterate import Plan, iterate

    plan = Plan(options.model, options.rounds, options.reference, options.start, options.replay, options.seed)
    plan.check()
    Pairing(options.pairs).check()
    if options.eval_prompts < 2:
        raise ValueError(f"eval_prompts must be at least 2, got {options.eval_prompts}")
    loader = trained.loader(
        options.judge,
        judge_model=options.judge_model,
        judge_timeout=options.judge_timeout,
        engine=options.engine,
        vllm_args=options.vllm_args,
    )
    loader.check(options.model)
    run = _Run(options, train_options, output, loader, trained.args.chat_template_kwargs)
    history = iterate(plan, output, run.steps(), run.settings())
    console = run.console
    console.print(_table(history, options.temperature))
    if any("ties" in line for line in history):
        console.print(_labels(history))
    page = _page(output, history, options.temperature)
    done = f"wrote {page}; each round's model, pairs and manifest are in {output}/round_N"
    console.print(done, soft_wrap=True, markup=False)


def _parser() -> RaisingParser:
    parser = RaisingParser(
        prog="fastdpo iterate",
        description="Online DPO: in every round the model answers prompts, a judge labels the answers, and the model"
        " trains on them.",
        epilog="All further options are those of `fastdpo train`, such as --beta, --learning_rate or --use_peft.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="Model to start from: a folder or a name on the Hub.")
    add("--prompts", required=True, help="File, folder or dataset with a column prompt, or with rows for training.")
    add("--judge", required=True, help="As for `fastdpo generate`.")
    add_judge_options(parser)
    add("--output_dir", "--output-dir", required=True, help="Folder of the rounds.")
    add("--rounds", type=int, default=3, help="Number of rounds. Default: 3.")
    add("--reference", default="keep", help="keep: the start. move: the model a round starts from. Default: keep.")
    add("--start", default="last", help="last: train the last round's model. first: the start anew. Default: last.")
    add("--replay", default="none", help="Rows of earlier rounds to add: none, all or a number. Default: none.")
    add("--num", "-n", type=int, default=4, help="Responses for each prompt. Default: 4.")
    add("--pairs", default="best_worst", help="As for `fastdpo generate`. Default: best_worst.")
    add("--eval_prompts", "--eval-prompts", type=int, default=32, help="Prompts held out to measure. Default: 32.")
    add("--max_new_tokens", "--max-new-tokens", type=int, default=512, help="Maximum response tokens. Default: 512.")
    add("--temperature", type=float, default=1.0, help="Sampling temperature, > 0. Default: 1.")
    add("--batch_size", "--batch-size", type=int, default=32, help="Sequences generated at a time. Default: 32.")
    add("--seed", type=int, default=0, help="Seed of sampling and of training. Default: 0.")
    add_engine_options(parser)
    return parser


class _Run:
    """The steps of a round, bound to the options."""

    def __init__(
        self,
        options: Any,
        train_options: list[str],
        output: Path,
        loader: Loader,
        template_kwargs: dict[str, Any] | None,
    ) -> None:
        from fastdpo.cli.console import make_console
        from fastdpo.data.sources.loading import load_preference_dataset
        from fastdpo.rounds.generate import Sampling, check_prompts, read_prompts

        self.options, self.train_options, self.output = options, train_options, output
        self.loader, self.console = loader, make_console()
        prompts = read_prompts(load_preference_dataset(options.prompts))
        if len(prompts) < options.eval_prompts + 1:
            raise ValueError(
                f"prompts must hold more than eval_prompts ({options.eval_prompts}) prompts, got {len(prompts)}; lower"
                " --eval_prompts"
            )
        check_prompts(loader.tokenizer(options.model), prompts)
        self.held_out, self.prompts = prompts[: options.eval_prompts], prompts[options.eval_prompts :]
        self.sampling = Sampling(
            options.num,
            options.max_new_tokens,
            options.temperature,
            options.batch_size,
            options.seed,
            template_kwargs,
        )
        self.sampling.check()

    def settings(self) -> dict[str, Any]:
        from fastdpo.rounds.state import digest

        names = ("judge", "judge_model", "num", "pairs", "max_new_tokens", "temperature", "eval_prompts")
        settings = {name: getattr(self.options, name) for name in names}
        read = [self.held_out, self.prompts]
        return {"prompts": [self.options.prompts, digest(read)], **settings, "train_options": self.train_options}

    def steps(self) -> Any:
        from fastdpo.rounds.iterate import Steps

        return Steps(self._make_pairs, self._train, self._measure)

    def _make_pairs(self, name: str, path: Path, number: int) -> dict[str, Any]:
        from dataclasses import replace

        from fastdpo.cli.progress import progress_bar
        from fastdpo.rounds.generate import Pairing, generate_scored, make_rows, source_of, summary_of
        from fastdpo.training.setup.reference import give_memory_back

        writer, tokenizer, judge = self.loader.sampler(name)
        sampling = replace(self.sampling, seed=self.sampling.seed + 100_000 * number)  # another draw in every round
        engine, judge_name, judge_model = self.loader.engine_of(name), self.options.judge, self.options.judge_model
        key = {"model": name, "judge": judge_name, "judge_model": judge_model, "round": number, "engine": engine}
        samples = path.with_name("samples.jsonl")
        with progress_bar(self.console, f"round {number}: generating", len(self.prompts)) as progress:
            scored = generate_scored(
                writer, tokenizer, self.prompts, judge, sampling, samples, key=key, progress=progress
            )
        del writer, judge
        give_memory_back()
        source = source_of(name, judge_name, judge_model, sampling, engine, round=number)
        rows, counted = make_rows(scored, Pairing(self.options.pairs), source, sampling.seed)
        if not rows:
            found = f"{counted.num_ties} ties, {counted.num_duplicates} duplicates"
            raise ValueError(
                f"prompts must give at least one pair in round {number}, got {found}; raise temperature or num"
            )
        write_records(path, rows)
        return summary_of(scored, rows, counted).as_facts()

    def _train(self, start: str, reference: str, data: Path, folder: Path) -> None:
        from fastdpo.cli.train import main as train

        words = ["--model", start, "--dataset", str(data), "--output_dir", str(folder)]
        words += [] if reference == start else ["--ref_model", reference]
        words += ["--seed", str(self.options.seed)]
        code = train([*words, *resuming(folder), *self.train_options])
        if code:
            raise ValueError(f"training of {folder} ended with exit code {code}")

    def _measure(self, name: str) -> dict[str, float]:
        from fastdpo.rounds.measure import measure

        model, tokenizer = self.loader.model(name), self.loader.tokenizer(name)
        judge = self.loader.judge(model, tokenizer)
        start = None if name == self.options.model else self.loader.model(self.options.model)
        own_file = None if start is None else Path(name).with_name(ANSWERS)
        start_file = self.output / START_ANSWERS
        return measure(model, tokenizer, judge, self.held_out, self.sampling, start, start_file, own_file)


def _table(history: list[dict[str, Any]], temperature: float) -> Any:
    from rich import box
    from rich.table import Table

    title = "held-out prompts after each round (± one standard error)"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", caption_justify="left")
    table.caption = kl_words(temperature)
    for column in ("round", "judged reward", "win rate against the start", "KL to the start (nats)", "tokens"):
        table.add_column(column, justify="right")
    for line in history:
        table.add_row(
            str(line["round"]),
            spread(line, "reward"),
            "" if line["round"] == 0 else f"{line['win_rate']:.1%}",
            spread(line, "kl"),
            f"{line['tokens']:.1f}",
        )
    return table


def _labels(history: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title="labels of each round", box=box.SIMPLE, title_justify="left")
    for column in LABEL_COLUMNS:
        table.add_column(column, justify="right")
    for row in _label_rows(history):
        table.add_row(*row)
    return table


def _label_rows(history: list[dict[str, Any]]) -> list[list[str]]:
    """A row per round, in the order of LABEL_COLUMNS."""
    return [
        [
            str(line["round"]),
            f"{line['ties']:,}",
            f"{line['duplicate_share']:.1%}",
            f"{line.get('cut_share', 0):.1%}",  # not in older manifests
            "" if line["longer_chosen"] is None else f"{line['longer_chosen']:.1%}",
            f"{line['length_correlation']:+.2f}",
            "" if line["order_agreement"] is None else f"{line['order_agreement']:.1%}",
        ]
        for line in history
        if "ties" in line
    ]


def _page(output: Path, history: list[dict[str, Any]], temperature: float) -> Path:
    from fastdpo.report import FigureGrid, SampleList, Table, write_report
    from fastdpo.report.run import has_matplotlib
    from fastdpo.rounds.measure import answers_side_by_side

    columns = ("round", "judged reward", "win rate", "KL to the start")
    rows = [
        [str(h["round"]), spread(h, "reward"), "" if h["round"] == 0 else f"{h['win_rate']:.1%}", spread(h, "kl")]
        for h in history
    ]
    note = f"On held-out prompts, ± one standard error. {kl_words(temperature)}"
    sections: list[Any] = [Table("After each round", columns, rows, note=note)]
    if labels := _label_rows(history):
        sections.append(Table("Labels of each round", LABEL_COLUMNS, labels))
    if has_matplotlib():
        from fastdpo.report.plots import training_curves

        keys = {"reward": "judged reward", "win_rate": "win rate against the start", "kl": "KL to the start (nats)"}
        entries = [{"step": h["round"], **{words: h[key] for key, words in keys.items()}} for h in history]
        figures = training_curves({"rounds": entries}, tuple(keys.values()), step_name="round")
        sections.append(FigureGrid("By round", [(f"{key} by round", figure) for key, figure in figures]))
    files = {f"round {h['round']}": output / f"round_{h['round']}" / ANSWERS for h in history[1:]}
    if samples := answers_side_by_side({"start": output / START_ANSWERS, **files}):
        sections.append(SampleList("Answers to held-out prompts", samples, "Judged reward"))
    return write_report(output / "iterate.html", "Rounds", sections)
