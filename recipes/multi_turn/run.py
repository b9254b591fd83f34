"""Preferences inside conversations: a small model from scratch, and DPO on the last turn or on all assistant turns.

Conversations are split into folds, and each fold is held out once: pairs of one conversation are never on both sides.
For every fold a tokenizer and a Llama are trained on the other folds' preferred branches, then DPO starts from it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from fastdpo.alignment.results import Estimate
from fastdpo.alignment.task import tiny_llama
from fastdpo.ranking.shares import Share, share_of
from fastdpo.report import Figure, Interval, Table, Text, intervals
from fastdpo.report.sections import Section
from recipes.multi_turn.dialogues import SETS, Dialogue, files_of, read_dialogues
from recipes.shared import Line, Options, finish, options_of, parser_of, run_all, start

NAME = "multi_turn"
BETA = 0.1
MAX_LENGTH = 1024  # tokens; longer pairs are left out, in both kinds of runs
ARMS = {"last": "DPO, last turn", "all": "DPO, all turns"}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Sizes of models and training."""

    num_folds: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    sft_epochs: float
    dpo_epochs: float
    max_dialogues: int | None = None  # of each data set
    sft_learning_rate: float = 3e-3
    dpo_learning_rate: float = 3e-4


SIZES = {
    "full": Size(5, 192, 4, 4096, sft_epochs=4, dpo_epochs=2, sft_learning_rate=2e-3, dpo_learning_rate=2e-4),
    "small": Size(2, 96, 2, 2048, sft_epochs=4, dpo_epochs=1),
    "tiny": Size(2, 16, 1, 320, sft_epochs=1, dpo_epochs=1, max_dialogues=24),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not in results.jsonl, and writes the tables, the page and the plot."""
    parser = parser_of(NAME, "Multi-turn dialogue: a model from scratch, DPO on the last turn or on all turns.")
    parser.add_argument("--data", required=True, help="Folder of the public data sets that the README names.")
    parsed = parser.parse_args(argv)
    options, size = options_of(NAME, parsed), SIZES[parsed.size]
    files = files_of(Path(parsed.data))
    experiment = Experiment(options, size, read_dialogues(Path(parsed.data)))
    runs = [{"run": "data"}]
    runs += [{"run": run, "fold": str(fold)} for fold in range(size.num_folds) for run in ("sft", *ARMS)]
    lines = run_all(runs, options, experiment.run, files=sorted(file.name for file in files.values()))
    finish(options, "DPO inside conversations", sections(lines))


class Experiment:
    """The runs, bound to the data.

    Args:
        dialogues: all pairs.
    """

    def __init__(self, options: Options, size: Size, dialogues: Sequence[Dialogue]) -> None:
        self.options, self.size = options, size
        self.of_set = {s.name: [d for d in dialogues if d.data_set == s.name][: size.max_dialogues] for s in SETS}
        self.dialogues = [dialogue for of_set in self.of_set.values() for dialogue in of_set]
        self.conversations = list(dict.fromkeys(dialogue.conversation for dialogue in self.dialogues))
        order = random.Random(0).sample(range(len(self.conversations)), len(self.conversations))
        self.fold_of = {self.conversations[place]: i % size.num_folds for i, place in enumerate(order)}

    def run(self, params: Mapping[str, str], folder: Path) -> dict[str, Any]:
        """One run: facts about the data, or a model and its figures on the held-out fold."""
        if params["run"] == "data":
            tokenizer = train_tokenizer(self.dialogues, self.size.vocab_size)
            return {"sets": {name: facts(of_set, tokenizer) for name, of_set in self.of_set.items() if of_set}}
        fold = int(params["fold"])
        train = [d for d in self.dialogues if self.fold_of[d.conversation] != fold]
        held_out = [d for d in self.dialogues if self.fold_of[d.conversation] == fold]
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        if params["run"] == "sft":
            return {**self._fine_tune(train, folder, fold), "pairs": self._held_out(folder, None, held_out)}
        reference = self.options.output_dir / f"run=sft,fold={fold}"
        rows = [dialogue.last_turn() if params["run"] == "last" else dialogue.all_turns() for dialogue in train]
        return {**self._prefer(reference, rows, folder, fold), "pairs": self._held_out(folder, reference, held_out)}

    def _fine_tune(self, train: Sequence[Dialogue], folder: Path, fold: int) -> dict[str, Any]:
        """Trains tokenizer and model from scratch on the branches that people preferred."""
        from fastdpo.training import SFTConfig, SFTTrainer

        tokenizer = train_tokenizer(train, self.size.vocab_size)
        branches = {str(d.conversation): d.all_turns() for d in reversed(train)}  # one for each conversation
        rows = [{"messages": [*row["prompt"], *row["chosen"]]} for row in branches.values()]
        args = SFTConfig(
            learning_rate=self.size.sft_learning_rate,
            num_train_epochs=self.size.sft_epochs,
            **self._settings(folder, fold),
        )
        trainer = SFTTrainer(
            tiny_llama(tokenizer, self.size, fold, MAX_LENGTH),
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
        trainer.save_model()
        return {"loss": trainer.state.log_history[-1]["train_loss"], "rows": len(rows)}

    def _prefer(self, reference: Path, rows: Sequence[Any], folder: Path, fold: int) -> dict[str, Any]:
        """Trains the reference with DPO on pairs."""
        from fastdpo.training import DPOConfig, DPOTrainer

        args = DPOConfig(
            beta=BETA,
            learning_rate=self.size.dpo_learning_rate,
            num_train_epochs=self.size.dpo_epochs,
            on_long_row="drop",
            reference="cached",
            ref_cache_dir=str(self.options.output_dir / "cache"),
            **self._settings(folder, fold),
        )
        trainer = DPOTrainer(str(reference), args=args, train_dataset=rows)
        trainer.train()
        trainer.save_model()
        report = trainer.data_reports["train"]
        counted = sum(report.tokens[side].total for side in ("chosen", "rejected"))
        return {"rows": report.num_kept, "counted_tokens": counted}

    def _settings(self, folder: Path, fold: int) -> dict[str, Any]:
        return {
            "output_dir": str(folder), "seed": fold, "max_length": MAX_LENGTH, "per_device_train_batch_size": 8,
            "warmup_steps": 10, "adam_beta2": 0.99, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "logging_strategy": "no", "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False,
        }  # fmt: skip

    def _held_out(self, model: Path, reference: Path | None, held_out: Sequence[Dialogue]) -> list[dict[str, Any]]:
        """The margin of each held-out pair's last turn: of implicit rewards, or of log-probs without a reference."""
        from fastdpo.rewards.scores import score
        from fastdpo.training import DPOConfig

        args = DPOConfig(
            "not_used", max_length=MAX_LENGTH, on_long_row="drop", ref_cache_dir=str(self.options.output_dir / "cache")
        )
        rows = [dialogue.last_turn() for dialogue in held_out]
        scores = score(str(model), None if reference is None else str(reference), rows, args, beta=BETA)
        return [
            {
                "set": held_out[row.row].data_set,
                "conversation": self.conversations.index(held_out[row.row].conversation),
                "turn": sum(message["role"] == "user" for message in held_out[row.row].history),
                "margin": round(row.margins[0], 4),
                "longer": row.lengths[0] - row.lengths[1],
            }
            for row in scores.rows
        ]


def facts(dialogues: Sequence[Dialogue], tokenizer: Any) -> dict[str, Any]:
    """The shape of a data set: messages, and the tokens that its pairs have and that a packed batch computes."""
    from fastdpo.data.tokens.settings import TokenizationSettings
    from fastdpo.inspection.source import Source
    from fastdpo.inspection.tokens import survey_tokens

    settings = TokenizationSettings(max_length=None)
    surveys = {
        name: survey_tokens(Source(rows, settings), tokenizer, settings)
        for name, rows in (
            ("last", [dialogue.last_turn() for dialogue in dialogues]),
            ("all", [dialogue.all_turns() for dialogue in dialogues]),
        )
    }
    messages = [len(dialogue.history) + 1 for dialogue in dialogues]
    return {
        "conversations": len({dialogue.conversation for dialogue in dialogues}),
        "pairs": len(dialogues),
        "branches": sum(len(dialogue.chosen) > 1 for dialogue in dialogues),
        "messages_median": median(messages),
        "messages_max": max(messages),
        "tokens": surveys["last"].num_raw,
        **{f"computed_{name}": survey.num_unique for name, survey in surveys.items()},
        **{f"counted_{name}": sum(survey.chosen) + sum(survey.rejected) for name, survey in surveys.items()},
    }


def train_tokenizer(dialogues: Sequence[Dialogue], vocab_size: int) -> Any:
    """A byte-level BPE with a chat template, trained on all messages of the dialogues."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=names, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = dict.fromkeys(m["content"] for d in dialogues for m in (*d.history, *d.chosen, *d.rejected))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE,
        additional_special_tokens=names[3:],
    )  # fmt: skip


def held_out_pairs(lines: Sequence[Line], run: str) -> list[dict[str, Any]]:
    """The held-out pairs of all folds."""
    return [pair for line in lines if line["params"]["run"] == run for pair in line["pairs"]]


def share(pairs: Sequence[Mapping[str, Any]], key: str = "margin") -> Share:
    """How often the figure is above 0; a tie counts half. The interval takes pairs of a conversation as dependent."""
    right = np.array([(np.sign(pair[key]) + 1) / 2 for pair in pairs])
    return share_of(right, np.array([pair["conversation"] for pair in pairs]))


def mean_of(values: Sequence[float], pairs: Sequence[Mapping[str, Any]]) -> Estimate:
    """A mean with its standard error over conversations."""
    x, clusters = np.array(values), np.array([pair["conversation"] for pair in pairs])
    sums = np.bincount(clusters, x - x.mean())
    return Estimate(float(x.mean()), float(np.sqrt((sums**2).sum())) / len(x))


def table(lines: Sequence[Line]) -> Table:
    """Held-out accuracy, loss and margin before and after."""
    before = held_out_pairs(lines, "sft")
    rows = [
        ["the longer answer", share(before, "longer").text(), "", "", ""],
        ["before: log-prob of the SFT model", share(before).text(), f"{np.log(2):.3f}", "0", ""],
    ]
    for run, name in ARMS.items():
        pairs = held_out_pairs(lines, run)
        margins = [pair["margin"] for pair in pairs]
        losses = np.logaddexp(0, -np.array(margins)).tolist()
        seconds = fmean(line["cpu_seconds"] for line in lines if line["params"]["run"] == run)
        rows.append(
            [
                f"after: {name}",
                share(pairs).text(),
                mean_of(losses, pairs).text(3),
                mean_of(margins, pairs).text(3),
                f"{seconds:.0f}",
            ]
        )
    return Table(
        "Held-out pairs, last turn",
        ("ranked by", "accuracy (95 %)", "loss", "margin", "CPU s"),
        rows,
        note=f"{len(before):,} pairs in {len({pair['conversation'] for pair in before}):,} conversations, each held out"
        " once. Intervals and standard errors take pairs of one conversation as dependent. Before DPO the implicit"
        " reward is 0, so log-probs rank.",
    )


def data_table(lines: Sequence[Line]) -> Table:
    """What each data set holds, and what a packed batch saves."""
    sets = next(line["sets"] for line in lines if line["params"]["run"] == "data")
    rows = []
    for name, found in sets.items():
        rows.append(
            [
                name,
                f"{found['pairs']:,} / {found['conversations']:,}",
                f"{found['messages_median']:g} / {found['messages_max']}",
                f"{found['tokens'] / 1000:,.0f}",
                f"{1 - found['computed_last'] / found['tokens']:.0%}",
                f"{found['counted_last'] / 1000:,.0f} / {found['counted_all'] / 1000:,.0f}",
            ]
        )
    return Table(
        "The data",
        ("set", "pairs / conversations", "messages, median / most", "tokens, k", "saved", "counted, last / all, k"),
        rows,
        note="Tokens: history and answer of both sides, in thousands. Saved: the share that a batch of 8 pairs in the"
        " file's order need not compute, because what both sides share is computed once. Counted: the tokens that the"
        " loss sums over, on the last turn or on all turns of the assistant.",
    )


def by_turn(lines: Sequence[Line]) -> Figure:
    """Accuracy by place in the conversation and by data set."""
    series: dict[str, list[Interval]] = {}
    groups: list[tuple[str, Any]] = [
        ("first turn", lambda pair: pair["turn"] == 1),
        ("later turns", lambda pair: pair["turn"] > 1),
        *((s.name, lambda pair, name=s.name: pair["set"] == name) for s in SETS),
    ]
    for run, label in (("sft", "before"), *ARMS.items()):
        pairs = held_out_pairs(lines, run)
        chosen = [(name, [pair for pair in pairs if is_in(pair)]) for name, is_in in groups]
        found = [(name, share(of)) for name, of in chosen if of]
        series[label] = [Interval(name, s.rate, s.lower, s.upper) for name, s in found]
    alt = "; ".join(f"{label}, {i.name}: {i.value:.2f}" for label, of in series.items() for i in of)
    return Figure(
        "Accuracy by turn and by data set",
        intervals(series, "held-out accuracy", mark=0.5),
        alt=alt,
        note="Intervals are 95 %. The dashed line is chance.",
    )


def sections(lines: Sequence[Line]) -> list[Section]:
    """Everything on the page."""
    by_arm = {run: held_out_pairs(lines, run) for run in ARMS}
    differing = [
        (a, b) for a, b in zip(by_arm["last"], by_arm["all"], strict=True) if (a["margin"] > 0) != (b["margin"] > 0)
    ]
    better = sum(b["margin"] > 0 for _, b in differing)
    words = [
        f"The two kinds of training rank {len(differing):,} of {len(by_arm['last']):,} held-out pairs differently;"
        f" training on all turns is right in {better:,} of them.",
        "Earlier turns that both sides share have the same log-ratio on both, so they cancel in the margin. All turns"
        " differ from the last turn only where both answers were continued in the data.",
    ]
    return [table(lines), data_table(lines), by_turn(lines), Text("Last turn and all turns", words)]


if __name__ == "__main__":
    start(main)
