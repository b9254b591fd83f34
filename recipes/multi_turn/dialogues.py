"""Preferences inside conversations: a folder of public data sets in, pairs of answers to one history out.

Every pair keeps what each branch goes on with, so that a run can train on the last turn alone or on all turns of the
assistant. Refused with ValueError: a folder without any of the files in SETS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fastdpo.data.sources.loading import iterate_examples
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.inspection.source import Source
from fastdpo.types import Message

Row = dict[str, list[Message]]  # prompt, chosen, rejected


@dataclass(frozen=True)
class DataSet:
    """A public data set: names that its file may have, and where it comes from."""

    name: str
    patterns: tuple[str, ...]
    source: str
    dataset_format: str


SETS = (
    DataSet(
        "HH-RLHF, harmless",
        ("hh-rlhf*.jsonl*", "harmless*.jsonl*"),
        "https://github.com/anthropics/hh-rlhf, harmless-base/test.jsonl.gz as harmless.jsonl.gz",
        "hh_chat",
    ),
    DataSet(
        "LLaMA-Factory, English",
        ("dpo_en_demo.json", "llama-factory-dpo-en-demo.json"),
        "https://github.com/hiyouga/LLaMA-Factory, data/dpo_en_demo.json",
        "llama_factory",
    ),
    DataSet(
        "OpenAssistant trees",
        ("en_100_tree.jsonl*", "open-assistant-en-100-tree.jsonl*"),
        "https://github.com/LAION-AI/Open-Assistant, model/model_eval/manual/data/en_100_tree.jsonl",
        "open_assistant",
    ),
)


@dataclass(frozen=True)
class Dialogue:
    """Two answers to one history."""

    data_set: str  # its name
    history: tuple[Message, ...]
    chosen: tuple[Message, ...]  # the answer, and the turns after it if both branches go on
    rejected: tuple[Message, ...]

    @property
    def conversation(self) -> tuple[str, str]:
        """Equal for all pairs of one conversation: the data set and the first message of the user."""
        return self.data_set, next(m["content"] for m in self.history if m["role"] == "user")

    def last_turn(self) -> Row:
        """The history is the prompt; one answer on each side."""
        return {"prompt": list(self.history), "chosen": [self.chosen[0]], "rejected": [self.rejected[0]]}

    def all_turns(self) -> Row:
        """The prompt ends before the assistant's first turn. All its turns count, on both sides."""
        roles = [message["role"] for message in self.history]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        prompt, shared = list(self.history[:first]), list(self.history[first:])
        return {"prompt": prompt, "chosen": [*shared, *self.chosen], "rejected": [*shared, *self.rejected]}


def files_of(folder: Path) -> dict[str, Path]:
    """The file of each data set that is in the folder, by the name of the set.

    Raises:
        ValueError: there is none.
    """
    found = {}
    for data_set in SETS:
        files = sorted(file for pattern in data_set.patterns for file in folder.glob(pattern))
        if files:
            found[data_set.name] = files[0]
    if not found:
        wanted = "; ".join(f"{s.patterns[0]} ({s.source})" for s in SETS)
        raise ValueError(f"data must be a folder with at least one of these files, got {folder}: {wanted}")
    return found


def read_dialogues(folder: Path) -> list[Dialogue]:
    """All pairs of all files, in the order of SETS."""
    files = files_of(folder)
    dialogues: list[Dialogue] = []
    for data_set in SETS:
        if data_set.name in files:
            read = _trees if data_set.dataset_format == "open_assistant" else _pairs
            dialogues += read(data_set, files[data_set.name])
    return dialogues


def _pairs(data_set: DataSet, file: Path) -> Iterator[Dialogue]:
    """Rows with a history and two answers to it."""
    source = Source(file, TokenizationSettings(dataset_format=data_set.dataset_format))
    for read in source.rows():
        if read.row is None or isinstance(read.row.prompt, str):
            continue
        for better, worse in read.row.preferences:
            answers: list[Any] = [read.row.responses[better], read.row.responses[worse]]
            yield Dialogue(data_set.name, tuple(read.row.prompt), tuple(answers[0]), tuple(answers[1]))


def _trees(data_set: DataSet, file: Path) -> Iterator[Dialogue]:
    """Every two ranked answers to a message of the user, at any depth of the tree."""
    for tree in iterate_examples(file):
        yield from _below(data_set, tree["prompt"], ())


def _below(data_set: DataSet, message: Any, before: tuple[Message, ...]) -> Iterator[Dialogue]:
    history = (*before, _message(message))
    replies = _replies(message)
    ranked = sorted((r for r in replies if _is_ranked(r)), key=lambda reply: reply["rank"])
    for better, worse in combinations(ranked, 2):
        if better["rank"] < worse["rank"] and better["text"] != worse["text"]:
            after = [_continuation(answer) for answer in (better, worse)]
            if not all(after):  # a branch that goes on beside one that ends would show which is better by its length
                after = [(), ()]
            chosen, rejected = ((_message(a), *more) for a, more in zip((better, worse), after, strict=True))
            yield Dialogue(data_set.name, history, chosen, rejected)
    for reply in replies:
        yield from _below(data_set, reply, history)


def _continuation(answer: Any) -> tuple[Message, ...]:
    """The turns after an answer: the user's first reply that got an answer, its best answer, and so on."""
    for reply in _replies(answer):
        answers = sorted((r for r in _replies(reply) if _is_ranked(r)), key=lambda r: r["rank"])
        if answers:
            return (_message(reply), _message(answers[0]), *_continuation(answers[0]))
    return ()


def _replies(message: Any) -> Sequence[Any]:
    return [reply for reply in message.get("replies") or () if not reply.get("deleted")]


def _is_ranked(reply: Any) -> bool:
    return reply["role"] == "assistant" and reply.get("rank") is not None


def _message(message: Any) -> Message:
    return {"role": "assistant" if message["role"] == "assistant" else "user", "content": message["text"]}
