"""Finds rows that repeat, contradict or leak.

In: the facts of a survey. Out: row numbers, with the rows that they repeat or contradict. `checks` counts these rows,
and `clean` removes them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fastdpo.inspection.survey import Facts, Survey

Found = TypeVar("Found")
Graph = dict[int, set[int]]  # answer -> answers that it is preferred to


@dataclass(frozen=True)
class Contradiction:
    """Two answers to one prompt, each preferred to the other by some rows."""

    prompt: int
    answers: tuple[int, int]
    rows: tuple[int, ...]  # numbers of the rows that prefer the first answer
    others: tuple[int, ...]  # numbers of the rows that prefer the second answer


@dataclass(frozen=True)
class Cycle:
    """Answers to one prompt: each is preferred to the next one, and the last to the first."""

    prompt: int
    answers: tuple[int, ...]  # of the shortest cycle
    rows: tuple[int, ...]  # numbers of one row for each preference of that cycle
    edges: frozenset[tuple[int, int]]  # all preferences that lie on some cycle of these answers


def duplicates(rows: Iterable[Facts]) -> dict[int, int]:
    """Row -> the earlier row that it repeats: the same prompt, answers and preferences."""
    first: dict[tuple[int, frozenset[tuple[int, int]]], int] = {}
    found = {}
    for row in rows:
        earlier = first.setdefault((row.prompt, frozenset(row.edges)), row.number)
        if earlier != row.number:
            found[row.number] = earlier
    return found


def contradictions(rows: Iterable[Facts]) -> list[Contradiction]:
    """Preferences that rows hold in both directions. A row with several preferences can contradict itself."""
    holders = _holders(rows)
    found = []
    for (prompt, better, worse), numbers in holders.items():
        others = holders.get((prompt, worse, better))
        if others is not None and (numbers[0], better) < (others[0], worse):  # each once, in the first row's direction
            found.append(Contradiction(prompt, (better, worse), tuple(numbers), tuple(others)))
    return found


def cycles(rows: Iterable[Facts]) -> list[Cycle]:
    """Cycles of three or more answers, one for each group of answers that share cycles.

    Preferences with a direct contradiction are ignored here, because `contradictions` finds them.
    """
    holders = _holders(rows)
    of_prompt: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for prompt, better, worse in holders:
        if (prompt, worse, better) not in holders:
            of_prompt[prompt].append((better, worse))
    found = []
    for prompt, edges in of_prompt.items():
        if len(edges) < 3:
            continue
        graph: Graph = defaultdict(set)
        for better, worse in edges:
            graph[better].add(worse)
        for group in _on_cycles_together(graph):
            inside = frozenset(edge for edge in edges if edge[0] in group and edge[1] in group)
            answers = _shortest_cycle(graph, group)
            around = zip(answers, (*answers[1:], answers[0]), strict=True)
            numbers = tuple(holders[prompt, better, worse][0] for better, worse in around)
            found.append(Cycle(prompt, answers, numbers, inside))
    return found


def eval_prompts(train: Survey, evaluated: Survey) -> dict[int, int]:
    """Training row whose prompt is also in the evaluation data -> the first evaluation row with this prompt."""
    first: dict[int, int] = {}
    for row in evaluated.rows:
        first.setdefault(row.prompt, row.number)
    row_of = {train.prompts[key]: first[prompt] for key, prompt in evaluated.prompts.items() if key in train.prompts}
    return {row.number: row_of[row.prompt] for row in train.rows if row.prompt in row_of}


def outvoted_rows(rows: Sequence[Facts], found: Sequence[Contradiction]) -> dict[int, Contradiction]:
    """Rows that lose all of their preferences to contradictions.

    The side of a contradiction that more rows hold is kept; if both sides have equally many rows, neither is. A row
    with several preferences is kept if at least one of them is.
    """
    lost: dict[tuple[int, int, int], Contradiction] = {}
    for one in found:
        first, second = one.answers
        if len(one.rows) <= len(one.others):
            lost[one.prompt, first, second] = one
        if len(one.others) <= len(one.rows):
            lost[one.prompt, second, first] = one
    return _rows_without(rows, lost)


def cyclic_rows(rows: Sequence[Facts], found: Sequence[Cycle]) -> dict[int, Cycle]:
    """Rows whose preferences all lie on cycles."""
    return _rows_without(rows, {(cycle.prompt, *edge): cycle for cycle in found for edge in cycle.edges})


def _rows_without(rows: Iterable[Facts], lost: Mapping[tuple[int, int, int], Found]) -> dict[int, Found]:
    """Row whose preferences are all in `lost` -> the finding for its first preference."""
    found: dict[int, Found] = {}
    for row in rows:
        edges = [(row.prompt, better, worse) for better, worse in row.edges]
        if edges and all(edge in lost for edge in edges):
            found[row.number] = lost[edges[0]]
    return found


def _holders(rows: Iterable[Facts]) -> dict[tuple[int, int, int], list[int]]:
    """(prompt, better, worse) -> numbers of the rows with this preference, each once."""
    holders: dict[tuple[int, int, int], list[int]] = {}
    for row in rows:
        for better, worse in set(row.edges):
            if better != worse:
                holders.setdefault((row.prompt, better, worse), []).append(row.number)
    return holders


def _on_cycles_together(graph: Graph) -> list[set[int]]:
    """The strongly connected components with more than one answer. Tarjan 1972, without recursion."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    groups = []
    for root in list(graph):
        if root in index:
            continue
        work = [(root, iter(sorted(graph[root])))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            answer, worse = work[-1]
            for other in worse:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(sorted(graph.get(other, ())))))
                    break
                if other in on_stack:
                    low[answer] = min(low[answer], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[answer])
                if low[answer] == index[answer]:
                    group: set[int] = set()
                    while not group or answer not in group:
                        group.add(stack.pop())
                    on_stack -= group
                    if len(group) > 1:
                        groups.append(group)
    return groups


def _shortest_cycle(graph: Graph, group: set[int]) -> tuple[int, ...]:
    """The shortest cycle through an answer of the group, by breadth-first search."""
    best: tuple[int, ...] = ()
    for start in sorted(group):
        before: dict[int, int] = {}
        queue = deque([start])
        while queue and start not in before:
            answer = queue.popleft()
            for other in sorted(graph.get(answer, set()) & group):
                if other not in before:
                    before[other] = answer
                    queue.append(other)
        way = [start]
        while before[way[-1]] != start:
            way.append(before[way[-1]])
        if not best or len(way) < len(best):
            best = (start, *reversed(way[1:]))
    return best
