"""`fastdpo iterate`: rounds of generate, label, train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdpo.cli.forwarded import check_forwarded, resuming
from fastdpo.cli.options.parser import RaisingParser
from fastdpo.cli.records import write_records

NOT_FORWARDED = ("--output_dir", "--output-dir", "--dataset", "--ref_model", "--ref-model")


def main(argv: list[str]) -> None:
    """Runs the unfinished rounds.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    options, train_options = _parser().parse_known_args(argv)
    check_forwarded(train_options, NOT_FORWARDED, "iterate sets it in each round")
    from fastdpo.rounds.iterate import Plan, iterate
    from fastdpo.rounds.judges import check_judge

    plan = Plan(options.model, options.rounds, options.reference, options.start, options.replay, options.seed)
    plan.check()
    check_judge(options.judge, options.judge_model)
    if options.eval_prompts < 2:
        raise ValueError(f"eval_prompts must be at least 2, got {options.eval_prompts}")
    from fastdpo.cli.console import make_console

    output = Path(options.output_dir)
    run = _Run(options, train_options, output)
    history = iterate(plan, output, run.steps(), run.settings())
    console = make_console()
    console.print(_table(history))
    console.print(f"wrote {_page(output, history)}; each round's model, pairs and manifest are in {output}/round_N")


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
    add("--judge_model", "--judge-model", help="Name of the endpoint's model.")
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
    add("--use_cpu", "--use-cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    add("--trust_remote_code", "--trust-remote-code", action="store_true", help="Run code from the Hub.")
    return parser


class _Run:
    """The steps of a round, bound to the options."""

    def __init__(self, options: Any, train_options: list[str], output: Path) -> None:
        from fastdpo.data.sources.loading import load_preference_dataset
        from fastdpo.rounds.generate import Sampling, read_prompts

        self.options, self.train_options, self.output = options, train_options, output
        prompts = read_prompts(load_preference_dataset(options.prompts))
        if len(prompts) < options.eval_prompts + 1:
            raise ValueError(
                f"prompts must hold more than eval_prompts ({options.eval_prompts}) prompts, got {len(prompts)}; lower"
                " --eval_prompts"
            )
        self.held_out, self.prompts = prompts[: options.eval_prompts], prompts[options.eval_prompts :]
        self.sampling = Sampling(
            options.num, options.max_new_tokens, options.temperature, options.batch_size, options.seed
        )
        self.sampling.check()

    def settings(self) -> dict[str, Any]:
        names = ("prompts", "judge", "judge_model", "num", "pairs", "max_new_tokens", "temperature", "eval_prompts")
        return {**{name: getattr(self.options, name) for name in names}, "train_options": self.train_options}

    def steps(self) -> Any:
        from fastdpo.rounds.iterate import Steps

        return Steps(self._make_pairs, self._train, self._measure)

    def _loaded(self, name: str) -> tuple[Any, Any, Any]:
        """Model, tokenizer and judge."""
        from fastdpo.rounds.judges import make_judge
        from fastdpo.training import DPOConfig
        from fastdpo.training.setup.models import load_model, resolve_tokenizer

        options = self.options
        args = DPOConfig(
            "not_used", max_length=None, use_cpu=options.use_cpu, trust_remote_code=options.trust_remote_code
        )
        model: Any = load_model(name, args.init_kwargs())
        model.to(args.device).eval()
        tokenizer = resolve_tokenizer(name, None, args)
        judge = make_judge(options.judge, options.judge_model, model=model, tokenizer=tokenizer, args=args)
        return model, tokenizer, judge

    def _make_pairs(self, name: str, path: Path, number: int) -> None:
        from dataclasses import replace

        from fastdpo.rounds.generate import Pairing, generate_scored, make_rows

        model, tokenizer, judge = self._loaded(name)
        sampling = replace(self.sampling, seed=self.sampling.seed + 100_000 * number)  # another draw in every round
        key = {"model": name, "judge": self.options.judge, "round": number}
        samples = path.with_name("samples.jsonl")
        scored = generate_scored(model, tokenizer, self.prompts, judge, sampling, samples, key=key)
        source = {"model": name, "judge": self.options.judge, "round": number}
        rows, counted = make_rows(scored, Pairing(self.options.pairs), source, sampling.seed)
        if not rows:
            found = f"{counted.num_ties} ties, {counted.num_duplicates} duplicates"
            raise ValueError(
                f"prompts must give at least one pair in round {number}, got {found}; raise temperature or num"
            )
        write_records(path, rows)

    def _train(self, start: str, reference: str, data: Path, folder: Path) -> None:
        from fastdpo.cli.train import main as train

        words = ["--model", start, "--dataset", str(data), "--output_dir", str(folder)]
        words += [] if reference == start else ["--ref_model", reference]
        words += ["--use_cpu", "true"] if self.options.use_cpu else []
        words += ["--trust_remote_code", "true"] if self.options.trust_remote_code else []
        words += ["--seed", str(self.options.seed)]
        code = train([*words, *resuming(folder), *self.train_options])
        if code:
            raise ValueError(f"training of {folder} ended with exit code {code}")

    def _measure(self, name: str) -> dict[str, float]:
        from fastdpo.rounds.measure import measure

        model, tokenizer, judge = self._loaded(name)
        start = None
        if name != self.options.model:
            start = self._loaded(self.options.model)[0]
        return measure(model, tokenizer, judge, self.held_out, self.sampling, start, self.output / "start_answers.json")


def _table(history: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    title = "held-out prompts after each round (± one standard error)"
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for column in ("round", "judged reward", "win rate against the start", "KL to the start (nats)", "tokens"):
        table.add_column(column, justify="right")
    for line in history:
        table.add_row(
            str(line["round"]),
            f"{line['reward']:.3f} ± {line['reward_stderr']:.3f}",
            "" if line["round"] == 0 else f"{line['win_rate']:.1%}",
            f"{line['kl']:.3f} ± {line['kl_stderr']:.3f}",
            f"{line['tokens']:.1f}",
        )
    return table


def _page(output: Path, history: list[dict[str, Any]]) -> Path:
    from fastdpo.report import FigureGrid, Table, write_report
    from fastdpo.report.run import has_matplotlib

    columns = ("round", "judged reward", "win rate", "KL to the start")
    rows = [[str(h["round"]), f"{h['reward']:.3f}", f"{h['win_rate']:.1%}", f"{h['kl']:.3f}"] for h in history]
    note = "On held-out prompts; KL in nats per response."
    sections: list[Any] = [Table("After each round", columns, rows, note=note)]
    if has_matplotlib():
        from fastdpo.report.plots import training_curves

        keys = {"reward": "judged reward", "win_rate": "win rate against the start", "kl": "KL to the start (nats)"}
        entries = [{"step": h["round"], **{words: h[key] for key, words in keys.items()}} for h in history]
        figures = training_curves({"rounds": entries}, tuple(keys.values()), step_name="round")
        sections.append(FigureGrid("By round", [(f"{key} by round", figure) for key, figure in figures]))
    return write_report(output / "iterate.html", "Rounds", sections)
