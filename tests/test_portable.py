"""The combinations of `make test-portable`: they are what they say, and a test that hangs on an order of sums fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from closeness import assert_as_exact, assert_gradients_as_exact, assert_same_to_rounding, without_ties
from portable import COMBINATIONS, COUNTS_BYTES, IN_CI, NUMERIC, QUICK, Outcome, environment_of, report

TESTS = Path(__file__).parent


@pytest.mark.parametrize("part", [*NUMERIC, *QUICK, *COUNTS_BYTES])
def test_the_parts_of_the_suite_exist(part):
    assert (TESTS / part).exists()


def test_every_combination_has_a_name_and_changes_what_it_says():
    named = {combination.name: combination for combination in COMBINATIONS}
    assert len(named) == len(COMBINATIONS)
    assert named["as it is"].environment == {}
    assert named[IN_CI].environment["FASTDPO_TEST_SUMS"] == "other"
    for combination in COMBINATIONS:
        assert ("2 threads" in combination.name) == (combination.num_threads == 2)
        environment = environment_of(combination)
        assert environment.items() >= combination.environment.items()
        assert environment["OMP_NUM_THREADS"] == environment["FASTDPO_TEST_THREADS"] == str(combination.num_threads)


def test_those_that_run_by_default_cover_every_value_and_both_numbers_of_threads():
    usual = [combination for combination in COMBINATIONS if not combination.each]
    values = {item for combination in usual for item in combination.environment.items()}
    assert values >= {("ATEN_CPU_CAPABILITY", "default"), ("ATEN_CPU_CAPABILITY", "avx2")}
    assert values >= {("ONEDNN_MAX_CPU_ISA", "AVX2"), ("ONEDNN_MAX_CPU_ISA", "SSE41")}
    assert values >= {("MKL_ENABLE_INSTRUCTIONS", "AVX2"), ("MKL_CBWR", "AVX2"), ("MKL_CBWR", "COMPATIBLE")}
    assert values >= {item for combination in COMBINATIONS for item in combination.environment.items()}
    assert {combination.num_threads for combination in usual} == {1, 2}


PROGRAM = """
import torch
g = torch.Generator().manual_seed(0)
a, b, c = (torch.randn(*shape, generator=g) for shape in ((5, 300), (300, 70), (70,)))
before = [a @ b, torch.addmm(c, a, b), torch.bmm(a[None], b[None])[0], torch.nn.functional.linear(a, b.T, c)]
import other_sums
after = [a @ b, torch.addmm(c, a, b), torch.bmm(a[None], b[None])[0], torch.nn.functional.linear(a, b.T, c)]
for one, other in zip(before, after):
    assert not torch.equal(one, other)
    assert (one - other).norm() < 1e-6 * one.norm()
assert torch.equal(a @ b, a @ b)
few = [a[:num] @ b for num in range(1, 5)]
assert not all(torch.equal(rows, after[0][: len(rows)]) for rows in few)  # a row hangs on how many others there are
leaf = a.clone().requires_grad_()
(leaf @ b).square().sum().backward()
assert (leaf.grad - 2 * (a @ b) @ b.T).norm() < 1e-6 * leaf.grad.norm()
"""


def test_other_sums_are_the_same_products_in_other_bits():
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def outcome(names=("a", "b"), failed=(), passed=2, index=0):
    from collections import Counter

    return Outcome(COMBINATIONS[index], "0/21", Counter(passed=passed), sorted(names), list(failed), 1.0)


def test_a_failure_other_names_and_no_test_at_all_are_not_green(capsys):
    assert report([outcome(), outcome(index=1)]) == 0
    assert "2 tests:" in capsys.readouterr().out
    assert report([outcome(), outcome(failed=["a"], index=1)]) == 1
    assert report([outcome(names=()), outcome(names=(), index=1)]) == 1
    assert report([outcome(passed=0)]) == 1
    assert report([outcome(), outcome(names=("a", "c"), index=1)]) == 1
    assert "other tests than under as it is:\nb\nc" in capsys.readouterr().out


def test_comparisons_take_rounding_and_no_mistake():
    import torch

    exact = torch.linspace(1, 2, 50, dtype=torch.float64)
    plain = exact.float()
    assert_as_exact([plain], [plain], [exact])
    assert_same_to_rounding([plain * (1 + 1e-6)], [plain])
    assert_gradients_as_exact({"w": plain}, {"w": plain}, {"w": exact})
    wrong = plain + 1e-4 * (torch.arange(50) == 7)
    with pytest.raises(AssertionError, match="number 0 is off by 1"):
        assert_as_exact([wrong], [plain], [exact])
    with pytest.raises(AssertionError, match="tensor 0 is off by 1"):
        assert_same_to_rounding([wrong], [plain])
    with pytest.raises(AssertionError, match="w is off by"):
        assert_gradients_as_exact({"w": wrong}, {"w": plain}, {"w": exact})
    with pytest.raises(AssertionError, match="no number at other places"):
        assert_same_to_rounding([plain.where(torch.arange(50) != 3, torch.nan)], [plain])


def test_only_accuracies_of_margins_that_are_rounding_are_left_out():
    entry = {
        "rewards/margins": 1e-8,
        "rewards/accuracies": 0.5,
        "eval_rewards/margins": 0.2,
        "eval_rewards/accuracies": 1.0,
    }
    assert without_ties(entry) == {key: value for key, value in entry.items() if key != "rewards/accuracies"}
