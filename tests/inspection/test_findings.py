"""Duplicates, contradictions, cycles and leaks, on rows that can be read and against a slow way to find them."""

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.inspection.findings import (
    contradictions,
    cycles,
    cyclic_rows,
    duplicates,
    eval_prompts,
    outvoted_rows,
)
from fastdpo.inspection.source import Source
from fastdpo.inspection.survey import survey_rows


def pair(chosen, rejected, prompt="Q"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def rows_of(examples):
    return survey_rows(Source(examples, TokenizationSettings()).rows()).rows


def test_a_row_repeats_another_only_in_prompt_answers_and_preference():
    rows = rows_of(
        [
            pair("a", "b"),
            pair("b", "a"),
            pair("a", "b", prompt="R"),
            pair("a", "b"),
            {"prompt": [{"role": "user", "content": " Q\n"}], "chosen": "a", "rejected": "b"},  # the same, as messages
            {"prompt": "Q", "responses": ["b", "a"], "scores": [1, 2]},  # the same, as a ranking
            pair("a ", "b"),
        ]
    )
    assert duplicates(rows) == {3: 0, 4: 0, 5: 0}


def test_a_prompt_with_other_tools_is_another_prompt():
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    messages = {"prompt": [{"role": "user", "content": "Q"}], "chosen": "a", "rejected": "b"}
    assert duplicates(rows_of([messages, {**messages, "tools": [tool]}, {**messages, "tools": [tool]}])) == {2: 1}


def test_contradictions_name_the_rows_of_both_sides():
    rows = rows_of([pair("a", "b"), pair("b", "a"), pair("a", "b"), pair("b", "a", prompt="R"), pair("a", "c")])
    (found,) = contradictions(rows)
    assert (found.rows, found.others) == ((0, 2), (1,))
    assert set(outvoted_rows(rows, [found])) == {1}  # two rows against one


def test_of_a_tie_neither_side_stays_and_a_row_with_another_preference_does():
    rows = rows_of(
        [
            pair("a", "b"),
            pair("b", "a"),
            {"prompt": "Q", "responses": ["b", "a", "c"], "scores": [3, 2, 1]},
            pair("a", "b"),
        ]
    )
    found = contradictions(rows)
    assert [(one.rows, one.others) for one in found] == [((0, 3), (1, 2))]
    assert set(outvoted_rows(rows, found)) == {0, 1, 3}  # row 2 also says b > c and a > c


def test_a_cycle_is_found_across_rows_and_shown_by_its_shortest_way():
    rows = rows_of(
        [
            pair("a", "b"),
            pair("b", "c"),
            pair("c", "d"),
            pair("d", "a"),
            pair("c", "a"),  # a > b > c > a is shorter than a > b > c > d > a
            pair("d", "e"),  # leads out of the cycle
            pair("a", "b", prompt="R"),
            pair("b", "c", prompt="R"),
            pair("a", "c", prompt="R"),
        ]
    )
    (cycle,) = cycles(rows)
    assert len(cycle.answers) == 3
    assert set(cycle.rows) == {0, 1, 4}
    assert set(cyclic_rows(rows, [cycle])) == {0, 1, 2, 3, 4}


def test_a_plain_contradiction_is_no_cycle():
    assert cycles(rows_of([pair("a", "b"), pair("b", "a"), pair("b", "c"), pair("c", "a")])) == []


def test_prompts_of_the_evaluation_data_are_found_in_text_and_in_messages():
    survey = survey_rows(Source([pair("a", "b"), pair("a", "b", "R"), pair("c", "d")], TokenizationSettings()).rows())
    held_out = [
        {"chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": c}], "rejected": r}
        for c, r in [("x", [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "y"}])]
    ]
    evaluated = survey_rows(Source([pair("a", "b", "S"), *held_out], TokenizationSettings()).rows())
    assert eval_prompts(survey, evaluated) == {0: 1, 2: 1}


def has_cycle(edges):
    """By trying every order of every three or more answers; edges that stand both ways are left out."""
    left = {edge for edge in edges if edge[::-1] not in edges}
    nodes = sorted({node for edge in left for node in edge})
    return any(
        all((order[i], order[(i + 1) % size]) in left for i in range(size))
        for size in range(3, len(nodes) + 1)
        for order in permutations(nodes, size)
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda e: e[0] != e[1]), max_size=10))
def test_cycles_are_those_that_trying_all_orders_finds(edges):
    rows = rows_of([pair("prompt", "other", "never"), *(pair(str(a), str(b)) for a, b in edges)])
    found = cycles(rows)
    assert bool(found) == has_cycle(set(edges))
    for cycle in found:
        around = zip(cycle.answers, (*cycle.answers[1:], cycle.answers[0]), strict=True)
        assert set(around) <= cycle.edges  # it is one
        of_row = {row.number: row.edges[0] for row in rows}
        assert [of_row[number][0] for number in cycle.rows] == list(cycle.answers)
    left = [row for row in rows if row.number not in cyclic_rows(rows, found)]
    assert cycles(left) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("PQ"), st.integers(0, 2), st.integers(0, 2)).filter(lambda e: e[1] != e[2])))
def test_what_cleaning_leaves_holds_no_contradiction(edges):
    rows = rows_of([pair("a", "b", "never"), *(pair(str(a), str(b), prompt) for prompt, a, b in edges)])
    lost = outvoted_rows(rows, contradictions(rows))
    left = [row for row in rows if row.number not in lost]
    assert contradictions(left) == []
    wins = {(prompt, a, b): edges.count((prompt, a, b)) for prompt, a, b in edges}
    expected = {i + 1 for i, (p, a, b) in enumerate(edges) if 0 < wins.get((p, b, a), 0) >= wins[p, a, b]}
    assert set(lost) == expected
