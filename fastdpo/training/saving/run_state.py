"""Writes a run's trainer_state.json. The time of a save hardly grows with the log.

In: a TrainerState. Out: the JSON that Trainer writes, with each entry of the log on one line. Trainer copies and
formats the whole log at every save, which took longer than the weights of a small model after 400 entries. Here each
entry is formatted once and kept as text; an entry that was changed meanwhile is formatted again.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerState

from fastdpo.files import write_whole


class StateWriter:
    """Writes the states of one run."""

    def __init__(self) -> None:
        self._entries: list[tuple[int | None, str]] = []  # (key, text) of each entry of the log

    def write(self, state: TrainerState, path: Path) -> None:
        rest = copy.copy(state)
        rest.log_history = []
        fields = asdict(rest)
        del fields["log_history"]
        log = ",\n    ".join(self._texts(state.log_history))
        others = json.dumps(fields, indent=2, sort_keys=True).removeprefix("{\n")
        write_whole(path, f'{{\n  "log_history": [\n    {log}\n  ],\n{others}\n')

    @contextmanager
    def alone(self, state: TrainerState) -> Iterator[None]:
        """Inside, Trainer does not write the state."""
        vars(state)["save_to_json"] = lambda path: None
        try:
            yield
        finally:
            vars(state).pop("save_to_json", None)

    def _texts(self, log: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        del self._entries[len(log) :]
        for index, entry in enumerate(log):
            key = _key(entry)
            if index == len(self._entries):
                self._entries.append((key, json.dumps(entry, sort_keys=True)))
            elif key is None or self._entries[index][0] != key:
                self._entries[index] = (key, json.dumps(entry, sort_keys=True))
            yield self._entries[index][1]


def _key(entry: Mapping[str, Any]) -> int | None:
    """A number that changes with the entry; None for an entry that holds lists."""
    try:
        return hash(tuple(entry.items()))
    except TypeError:
        return None
