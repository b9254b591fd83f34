"""The head op with its vocabulary cut over processes is as exact as with all of it on one."""

import math

import pytest
import shard_processes
from processes import on_processes

ENGINES = ("tiled", "triton")
LOG_PROBS = [
    {"dtype": "fp32"},
    {"dtype": "bf16"},
    {"dtype": "fp16"},
    {"has_bias": True, "softcap": 4.0, "logit_scale": 1.5},
    {"dtype": "bf16", "has_bias": True, "softcap": 4.0, "logit_scale": 1.5},
    {"logit_std": 30.0},  # one token has nearly all the probability
    {"ignored": "all"},
    {"T": 0},
    {"frozen": True},
    {"frozen": True, "workspace_bytes": 5000},  # several chunks of rows
    {"dtype": "bf16", "frozen": True, "softcap": 5.0, "logit_std": 30.0},
]
LOSSES = [
    {},
    {"dtype": "bf16", "has_bias": True},
    {"softcap": 5.0, "logit_std": 8.0, "has_bias": True, "logit_scale": 0.5},
    {"workspace_bytes": 30000},  # chunks of one group
    {"workspace_bytes": 6000},  # no group fits: logits twice
    {"frozen": True},
    {"adapter": True},
    {"dtype": "bf16", "adapter": True, "workspace_bytes": 12000},
]
STATISTICS = [{}, {"has_bias": True, "softcap": 4.0}, {"has_bias": True, "masked": True}, {"logit_std": 30.0}]
IN_FP64 = [{"dtype": "fp64"}, {"dtype": "fp64", "has_bias": True, "softcap": 4.0}]
SENT = [
    {"V": V, "ignored": "none", "outputs": outputs}
    for V in (257, 514)
    for outputs in ([], ["entropy", "is_top1", "lse"])
]
SKIPPING = {"impl": "tiled", "skip_tolerance": 0.05, "logit_std": 12.0, "V": 1030, "dtype": "fp64"}


def cases(function, kinds, engines=ENGINES):
    return [{"function": function, "impl": impl, **kind} for impl in engines for kind in kinds]


EXACT = cases("log_probs", LOG_PROBS) + cases("pair_losses", LOSSES)
CASES = [
    *EXACT,
    *cases("statistics", STATISTICS),
    *cases("log_probs", IN_FP64, ["tiled"]),
    *cases("pair_losses", IN_FP64, ["tiled"]),
    *cases("bytes_sent", SENT),
    {"function": "log_probs", **SKIPPING},
    {"function": "refusals"},
]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """Results of CASES on two processes (257 ids: 129 and 128), as pairs with their cases."""
    found = on_processes(shard_processes.result_of, CASES, tmp_path_factory.mktemp("two"), 2)
    return list(zip(CASES, found, strict=True))


@pytest.fixture(scope="module")
def on_three(tmp_path_factory):
    """Results of EXACT on three processes (86, 86 and 85 ids)."""
    found = on_processes(shard_processes.result_of, EXACT, tmp_path_factory.mktemp("three"), 3)
    return list(zip(EXACT, found, strict=True))


def of(results, function, **wanted):
    """The case and the result of one process, for every process of every case of that kind."""
    for case, of_processes in results:
        if case["function"] == function and all(case.get(name) == value for name, value in wanted.items()):
            for result in of_processes:
                yield case, result


@pytest.mark.parametrize("function", ["log_probs", "pair_losses"])
@pytest.mark.parametrize("processes", ["on_two", pytest.param("on_three", marks=pytest.mark.slow)])
def test_numbers_and_gradients_are_as_exact_as_plain_pytorch(function, processes, request):
    num_results = 0
    for case, errors in of(request.getfixturevalue(processes), function, skip_tolerance=None):
        for name, (error, plain, norm) in errors.items():
            assert error <= 2 * plain + 1e-6 * norm, f"{case}: {name} is off by {error:.1e}, plain by {plain:.1e}"
            num_results += 1
    assert num_results > 60


@pytest.mark.parametrize("function", ["log_probs", "pair_losses"])
def test_in_fp64_nothing_but_rounding_differs(function, on_two):
    results = list(of(on_two, function, dtype="fp64", skip_tolerance=None))
    assert len(results) == 4
    for case, errors in results:
        for name, (error, _, norm) in errors.items():
            assert error <= 1e-13 * norm, (case, name)


def test_outputs_are_those_of_the_whole_vocabulary(on_two):
    results = list(of(on_two, "statistics"))
    assert len(results) == 16
    for case, errors in results:
        assert set(errors) == {"logps", "lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"}
        assert errors.pop("is_top1") == 0, case
        assert max(errors.values()) < 1e-4, (case, errors)


def test_skipped_probability_is_bounded_over_all_parts(on_two):
    for _, errors in of(on_two, "log_probs", skip_tolerance=0.05):
        assert errors["logps"][0] <= 1e-12 * errors["logps"][2]
        error, _, norm = errors["hidden_states"]
        assert 0 < error < 0.05 * norm


def test_processes_exchange_numbers_per_row_and_the_hidden_states_gradient(on_two):
    # eq. (20): each process hands over 4 k T bytes in forward and 4 T H in backward, whatever the vocabulary
    results = list(of(on_two, "bytes_sent"))
    assert len(results) == 16
    for case, (forward, backward) in results:
        numbers = 6 if case["outputs"] else 3
        assert forward == [["all_gather", 4 * numbers * 67]]
        assert backward == [["all_reduce", 4 * 67 * 40]]


def test_arguments_that_do_not_fit_are_refused(on_two):
    (_, first), (_, second) = of(on_two, "refusals")
    messages, sums = first
    assert "lm_head_weight must hold 5 of vocab_size=9 rows on process 0 of 2" in messages[0]
    assert messages[1] == "process_group must be a torch.distributed.ProcessGroup, got str"
    assert "with a process_group, got 'reference'" in messages[2]
    assert "vocab_size must be 4" in messages[3]
    assert "labels must lie in [0, 7)" in messages[4]
    assert sums == second[1] == pytest.approx([-2 * math.log(7), -3 * math.log(7)])
