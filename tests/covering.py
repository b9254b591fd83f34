"""Cases of a test with several parameters in which every value of one meets every value of any other, and no more.

A mistake that needs three settings at once is rare next to the time of a full product; where it is what a test looks
for (tests/modeling/test_every_combination.py), the product stands.

    @pytest.mark.parametrize(*every_pair(backend=("sdpa", "mask"), recomputed=(False, True), has_adapter=(False, True)))
"""

import itertools


def every_pair(**values):
    """Names and cases, as `pytest.mark.parametrize` takes them: the same ones in every run.

    Each case begins with the first pair of values that none has brought together yet; the other values are those that
    bring most new pairs into it, of equals the one that has met the others of the case least often.
    """
    names = list(values)
    if len(names) < 3:
        raise ValueError(f"values must be of three parameters or more, got {names}: of two, every pair is the product")
    sizes = [range(len(values[name])) for name in names]  # values may be unhashable: pairs are of their places
    items = [[(i, a) for a in size] for i, size in enumerate(sizes)]
    pairs = [pair for of, others in itertools.combinations(items, 2) for pair in itertools.product(of, others)]
    met = dict.fromkeys(pairs, 0)
    cases = []
    while first := next((pair for pair in pairs if met[pair] == 0), None):
        case = dict(first)
        for i in range(len(names)):
            if i not in case:
                case[i] = max(sizes[i], key=lambda a, i=i: _worth(case, (i, a), met))
        for pair in itertools.combinations(sorted(case.items()), 2):
            met[pair] += 1
        cases.append(tuple(values[name][case[i]] for i, name in enumerate(names)))
    return names, cases


def _worth(case, item, met):
    """How many pairs a value would bring together for the first time, and how often it has met the others, negative."""
    times = [met[tuple(sorted([other, item]))] for other in case.items()]
    return times.count(0), -sum(times)
