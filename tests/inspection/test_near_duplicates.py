"""Near duplicates by MinHash: what is like what, and what is not."""

import random

import numpy as np
import pytest
from peers import peer

from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.inspection import inspect_data
from fastdpo.inspection.near import SKETCH, NearDuplicates, jaccard, sketch
from fastdpo.inspection.source import Source

WORDS = [f"word{i}" for i in range(3000)]


def text(seed, num_words=120):
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def found(rows):
    peer("datasketch")
    near = NearDuplicates()
    for read in Source(rows, TokenizationSettings()).rows():
        near.add(read)
    return near.found


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_rows_that_differ_in_a_word_are_like_each_other():
    base = pair(text(0), text(1), text(2))
    changed = {**base, "chosen": base["chosen"].replace(base["chosen"].split()[50], "elsewhere")}
    assert found([base, pair(text(3), text(4), text(5)), changed]) == {2: 0}


def test_other_answers_to_one_prompt_and_one_answer_in_common_are_not_alike():
    prompt = text(0, 2000)  # a long one, beside which the answers are a small part of the row
    rows = [pair(prompt, text(i), text(i + 10)) for i in range(4)]
    rows += [pair(prompt, text(0), text(99)), pair(text(7), text(0), text(10))]
    rows.append(pair(prompt, text(10), text(0)))  # the first row's answers, preferred the other way
    assert found(rows) == {}


def test_short_texts_are_compared_whole():
    assert found([pair("2+2?", "4", "5"), pair("2+3?", "4", "5"), pair("2+2?", "4", "6")]) == {}
    assert found([pair("2+2?", "4", "5"), pair("2+2? ", "4 ", "5")]) == {1: 0}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_sketches_estimate_the_jaccard_similarity_of_sets(share):
    """Of 2,000 hashes a side, `share` of the union in common; the error of 128 samples is sqrt(s (1 - s) / 128)."""
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(40):
        union = np.unique(rng.integers(0, 2**32, 2000, dtype=np.uint32))
        both, rest = np.split(rng.permutation(union), [round(share * len(union))])
        sides = [np.sort(np.concatenate([both, rest[side::2]]))[:SKETCH] for side in (0, 1)]
        estimates.append(jaccard(*sides))
    error = (share * (1 - share) / SKETCH) ** 0.5
    assert abs(np.mean(estimates) - share) < 4 * error / 40**0.5
    assert np.std(estimates) < 1.5 * error


def test_a_text_that_repeats_itself_keeps_all_its_few_shingles():
    assert len(sketch(["abcdefghij" * 500])) == 10
    assert len(sketch([text(0, 5000)])) == SKETCH


def test_without_datasketch_the_check_is_skipped_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr("fastdpo.inspection.inspect.is_available", lambda: False)
    check = inspect_data([pair("Q", "a", "b")]).check("near duplicates")
    assert check.verdict == "skipped"
    assert 'pip install "fastdpo[data]"' in check.finding
