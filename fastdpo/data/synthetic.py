"""Synthetic reviews with a known true reward, for experiments whose correct result can be computed.

In: a seed and counts. Out: prompts (review openings, train and held-out ones disjoint), responses (continuations drawn
from a grammar), the true reward of any text in nats, and Bradley-Terry preference rows. Equal seeds give equal texts on
any machine. The true reward depends only on the text, so it also scores the output of a model. Refused with
ValueError: counts larger than the grammar allows.

The setting follows the controlled-sentiment experiment of the DPO paper (arXiv 2305.18290, section 6), which uses IMDb
reviews and a sentiment classifier in place of our grammar and word valences.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

REWARD_SCALE = 4.0  # nats of true reward per unit of mean valence

_WORDS_BY_VALENCE: dict[float, str] = {
    1.0: "wonderful superb brilliant outstanding magnificent excellent fantastic perfect amazing exceptional",
    0.7: "great lovely delightful charming impressive beautiful memorable splendid terrific enjoyable",
    0.4: "good nice pleasant solid likeable decent comfortable fresh welcoming satisfying",
    0.0: "ordinary typical average plain usual standard familiar simple unremarkable conventional",
    -0.4: "weak dull bland slow tired forgettable noisy awkward stale uneven",
    -0.7: "bad poor boring unpleasant disappointing messy tedious gloomy careless annoying",
    -1.0: "terrible awful dreadful horrible appalling disgusting miserable atrocious hopeless unbearable",
}
VALENCES: dict[str, float] = {word: v for v, words in _WORDS_BY_VALENCE.items() for word in words.split()}
MODIFIERS: dict[str, float] = {
    "somewhat": 0.5, "rather": 0.75, "quite": 1.0, "really": 1.25, "very": 1.25, "truly": 1.5, "utterly": 1.5,
    "not": -0.5,
}  # fmt: skip


@dataclass(frozen=True)
class _Topic:
    """One kind of reviewed place or thing."""

    visits: tuple[str, ...]  # "We stayed at"
    things: tuple[str, ...]  # "the small hotel"
    times: tuple[str, ...]  # "last summer"
    aspects: tuple[str, ...]  # subjects of opinions, such as "the room"
    facts: tuple[str, ...]  # sentences without any opinion


_TOPICS = (
    _Topic(
        ("We stayed at", "I spent two nights at", "My family visited", "We booked", "I finally tried",
         "Our group chose"),
        ("the small hotel", "the new guesthouse", "the old inn", "the hotel by the river", "the mountain lodge",
         "the hotel near the station", "the seaside resort", "the city hostel"),
        ("last summer", "in March", "over the holidays", "for a wedding", "on our way north", "after a long flight"),
        ("the room", "the bed", "the breakfast", "the view", "the staff", "the garden", "the pool", "the lobby"),
        ("We arrived in the evening.", "Breakfast starts at seven.", "The station is ten minutes away.",
         "There are forty rooms.", "We paid at the front desk.", "The lift goes to the fifth floor."),
    ),
    _Topic(
        ("We had dinner at", "I met a friend at", "We ate at", "My sister took us to", "I ordered lunch from",
         "We tried"),
        ("the Italian restaurant", "the corner bistro", "the noodle bar", "the fish place", "the old tavern",
         "the harbour cafe", "the vegetarian kitchen", "the village bakery"),
        ("on Friday", "for my birthday", "after the concert", "last week", "with the children", "on a rainy day"),
        ("the soup", "the bread", "the dessert", "the service", "the waiter", "the wine", "the sauce", "the menu"),
        ("We sat near the window.", "The kitchen closes at ten.", "We ordered three courses.",
         "The bill came to sixty euros.", "There was a table for six.", "They also sell coffee."),
    ),
    _Topic(
        ("I watched", "We saw", "My brother picked", "I rented", "Our class discussed", "We finished"),
        ("the new thriller", "the space drama", "the French comedy", "the war film", "the animated film",
         "the road movie", "the ghost story", "the courtroom drama"),
        ("on Sunday", "at the festival", "on the train", "last night", "with my parents", "at the old cinema"),
        ("the plot", "the acting", "the music", "the ending", "the dialogue", "the camera work", "the cast",
         "the opening"),
        ("It runs for two hours.", "It was made in Spain.", "It is based on a novel.",
         "The story starts in a small town.", "It came out in autumn.", "We watched it with subtitles."),
    ),
)  # fmt: skip
_LINKS = ("was", "seemed", "felt")
_SUMMARIES = ("Overall it was", "All in all it was", "In the end it was", "The whole thing felt")


def true_reward(response: str) -> float:
    """Reward of a text in nats: REWARD_SCALE times the mean valence of its opinion words, 0.0 if it has none.

    An opinion is a word of VALENCES; a preceding word of MODIFIERS multiplies its value: "not good" counts -0.5 * 0.4.
    The mean makes the reward independent of length: a longer review with the same opinions has the same reward.
    """
    opinions = []
    factor = 1.0
    for word in re.findall(r"[a-z]+", response.lower()):
        if word in VALENCES:
            opinions.append(factor * VALENCES[word])
        factor = MODIFIERS.get(word, 1.0)
    return REWARD_SCALE * sum(opinions) / len(opinions) if opinions else 0.0


def review_prompts(num_train: int, num_heldout: int, seed: int) -> tuple[list[str], list[str]]:
    """Distinct review openings in random order: (train, held-out), with no prompt in both."""
    openings = [
        f"{visit} {thing} {time}. {aspect[0].upper()}{aspect[1:]}"
        for topic in _TOPICS
        for visit, thing, time, aspect in itertools.product(topic.visits, topic.things, topic.times, topic.aspects)
    ]
    if num_train < 0 or num_heldout < 0 or num_train + num_heldout > len(openings):
        raise ValueError(
            f"num_train + num_heldout must lie in [0, {len(openings)}], the number of distinct openings, "
            f"got {num_train} + {num_heldout}"
        )
    chosen = random.Random(f"prompts {seed}").sample(openings, num_train + num_heldout)
    return chosen[:num_train], chosen[num_train:]


def _opinion(rng: random.Random, mood: float) -> str:
    """Adjective, perhaps with a modifier; mood in [-1, 1] shifts which valence is likely."""
    levels = list(_WORDS_BY_VALENCE)
    valence = rng.choices(levels, [math.exp(1.5 * mood * level) for level in levels])[0]
    word = rng.choice(_WORDS_BY_VALENCE[valence].split())
    return f"{rng.choice(list(MODIFIERS))} {word}" if rng.random() < 0.4 else word


def review_response(prompt: str, rng: random.Random) -> str:
    """One continuation of a review opening, with its leading space: opinions on its topic's aspects, perhaps a fact."""
    topic = next((t for t in _TOPICS if prompt.startswith(t.visits)), None)
    if topic is None:
        raise ValueError(f"prompt must be one of review_prompts, got {prompt!r}")
    mood = rng.uniform(-1, 1)
    first, second = rng.sample([a for a in topic.aspects if not prompt.lower().endswith(a)], 2)
    text = f" {rng.choice(_LINKS)} {_opinion(rng, mood)}"
    if rng.random() < 0.5:
        text += f" and {first} {rng.choice(_LINKS)} {_opinion(rng, mood)}"
    text += "."
    if rng.random() < 0.5:
        text += f" {rng.choice(topic.facts)}"
    if rng.random() < 0.5:
        text += f" {second[0].upper()}{second[1:]} {rng.choice(_LINKS)} {_opinion(rng, mood)}."
    return text + f" {rng.choice(_SUMMARIES)} {_opinion(rng, mood)}."


