"""Datasets with one comparison a row.

In: rows with the columns that PAIRS lists. Out: pairs. Refused with BadRow: ties, a Reddit pair of nearly equal scores.
"""

from __future__ import annotations

from fastdpo.data.forms.adapters.building import assistant, better_first, transcript_messages, user
from fastdpo.data.forms.answers import preferred
from fastdpo.data.forms.columns import Cells
from fastdpo.data.forms.context import Context
from fastdpo.data.forms.messages import as_messages
from fastdpo.data.forms.pairs import explicit_prompt, implicit_prompt
from fastdpo.data.forms.text import HUMAN_TURN
from fastdpo.data.values import BadRow, Example, RowFormat, as_text
from fastdpo.types import PreferenceRow

SHP_LEAST_RATIO = 2.0  # of the scores of two comments, as in the DPO release and by SHP's authors


def hh(example: Cells) -> PreferenceRow:
    """Anthropic/hh-rlhf as text, the same as in the original DPO release."""
    if not as_text(example["chosen"], "response").lstrip().startswith(HUMAN_TURN.lstrip()):
        raise BadRow("not a transcript of Human: and Assistant:")
    return implicit_prompt(example)


def hh_chat(example: Example) -> PreferenceRow:
    """Anthropic/hh-rlhf as messages, for models with a chat template."""
    return preferred(Context(), *([transcript_messages(example[side])] for side in ("chosen", "rejected")))


def shp(example: Example) -> PreferenceRow:
    """stanfordnlp/SHP: two Reddit comments; `labels` is 1 where A is better. Scores must differ by a factor of 2."""
    scores = [max(float(example[name] or 0), 1.0) for name in ("score_A", "score_B")]
    if max(scores) / min(scores) < SHP_LEAST_RATIO:
        raise BadRow("score ratio below 2")
    lead = {1: 1, 0: -1}.get(example["labels"], 0)
    return better_first([user(example["history"])], example["human_ref_A"], example["human_ref_B"], lead)


def stack_exchange_paired(example: Example) -> PreferenceRow:
    """lvwerra/stack-exchange-paired: `response_j` has more votes than `response_k`."""
    return PreferenceRow(
        [user(example["question"])], (assistant(example["response_j"]), assistant(example["response_k"]))
    )


def tldr(example: Example) -> PreferenceRow:
    """openai/summarize_from_feedback, comparisons, as text: Reddit posts and articles end in "TL;DR:"."""
    info, summaries, choice = example["info"], example["summaries"], example["choice"]
    if choice not in (0, 1) or not isinstance(summaries, list) or len(summaries) != 2:
        raise BadRow("choice does not name one of the two summaries")
    if info.get("post"):
        prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
    else:
        title = f"Title: {info['title']}\n\n" if info.get("title") else ""
        prompt = f"{title}Article: {as_text(info.get('article'), 'prompt')}\n\nTL;DR:"
    texts = [" " + as_text(summary["text"], "response").strip() for summary in summaries]
    return PreferenceRow(prompt, (texts[choice], texts[1 - choice]))


def helpsteer_preference(example: Example) -> PreferenceRow:
    """nvidia/HelpSteer2, preferences: a negative strength means that the first response is better."""
    return better_first(
        helpsteer_prompt(example["prompt"]),
        example["response_1"],
        example["response_2"],
        -example["preference_strength"],
    )


def helpsteer3(example: Example) -> PreferenceRow:
    """nvidia/HelpSteer3, preferences: a conversation and two responses; negative means that the first is better."""
    context = as_messages(example["context"], "user", "prompt")
    return better_first(context, example["response1"], example["response2"], -example["overall_preference"])


def helpsteer_prompt(prompt: object) -> list[dict[str, object]]:
    """HelpSteer2 writes further turns into the prompt: "...\\n<extra_id_1>Assistant\\n...\\n<extra_id_1>User\\n..."."""
    first, *turns = as_text(prompt, "prompt").split("<extra_id_1>")
    messages = [user(first.strip())]
    for turn in turns:
        speaker, _, said = turn.partition("\n")
        messages.append({"role": "assistant" if speaker.strip() == "Assistant" else "user", "content": said.strip()})
    return [message for message in messages if message["content"]]


def has_task_and_pair(cells: Cells) -> bool:
    return cells.has("instruction", "chosen", "rejected")


_ORIGINALS = ("original_chosen", "original_rejected")

PAIRS = (
    RowFormat("hh", ("chosen", "rejected"), hh, by_name_only=True),  # unnamed, they are read as `implicit`: the same
    RowFormat("hh_chat", ("chosen", "rejected"), hh_chat, by_name_only=True),
    RowFormat(
        "shp",
        ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"),
        shp,
        further=("post_id", "domain", "upvote_ratio", "c_root_id_A", "c_root_id_B", "seconds_difference"),
        may_be_transcript=True,
    ),
    RowFormat(
        "stack_exchange",
        ("question", "response_j", "response_k"),
        stack_exchange_paired,
        further=("qid", "date", "metadata"),
        may_be_transcript=True,
    ),
    RowFormat("tldr", ("info", "summaries", "choice"), tldr, further=("worker", "batch", "split", "extra")),
    RowFormat(
        "helpsteer",
        ("prompt", "response_1", "response_2", "preference_strength"),
        helpsteer_preference,
        further=(
            *("split", "preference_statement", "preference_elaboration", "three_most_similar_preferences"),
            "all_preferences_unprocessed",
        ),
        may_be_transcript=True,
    ),
    RowFormat(
        "helpsteer",
        ("context", "response1", "response2", "overall_preference"),
        helpsteer3,
        further=("individual_preference",),
        may_be_transcript=True,
    ),
    RowFormat(  # also LLaMA-Factory's Alpaca-like pairs, and Axolotl's chatml.argilla
        "llms_from_scratch",
        ("instruction", "chosen", "rejected"),
        explicit_prompt,
        further=("input", "system", "history", "output"),
        recognizes=has_task_and_pair,
    ),
    # Intel/orca_dpo_pairs; argilla's distilabel version calls the question `input`, HuggingFaceH4's answers in whole
    # conversations
    RowFormat(
        "orca",
        ("question", "chosen", "rejected"),
        explicit_prompt,
        further=("system",),
        may_be_transcript=True,
    ),
    RowFormat(
        "orca",
        ("input", "chosen", "rejected"),
        explicit_prompt,
        signature=("system",),
        further=(*("generations", "order", "labelling_prompt", "raw_labelling_response"), *_ORIGINALS),
        may_be_transcript=True,
    ),
    RowFormat("ultrafeedback_binarized", ("prompt", "chosen", "rejected"), explicit_prompt, by_name_only=True),
    # LLaMA-Factory's v1: two whole conversations, content in parts. The common start counts, not `loss_weight`.
    RowFormat("llama_factory", ("chosen_messages", "rejected_messages"), implicit_prompt),
    RowFormat("llama_factory", ("conversations", "chosen", "rejected"), explicit_prompt),
)
