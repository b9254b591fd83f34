"""The helper that takes the place of full products leaves out no pair of values."""

import itertools

import pytest
from covering import every_pair

VALUES = {"a": ["x", "y", "z"], "b": [1, 2], "c": [None, {}, 0.5, ()], "d": [False, True]}


def test_every_value_meets_every_value_of_any_other_parameter():
    names, cases = every_pair(**VALUES)
    assert names == ["a", "b", "c", "d"]
    for i, j in itertools.combinations(range(4), 2):
        met = [(case[i], case[j]) for case in cases]
        assert all(pair in met for pair in itertools.product(VALUES[names[i]], VALUES[names[j]])), (names[i], names[j])


@pytest.mark.parametrize(
    ("sizes", "fewest", "most"), [((4, 3, 2, 2), 12, 13), ((2,) * 6, 6, 8), ((3, 3, 3), 9, 11), ((5, 4, 4), 20, 22)]
)
def test_there_are_not_many_more_cases_than_the_two_largest_parameters_need(sizes, fewest, most):
    _, cases = every_pair(**{f"p{i}": range(size) for i, size in enumerate(sizes)})
    assert fewest <= len(cases) == len(set(cases)) <= most


def test_the_cases_are_the_same_each_time():
    assert every_pair(a="xy", b="pq", c="st") == (
        ["a", "b", "c"],
        [("x", "p", "s"), ("x", "q", "t"), ("y", "p", "t"), ("y", "q", "s")],
    )


def test_two_parameters_are_refused():
    with pytest.raises(ValueError, match=r"three parameters or more, got \['a', 'b'\]"):
        every_pair(a=[1], b=[2])
