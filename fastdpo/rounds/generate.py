"""Makes preference data from a model's own responses: samples them, scores them with a judge, and pairs them.

In: a model, prompts, a judge. Out: rows of preferences, each with its source. Prompts are processed in chunks, and each
finished chunk is appended to a file, so that a stopped run can continue. A chunk's seed depends on its position only,
so a run gives the same samples whether it was stopped or not.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastdpo.alignment.chat import templated_ids
from fastdpo.data.forms.formats import sft_row
from fastdpo.data.tokens.chat.rendering import has_chat_template
from fastdpo.data.values import BadRow
from fastdpo.modeling.generation import generate_ids, special_ids
from fastdpo.rounds.endpoint import Counts, EndpointJudge
from fastdpo.rounds.judges import Judge, judged
from fastdpo.rounds.selection import (
    WAYS,
    Counted,
    balanced,
    choose_pairs,
    distinct,
    length_correlation,
)
from fastdpo.rounds.state import as_stored, check_same, digest
from fastdpo.rounds.vllm import VllmEngine
from fastdpo.training.callbacks.json_lines import append_lines, read_lines

Prompt = str | list[dict[str, Any]]
CHUNK = 32  # prompts between two saves
CHUNK_OF_VLLM = 256  # which samples from many prompts at a time


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    num_responses: int = 4
    max_new_tokens: int = 512
    temperature: float = 1.0
    batch_size: int = 32  # sequences generated at a time
    seed: int = 0
    chat_template_kwargs: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raises ValueError for values that cannot work."""
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_responses < 2:
            raise ValueError(f"num_responses must be at least 2 to make pairs, got {self.num_responses}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}: otherwise all responses are equal")


@dataclass(frozen=True)
class Pairing:
    """Which pairs become rows."""

    way: str = "best_worst"  # of WAYS
    margin: float = 0.0
    balance_lengths: bool = False

    def check(self) -> None:
        """Raises ValueError for values that cannot work."""
        if self.way not in WAYS:
            raise ValueError(f"pairs must be one of {', '.join(WAYS)}, got {self.way!r}")
        if self.margin < 0:
            raise ValueError(f"margin must be >= 0, got {self.margin}")
        if self.balance_lengths and self.way == "ranking":
            raise ValueError("balance_lengths must be off if pairs is 'ranking', got True: only pairs can be balanced")


@dataclass(frozen=True)
class Made:
    """The numbers of a run."""

    num_prompts: int
    num_rows: int
    counted: Counted
    correlation: float  # of length and score, over all responses
    agreement: float | None  # how often an endpoint's verdicts in both orders agree
    num_unread: int  # requests to an endpoint without a readable verdict
    num_cut: int  # responses of max_new_tokens without an EOS

    def as_facts(self) -> dict[str, Any]:
        """How biased the labels are, for a manifest."""
        share = self.counted.longer_chosen[0] if self.counted.lengths else None
        return {
            "ties": self.counted.num_ties,
            "duplicate_share": self.counted.num_duplicates / max(self.counted.num_responses, 1),
            "longer_chosen": share,
            "cut_share": self.num_cut / max(self.counted.num_responses, 1),
            "length_correlation": self.correlation,
            "order_agreement": self.agreement,
        }


def read_prompts(rows: Iterable[Mapping[str, Any]]) -> list[Prompt]:
    """The different prompts of rows, from a column `prompt` or from any form that fastdpo reads.

    Raises:
        ValueError: there are no prompts.
    """
    found: dict[str, Prompt] = {}
    for row in rows:
        prompt = row.get("prompt") if set(row) <= {"prompt", "system", "id"} else None
        if prompt is None:
            try:
                prompt = sft_row(row).prompt
            except BadRow:
                continue
        if prompt:
            found.setdefault(json.dumps(prompt, sort_keys=True), prompt)
    if not found:
        raise ValueError(
            "prompts must hold at least one prompt, in a column `prompt` or in a form that fastdpo reads, got none"
        )
    return list(found.values())


