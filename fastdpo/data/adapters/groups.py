"""Datasets with several ranked answers to a prompt: each prompt becomes one group, which computes it once.

In: rows with the columns that GROUPS lists. Out: groups in which every answer is preferred to all that are ranked
lower. Where a row of the file is not a prompt, because it is a tree of them or one answer of several, `regroup` makes
rows of the form `ranked` first. Refused with BadRow: a prompt of which no answer is better than another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastdpo.data.adapters.building import assistant, html_text, ranked_answers, transcript_messages, user
from fastdpo.data.adapters.pairs import helpsteer_prompt
from fastdpo.data.forms import ranked
from fastdpo.data.values import BadRow, Example, RowFormat, as_text
from fastdpo.types import Message, PreferenceRow

_FINE_GRAINED_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # the order of its column `preference`


def stack_exchange(example: Example) -> PreferenceRow:
    """HuggingFaceH4/stack-exchange-preferences: answers as HTML, ranked by `pm_score`, a logarithm of their votes."""
    answers = example["answers"]
    return ranked_answers(
        [user(html_text(example["question"]))],
        [html_text(answer["text"]) for answer in answers],
        [answer["pm_score"] for answer in answers],
    )


def ultrafeedback(example: Example) -> PreferenceRow:
    """openbmb/UltraFeedback: four completions, ranked by the mean of their ratings (`fine-grained_score`).

    Not by `overall_score`, in which some 10s were recorded as 1s. The system prompts under which single completions
    were written are left out, as in its binarized releases.
    """
    completions = example["completions"]
    return ranked_answers(
        [user(example["instruction"])],
        [completion["response"] for completion in completions],
        [completion["fine-grained_score"] for completion in completions],
    )


def nectar(example: Example) -> PreferenceRow:
    """berkeley-nest/Nectar: seven answers with ranks from 1, the best; the prompt is a transcript."""
    answers = example["answers"]
    prompt = transcript_messages(example["prompt"])
    return ranked_answers(prompt, [a["answer"] for a in answers], [-a["rank"] for a in answers])


def fine_grained_rlhf(example: Example) -> PreferenceRow:
    """FineGrainedRLHF, question answering: four predictions and the preference of each two of them, 0 for a tie.

    The prompt is the question after the passages that it is to be answered from.
    """
    passages = [" ".join(_without_title(passage)) for passage in example["passages"]]
    responses = [assistant(example[f"prediction {i}"]) for i in (1, 2, 3, 4)]
    pairs = []
    for (first, second), choice in zip(_FINE_GRAINED_PAIRS, example["preference"], strict=True):
        if choice in (1, 2) and responses[first] != responses[second]:
            pairs.append((first, second) if choice == 1 else (second, first))
    if not pairs:
        raise BadRow("no response is better than another")
    place = {old: new for new, old in enumerate(sorted({index for pair in pairs for index in pair}))}
    prompt = "\n\n".join([*passages, as_text(example["question"], "prompt")])
    compared = tuple(responses[index] for index in place)
    return PreferenceRow([user(prompt)], compared, tuple((place[better], place[worse]) for better, worse in pairs))


def _without_title(passage: list[str]) -> list[str]:
    """A passage is its title and its sentences, the first of which begins with the title again."""
    return passage[1:] if len(passage) > 1 and passage[1].startswith(passage[0]) else passage


def open_assistant_trees(trees: Iterable[Example]) -> Iterator[Example]:
    """Every message of a tree to which two or more assistants' answers are ranked, with the conversation so far."""
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
    """OpenAssistant/oasst1 and oasst2 have one message a row, which here become trees again."""
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


def _regrouped(name: str, columns: tuple[str, ...], regroup: Any, signature: tuple[str, ...] = ()) -> list[RowFormat]:
    """The format of the file, and that of the rows that `regroup` makes of it."""
    rows = RowFormat(name, ("prompt", "responses", "scores"), ranked, by_name_only=True, may_be_transcript=True)
    return [RowFormat(name, columns, ranked, signature=signature, regroup=regroup), rows]


GROUPS = (
    RowFormat("stack_exchange", ("question", "answers"), stack_exchange, signature=("qid",), may_be_transcript=True),
    RowFormat("ultrafeedback", ("instruction", "completions"), ultrafeedback, may_be_transcript=True),
    RowFormat("nectar", ("prompt", "answers"), nectar, signature=("num_responses", "turns"), may_be_transcript=True),
    RowFormat(
        "fine_grained_rlhf",
        ("question", "passages", *(f"prediction {i}" for i in (1, 2, 3, 4)), "preference"),
        fine_grained_rlhf,
        may_be_transcript=True,
    ),
    *_regrouped("open_assistant", ("message_tree_id", "prompt"), open_assistant_trees, signature=("tree_state",)),
    *_regrouped("open_assistant", ("message_id", "parent_id", "text", "role", "rank"), open_assistant_messages),
    *_regrouped(
        "helpsteer",
        ("prompt", "response", "helpfulness"),
        helpsteer_answers,
        signature=("correctness", "coherence", "complexity", "verbosity"),
    ),
)
