"""Datasets with several ranked answers to a prompt: each prompt becomes one group and is computed once.

In: rows with the columns that GROUPS lists. Out: groups in which every answer is preferred to all lower-ranked ones.
If a row of the file is a tree of messages or a single answer, `regroup` first builds rows of the form `ranked`.
Refused with BadRow: a prompt without a better and a worse answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastdpo.data.forms.adapters.building import assistant, html_text, ranked_answers, transcript_messages, user
from fastdpo.data.forms.adapters.pairs import helpsteer_prompt
from fastdpo.data.forms.columns import Cells
from fastdpo.data.forms.rankings import has_ranking, ranked
from fastdpo.data.values import BadRow, Example, RowFormat, as_text
from fastdpo.types import Message, PreferenceRow

STACK_EXCHANGE_ANSWERS = 5  # most answers to a question
_FINE_GRAINED_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # the order of its column `preference`


def stack_exchange(example: Example) -> PreferenceRow:
    """HuggingFaceH4/stack-exchange-preferences: answers as HTML, ranked by `pm_score`, a logarithm of their votes.

    From a question with more than five answers, five are taken, evenly spread from best to worst. They make at most ten
    pairs, as many as StackLLaMA (Beeching et al. 2023) takes per question; thirty answers would make 435.
    """
    answers = example["answers"]
    row = ranked_answers(
        [user(html_text(example["question"]))],
        [html_text(answer["text"]) for answer in answers],
        [answer["pm_score"] for answer in answers],
    )
    last = len(row.responses) - 1
    if last < STACK_EXCHANGE_ANSWERS:
        return row
    return _with_only(row, [round(i * last / (STACK_EXCHANGE_ANSWERS - 1)) for i in range(STACK_EXCHANGE_ANSWERS)])


def ultrafeedback(example: Example) -> PreferenceRow:
    """openbmb/UltraFeedback: four completions, ranked by the mean of their ratings (`fine-grained_score`).

    `overall_score` is not used, because some 10s in it were recorded as 1s. The system prompts of single completions
    are dropped, as in the binarized releases.
    """
    completions = example["completions"]
    return ranked_answers(
        [user(example["instruction"])],
        [completion["response"] for completion in completions],
        [completion["fine-grained_score"] for completion in completions],
    )


def _has_fine_grained_scores(cells: Cells) -> bool:
    """Completions with ratings of its own; others, with a score or a rank, are `ranked`."""
    if not {"instruction", "completions"} <= cells.keys():
        return False
    completions = cells.peek("completions")
    first = completions[0] if isinstance(completions, list) and completions else None
    return not has_ranking(cells) or (isinstance(first, dict) and "fine-grained_score" in first)


def nectar(example: Example) -> PreferenceRow:
    """berkeley-nest/Nectar: seven answers with ranks from 1, the best; the prompt is a transcript."""
    answers = example["answers"]
    prompt = transcript_messages(example["prompt"])
    return ranked_answers(prompt, [a["answer"] for a in answers], [-a["rank"] for a in answers])


def fine_grained_rlhf(example: Example) -> PreferenceRow:
    """FineGrainedRLHF, question answering: four predictions and a preference for each pair of them, 0 for a tie.

    The prompt is the passages, then the question.
    """
    passages = [" ".join(_without_title(passage)) for passage in example["passages"]]
    responses = tuple(assistant(example[f"prediction {i}"]) for i in (1, 2, 3, 4))
    choices = example["preference"]
    if len(choices) != len(_FINE_GRAINED_PAIRS):
        raise BadRow("preference does not hold one choice for each pair of the four predictions")
    pairs = []
    for (first, second), choice in zip(_FINE_GRAINED_PAIRS, choices, strict=True):
        if choice in (1, 2) and responses[first] != responses[second]:
            pairs.append((first, second) if choice == 1 else (second, first))
    if not pairs:
        raise BadRow("no response is better than another")
    prompt = "\n\n".join([*passages, as_text(example["question"], "prompt")])
    row = PreferenceRow([user(prompt)], responses, tuple(pairs))
    return _with_only(row, sorted({index for pair in pairs for index in pair}))


def _with_only(row: PreferenceRow, kept: Sequence[int]) -> PreferenceRow:
    """The group reduced to the given responses, in the given order, and the preferences between them."""
    place = {old: new for new, old in enumerate(kept)}
    preferences = tuple((place[a], place[b]) for a, b in row.preferences if a in place and b in place)
    return PreferenceRow(row.prompt, tuple(row.responses[index] for index in kept), preferences)


def _without_title(passage: list[str]) -> list[str]:
    """A passage is its title and its sentences, the first of which begins with the title again."""
    return passage[1:] if len(passage) > 1 and passage[1].startswith(passage[0]) else passage


def open_assistant_trees(trees: Iterable[Example]) -> Iterator[Example]:
    """One row for every message with two or more ranked assistant answers, with the conversation up to it."""
    for tree in trees:
        yield from _answered(tree["prompt"], [])


def _answered(message: Any, before: list[Message]) -> Iterator[Example]:
    role = "assistant" if message["role"] == "assistant" else "user"
    messages = [*before, {"role": role, "content": message["text"]}]
    replies = [reply for reply in message.get("replies") or [] if not reply.get("deleted")]
    answers = [r for r in replies if r["role"] == "assistant" and r.get("rank") is not None]
    if role == "user" and len(answers) > 1:
        yield {
            "prompt": messages,
            "responses": [answer["text"] for answer in answers],
            "scores": [-answer["rank"] for answer in answers],  # rank 0 is the best
        }
    for reply in replies:
        yield from _answered(reply, messages)


def open_assistant_messages(rows: Iterable[Example]) -> Iterator[Example]:
    """OpenAssistant/oasst1 and oasst2: rebuilds the trees from rows of one message each."""
    messages = {row["message_id"]: {**row, "replies": []} for row in rows}
    roots: list[dict[str, Any]] = []
    for message in messages.values():
        parent = messages.get(message["parent_id"])
        (roots if parent is None else parent["replies"]).append(message)
    return open_assistant_trees({"prompt": root} for root in roots if not root.get("parent_id"))


def helpsteer_answers(rows: Iterable[Example]) -> Iterator[Example]:
    """nvidia/HelpSteer and HelpSteer2: one answer a row, several rows a prompt, ranked by `helpfulness`."""
    answers_of: dict[Any, list[Example]] = {}
    for row in rows:
        answers_of.setdefault(row["prompt"], []).append(row)
    for prompt, answers in answers_of.items():
        yield {
            "prompt": helpsteer_prompt(prompt) if isinstance(prompt, str) else prompt,
            "responses": [answer["response"] for answer in answers],
            "scores": [answer["helpfulness"] for answer in answers],
        }


GROUPS = (
    RowFormat("stack_exchange", ("question", "answers"), stack_exchange, signature=("qid",), may_be_transcript=True),
    RowFormat(
        "ultrafeedback",
        ("instruction", "completions"),
        ultrafeedback,
        further=("correct_answers", "incorrect_answers"),
        may_be_transcript=True,
        recognizes=_has_fine_grained_scores,
    ),
    RowFormat("nectar", ("prompt", "answers"), nectar, signature=("num_responses", "turns"), may_be_transcript=True),
    RowFormat(
        "fine_grained_rlhf",
        ("question", "passages", *(f"prediction {i}" for i in (1, 2, 3, 4)), "preference"),
        fine_grained_rlhf,
        further=("gold", "feedback"),
        may_be_transcript=True,
    ),
    RowFormat(
        "open_assistant",
        ("message_tree_id", "prompt"),
        ranked,
        signature=("tree_state",),
        regroup=open_assistant_trees,
    ),
    RowFormat(
        "open_assistant",
        ("message_id", "parent_id", "text", "role", "rank"),
        ranked,
        further=("emojis", "detoxify", "labels", "synthetic", "deleted", "review_result", "tree_state"),
        regroup=open_assistant_messages,
    ),
    RowFormat(
        "helpsteer",
        ("prompt", "response", "helpfulness"),
        ranked,
        signature=("correctness", "coherence", "complexity", "verbosity"),
        regroup=helpsteer_answers,
    ),
)