def bradley_terry_rows(
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    seed: int,
    *,
    reward_fn: Callable[[str], float] = true_reward,
) -> list[dict[str, str]]:
    """Preference rows (prompt, chosen, rejected): the first wins with probability sigmoid(r(first) - r(second)).

    Pairs of equal texts express no preference and are left out.
    """
    if not len(prompts) == len(first) == len(second):
        raise ValueError(
            f"prompts, first and second must have equal lengths, got {len(prompts)}, {len(first)} and {len(second)}"
        )
    rng = random.Random(f"labels {seed}")
    rows = []
    for prompt, a, b in zip(prompts, first, second, strict=True):
        if a == b:
            continue
        a_wins = rng.random() < 0.5 + 0.5 * math.tanh((reward_fn(a) - reward_fn(b)) / 2)  # sigmoid without overflow
        rows.append({"prompt": prompt, "chosen": a if a_wins else b, "rejected": b if a_wins else a})
    return rows


def review_pairs(prompts: Sequence[str], seed: int) -> list[dict[str, str]]:
    """Two grammar responses per prompt, labelled by Bradley-Terry from the true reward."""
    rng = random.Random(f"responses {seed}")
    first = [review_response(prompt, rng) for prompt in prompts]
    second = [review_response(prompt, rng) for prompt in prompts]
    return bradley_terry_rows(prompts, first, second, seed)
