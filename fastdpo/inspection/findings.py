"""Which rows repeat, contradict or leak: from the facts of a survey to rows and the rows they go with.

The checks count what is found here, and `clean` removes it.
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
    """Two answers to one prompt that are preferred both ways."""

    prompt: int
    answers: tuple[int, int]
    rows: tuple[int, ...]  # numbers of the rows that prefer the first
    others: tuple[int, ...]  # of those that prefer the second


@dataclass(frozen=True)
class Cycle:
    """Answers to one prompt of which each is preferred to the next, and the last to the first."""

    prompt: int
    answers: tuple[int, ...]  # of the shortest cycle
    rows: tuple[int, ...]  # numbers of one row for each preference of that cycle
    edges: frozenset[tuple[int, int]]  # all preferences that lie on some cycle of these answers


def duplicates(rows: Iterable[Facts]) -> dict[int, int]:
    """Rows that repeat an earlier one, and that one: the same prompt, answers and preferences."""
    first: dict[tuple[int, frozenset[tuple[int, int]]], int] = {}
    found = {}
    for row in rows:
        earlier = first.setdefault((row.prompt, frozenset(row.edges)), row.number)
        if earlier != row.number:
            found[row.number] = earlier
    return found


def contradictions(rows: Iterable[Facts]) -> list[Contradiction]:
    """Preferences that some rows hold one way and some the other, a row of several preferences also by itself."""
    holders = _holders(rows)
    found = []
    for (prompt, better, worse), numbers in holders.items():
        others = holders.get((prompt, worse, better))
        if others is not None and (numbers[0], better) < (others[0], worse):  # each once, the first row's order first
            found.append(Contradiction(prompt, (better, worse), tuple(numbers), tuple(others)))
    return found


def cycles(rows: Iterable[Facts]) -> list[Cycle]:
    """Cycles of three answers or more, one for each group of answers that are on cycles together.

    Preferences that are contradicted outright are left aside: `contradictions` has them.
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
    """Rows of the training data whose prompt stands in the evaluation data, and the first row that has it there."""
    first: dict[int, int] = {}
    for row in evaluated.rows:
        first.setdefault(row.prompt, row.number)
    row_of = {train.prompts[key]: first[prompt] for key, prompt in evaluated.prompts.items() if key in train.prompts}
    return {row.number: row_of[row.prompt] for row in train.rows if row.prompt in row_of}


def outvoted_rows(rows: Sequence[Facts], found: Sequence[Contradiction]) -> dict[int, Contradiction]:
    """Rows all of whose preferences are contradicted by as many rows as hold them, or more.

    Of a contradiction the side that more rows hold stays; of equal sides neither does. A row of several preferences
    stays while one of them holds.
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
    """Rows all of whose preferences lie on cycles."""
    return _rows_without(rows, {(cycle.prompt, *edge): cycle for cycle in found for edge in cycle.edges})


def _rows_without(rows: Iterable[Facts], lost: Mapping[tuple[int, int, int], Found]) -> dict[int, Found]:
    """Rows none of whose preferences holds, and what the first of them is lost to."""
    found: dict[int, Found] = {}
    for row in rows:
        edges = [(row.prompt, better, worse) for better, worse in row.edges]
        if edges and all(edge in lost for edge in edges):
            found[row.number] = lost[edges[0]]
    return found


def _holders(rows: Iterable[Facts]) -> dict[tuple[int, int, int], list[int]]:
    """(prompt, better, worse) -> numbers of the rows that say so, each once."""
    holders: dict[tuple[int, int, int], list[int]] = {}
    for row in rows:
        for better, worse in set(row.edges):
            if better != worse:
                holders.setdefault((row.prompt, better, worse), []).append(row.number)
    return holders


def _on_cycles_together(graph: Graph) -> list[set[int]]:
    """The strongly connected components of more than one answer. Tarjan 1972, without recursion."""
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
    """The shortest way from an answer of the group back to it, by breadth-first search."""
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