@dataclass(frozen=True)
class Drawn:
    """The responses to one prompt."""

    texts: list[str]
    num_cut: int  # those of max_new_tokens without an EOS


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Drawn]:
    """Samples `num_responses` texts for each prompt.

    Args:
        progress: called with the number of finished prompts.
    """
    drawn = sample_ids(model, tokenizer, prompts, sampling, seed, progress)
    eos_ids = set(model.eos_ids if isinstance(model, VllmEngine) else special_ids(model, tokenizer)[1])
    found = []
    for prompt, of in zip(prompts, drawn, strict=True):
        num_cut = sum(len(ids) >= sampling.max_new_tokens and ids[-1] not in eos_ids for ids in of)
        found.append(Drawn(as_texts(tokenizer, prompt, of), num_cut))
    return found


def as_texts(tokenizer: Any, prompt: Prompt, drawn: Sequence[list[int]]) -> list[str]:
    """Responses as text. A message loses the blanks at its ends; a continuation of text keeps them, because " is" and
    "is" are different tokens after the prompt."""
    texts = tokenizer.batch_decode(drawn, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return list(texts) if isinstance(prompt, str) else [text.strip() for text in texts]


def sample_ids(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[list[int]]]:
    """Samples `num_responses` responses for each prompt, as token ids. Prompts of similar length share a batch.

    Args:
        model: a causal LM, or vLLM's engine.
        progress: called with the number of finished prompts.
    """
    ids = [prompt_ids(tokenizer, prompt, sampling.chat_template_kwargs) for prompt in prompts]
    if isinstance(model, VllmEngine):
        return model.sample_ids(
            ids,
            num_responses=sampling.num_responses,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=seed,
        )
    order = sorted(range(len(prompts)), key=lambda i: len(ids[i]))
    repeated = [ids[i] for i in order for _ in range(sampling.num_responses)]
    pad_id, eos_ids = special_ids(model, tokenizer)
    answers = generate_ids(
        model,
        repeated,
        pad_id=pad_id,
        eos_ids=eos_ids,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        batch_size=sampling.batch_size,
        seed=seed,
        progress=lambda done: progress(done // sampling.num_responses),
    )
    found: list[list[list[int]]] = [[] for _ in prompts]
    for place, i in enumerate(order):
        found[i] = answers[place * sampling.num_responses : (place + 1) * sampling.num_responses]
    return found


def prompt_ids(tokenizer: Any, prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """The token ids of a prompt, after which the model generates its response.

    Args:
        template_kwargs: variables for the chat template.
    Raises:
        ValueError: the prompt is a list of messages, and the tokenizer has no chat template, or one that refuses it.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    check_prompts(tokenizer, [prompt])
    return templated_ids(tokenizer, prompt, template_kwargs)


def check_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if prompts are messages and the tokenizer has no chat template."""
    if not has_chat_template(tokenizer) and not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be text without a chat template, got messages; set one with --chat_template")


def generate_scored(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    judge: Judge | EndpointJudge,
    sampling: Sampling,
    path: Path,
    *,
    key: Mapping[str, Any],
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """One dict per prompt: `prompt`, `responses`, `scores`. Prompts that are already in `path` are not sampled again.

    Args:
        path: the file that finished chunks are appended to.
        key: identifies the run, together with the prompts and `sampling`.
        progress: called with the number of finished prompts.
    Raises:
        ValueError: `path` holds samples of another run, or a score is not a number.
    """
    settings = as_stored({**key, "prompts": digest(prompts), **asdict(sampling)})
    lines = read_lines(path)
    if lines:
        remedy = "delete the file or choose another output"
        check_same(lines[0].get("settings", {}), settings, path, remedy, may_differ=("batch_size",))
    head = [] if lines else [{"settings": settings}]  # written with the first chunk: a failure leaves no file
    done = {line["number"]: line for line in lines if "number" in line}
    size = CHUNK_OF_VLLM if isinstance(model, VllmEngine) else CHUNK
    for start in range(0, len(prompts), size):
        numbers = range(start, min(start + size, len(prompts)))
        if not all(number in done for number in numbers):
            chunk = [prompts[number] for number in numbers]
            seed, told = sampling.seed + start, functools.partial(_tell, progress, start)
            drawn = sample(model, tokenizer, chunk, sampling, seed, told)
            scored = _scored(judge, chunk, [of.texts for of in drawn])
            new = [
                {"number": number, "prompt": prompt, "responses": of.texts, "num_cut": of.num_cut, **of_prompt}
                for number, prompt, of, of_prompt in zip(numbers, chunk, drawn, scored, strict=True)
            ]
            append_lines(path, [*head, *new])
            head = []
            done |= {line["number"]: line for line in new}
        progress(numbers[-1] + 1)
    return [done[number] for number in range(len(prompts))]


def _tell(progress: Callable[[int], None], done_before: int, done: int) -> None:
    progress(done_before + done)


def _scored(
    judge: Judge | EndpointJudge, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    """For each prompt its `scores`; of an endpoint also how reliable it was (`verdicts`)."""
    if isinstance(judge, EndpointJudge):
        both = [judge.judged(shown(prompt), said) for prompt, said in zip(prompts, responses, strict=True)]
        return [{"scores": scores, "verdicts": asdict(counts)} for scores, counts in both]
    flat_prompts = [prompt for prompt, said in zip(prompts, responses, strict=True) for _ in said]
    flat = [as_completion(prompt, text) for prompt, said in zip(prompts, responses, strict=True) for text in said]
    scores = judged(judge, flat_prompts, flat)
    ends = list(itertools.accumulate(map(len, responses)))
    return [{"scores": scores[end - len(said) : end]} for end, said in zip(ends, responses, strict=True)]


def shown(prompt: Prompt) -> str:
    """A prompt as text for a judge."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def as_completion(prompt: Prompt, text: str) -> Any:
    """A response in the form of its prompt: a text, or a list with one message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def make_rows(
    scored: Sequence[Mapping[str, Any]], pairing: Pairing, source: Mapping[str, Any], seed: int = 0
) -> tuple[list[dict[str, Any]], Counted]:
    """Rows of preferences in the explicit or ranked form, and counts of responses and pairs.

    Args:
        scored: the result of `generate_scored`.
        source: keys that are added to each row.
    """
    rng, counted = random.Random(seed), Counted()
    rows: list[dict[str, Any]] = []
    lengths: list[tuple[int, int]] = []
    margins: list[float] = []
    for line in scored:
        of = distinct(line["responses"], line["scores"], counted)
        prompt = line["prompt"]
        if pairing.way == "ranking":
            if len(set(of.scores)) < 2:
                counted.num_prompts_without_pair += 1
                continue
            said = [as_completion(prompt, text) for text in of.responses]
            rows.append({"prompt": prompt, "responses": said, "scores": list(of.scores), **source})
            continue
        for better, worse in choose_pairs(of, pairing.way, pairing.margin, rng, counted):
            chosen, rejected = of.responses[better], of.responses[worse]
            lengths.append((len(chosen), len(rejected)))
            margins.append(of.scores[better] - of.scores[worse])
            sides = {"chosen": as_completion(prompt, chosen), "rejected": as_completion(prompt, rejected)}
            judged = {"score_chosen": of.scores[better], "score_rejected": of.scores[worse]}
            rows.append({"prompt": prompt, **sides, **judged, **source})
    kept = balanced(lengths, margins) if pairing.balance_lengths else list(range(len(lengths)))
    counted.num_balanced_away = len(lengths) - len(kept)
    counted.lengths = [lengths[i] for i in kept]
    return (rows if pairing.way == "ranking" else [rows[i] for i in kept]), counted


def source_of(
    model: str, judge: str, judge_model: str | None, sampling: Sampling, engine: str, **more: Any
) -> dict[str, Any]:
    """Where rows come from: keys that every row holds."""
    drawn = {name: value for name, value in asdict(sampling).items() if name != "batch_size" and value is not None}
    named = judge if judge_model is None else f"{judge} {judge_model}"
    return {"model": model, "judge": named, "sampling": {**drawn, "engine": engine}, **more}


def summary_of(scored: Sequence[Mapping[str, Any]], rows: Sequence[Any], counted: Counted) -> Made:
    """The numbers of a finished run."""
    both = [
        (float(len(text)), float(score))
        for line in scored
        for text, score in zip(line["responses"], line["scores"], strict=True)
        if score is not None
    ]
    correlation = length_correlation([length for length, _ in both], [score for _, score in both])
    counts = sum((Counts(**line["verdicts"]) for line in scored if "verdicts" in line), Counts())
    agreement = counts.agreement if counts.comparisons else None
    num_cut = sum(line.get("num_cut", 0) for line in scored)  # not in older files
    return Made(len(scored), len(rows), counted, correlation, agreement, counts.unread, num_cut)
