"""Online DPO in rounds: the model answers prompts, a judge labels pairs of answers, and the model trains on them.

In: a Plan, and the three steps of a round as functions. Out: a folder per round. Its manifest lists the finished steps,
so that a killed run continues with the step that it was in. After every round the model answers held-out prompts, which
gives the mean judged reward, the win rate against the start, and the KL to the start. Iterated DPO: Xu et al. (arXiv
2312.16682) and Guo et al. (arXiv 2402.04792).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastdpo.files import write_whole
from fastdpo.locks import locked
from fastdpo.rounds.state import as_stored, check_same, read_json, write_json

REFERENCES, STARTS = ("keep", "move"), ("last", "first")
PLAN_FILE, MANIFEST = "iterate.json", "manifest.json"


@dataclass(frozen=True)
class Plan:
    """The settings of all rounds."""

    model: str  # the start
    num_rounds: int = 3
    reference: str = "keep"  # keep: the start in every round. move: the model that the round starts from
    start: str = "last"  # last: train the last round's model further. first: train the start anew in every round
    replay: str = "none"  # rows of earlier rounds to add: none, all, or a number
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for values that cannot work."""
        if self.num_rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.num_rounds}")
        for name, allowed in (("reference", REFERENCES), ("start", STARTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.replay not in ("none", "all") and not self.replay.isdigit():
            raise ValueError(f"replay must be none, all or a number of rows, got {self.replay!r}")


@dataclass(frozen=True)
class Steps:
    """The steps of a round. A step is called again if it was stopped."""

    make_pairs: Callable[[str, Path, int], Mapping[str, Any] | None]  # (model, file, round) -> facts about labels
    train: Callable[[str, str, Path, Path], None]  # (start, reference, data, folder of the model)
    evaluate: Callable[[str], dict[str, float]]  # (model) -> metrics


def iterate(plan: Plan, output: Path, steps: Steps, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs the unfinished rounds, and returns the metrics of all rounds. Round 0 is the start.

    Args:
        settings: further settings that the results depend on. They must not change between runs in one folder.
    Raises:
        ValueError: the plan cannot work, the folder belongs to another plan, or another process is at work in it.
    """
    plan.check()
    with locked(output, "output_dir"):
        return _iterate(plan, output, steps, settings)


def _iterate(plan: Plan, output: Path, steps: Steps, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    path, now = output / PLAN_FILE, as_stored({**asdict(plan), **settings})
    if path.is_file():
        check_same(read_json(path), now, path, "use another output_dir", may_differ=("num_rounds",))
    write_json(path, now)
    history = []
    for number in range(plan.num_rounds + 1):
        folder = output / f"round_{number}"
        manifest = read_json(folder / MANIFEST)
        if number > 0:
            _train_round(plan, output, number, manifest, steps)
        if "metrics" not in manifest:
            manifest["metrics"] = steps.evaluate(model_of(plan, output, number))
            write_json(folder / MANIFEST, manifest)
        history.append({"round": number, **manifest.get("labels", {}), **manifest["metrics"]})
    return history


def model_of(plan: Plan, output: Path, number: int) -> str:
    """The model after a round: a folder, or the start for round 0."""
    return plan.model if number == 0 else str(output / f"round_{number}" / "model")


def _train_round(plan: Plan, output: Path, number: int, manifest: dict[str, Any], steps: Steps) -> None:
    folder = output / f"round_{number}"
    last = model_of(plan, output, number - 1)
    start = plan.model if plan.start == "first" else last
    reference = plan.model if plan.reference == "keep" else last
    if "pairs" not in manifest:
        folder.mkdir(parents=True, exist_ok=True)
        manifest["labels"] = dict(steps.make_pairs(last, folder / "pairs.jsonl", number) or {})
        manifest["pairs"] = sum(1 for _ in _lines(folder / "pairs.jsonl"))
        write_json(folder / MANIFEST, manifest)
    if "trained" not in manifest:
        data = _with_replay(plan, output, number)
        steps.train(start, reference, data, folder / "model")
        manifest["trained"] = {"start": start, "reference": reference, "rows": sum(1 for _ in _lines(data))}
        write_json(folder / MANIFEST, manifest)


def _with_replay(plan: Plan, output: Path, number: int) -> Path:
    """The file to train on, with the round's pairs and rows of earlier rounds."""
    own = output / f"round_{number}" / "pairs.jsonl"
    earlier = [line for n in range(1, number) for line in _lines(output / f"round_{n}" / "pairs.jsonl")]
    if plan.replay == "none" or not earlier:
        return own
    if plan.replay != "all" and int(plan.replay) < len(earlier):
        earlier = random.Random(plan.seed + number).sample(earlier, int(plan.replay))
    path = own.with_name("train.jsonl")
    write_whole(path, "".join([*_lines(own), *earlier]))
    return path


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def win_rate(scores: Sequence[float | None], start_scores: Sequence[float | None]) -> float:
    """The share of prompts whose response scores above the start's. A tie or a missing score counts half."""
    wins = [
        0.5 if a is None or b is None or a == b else float(a > b) for a, b in zip(scores, start_scores, strict=True)
    ]
    return sum(wins) / len(wins)
