"""Compares a run on several processes with the same run on one: logs, and how far each weight has moved."""

import pytest
from safetensors.torch import load_file

LOGGED = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy")


def moves(folder, rank=0):
    """By name, how far each weight has moved: with SGD the sum of the gradients."""
    before, after = (load_file(folder / f"{name}{rank}") for name in ("before", "after"))
    return {name: after[name].double() - before[name].double() for name in after}


def assert_runs_like_one(folder, results, own_folder, one, steps, *, has_repeated_rows=False):
    """`results` of each process and `one` are what `sharded_runs.train` returns, in these folders."""
    logs = results[0]["logs"]
    assert len(logs) == len(one["logs"]) == steps
    for found, expected in zip(logs, one["logs"], strict=True):
        if has_repeated_rows:  # which run on the process that has no others
            assert found["num_tokens"] >= expected["num_tokens"]
        else:
            assert found["num_tokens"] == expected["num_tokens"]
        for key in LOGGED:
            assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key
    expected = moves(own_folder)
    for rank in range(len(results)):
        found = moves(folder, rank)
        assert found.keys() == expected.keys()
        for name, move in expected.items():
            # weights near 1 that move by 1e-3 are rounded to fp32 twice
            rounding = 1e-7 * float(load_file(own_folder / "after0")[name].double().norm())
            assert float((found[name] - move).norm()) <= 1e-5 * float(move.norm()) + rounding, name
    assert any(float(move.norm()) > 0 for move in expected.values())


def assert_evaluates_like_one(results, one):
    """Metrics and log-probs of 7 rows, and how large the model is said to be when it is saved."""
    expected = one["evaluation"]
    assert len(expected["logps"]) == 7
    for process in results:
        assert process["evaluation"]["logps"] == pytest.approx(expected["logps"], rel=1e-5)
        assert process["evaluation"]["bytes_of_model"] == expected["bytes_of_model"]
        assert process["evaluation"]["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-5)
