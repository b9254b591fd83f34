"""DeepSpeed's ZeRO divides optimizer state, gradients and weights over processes, and changes no number.

DeepSpeed itself runs, on two processes of a CPU. Where it is not installed, these tests are skipped.
"""

from importlib import util

import pytest
import torch
from processes import on_processes
from safetensors.torch import load_file
from sharded_runs import train as train_one
from test_fsdp import LOGGED, MODES, moves
from transformers import AutoModelForCausalLM
from zero_runs import train

pytestmark = pytest.mark.skipif(util.find_spec("deepspeed") is None, reason="pip install 'fastdpo[deepspeed]'")

STAGES = (1, 2, 3)


def run_on_two(folder, modes, steps):
    """By mode and stage, the folder of the run and what both processes have seen."""
    keys = [(mode, stage) for mode in modes for stage in STAGES]
    cases = [{"mode": mode, "stage": stage, "steps": steps} for mode, stage in keys]
    found = on_processes(train, cases, folder)
    return {key: (folder / str(number), results) for number, (key, results) in enumerate(zip(keys, found, strict=True))}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return run_on_two(tmp_path_factory.mktemp("two"), (*MODES, "bf16"), 1)


@pytest.fixture(scope="module")
def of_two_after_five_steps(tmp_path_factory):
    return run_on_two(tmp_path_factory.mktemp("five"), MODES, 5)


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    """The run of one process, by mode and number of steps; every run happens once."""
    done = {}

    def run(mode, steps):
        if (mode, steps) not in done:
            folder = tmp_path_factory.mktemp("one")
            done[mode, steps] = folder, train_one(folder, mode, steps)
        return done[mode, steps]

    return run


def assert_like_one(found, expected, steps, stage):
    (folder, results), (own_folder, one) = found, expected
    num_divided = one["num_parameters"] if stage == 3 else 0
    assert [process["num_divided"] for process in results] == [num_divided] * 2
    assert len(results[0]["logs"]) == len(one["logs"]) == steps
    for log, log_of_one in zip(results[0]["logs"], one["logs"], strict=True):
        for key in LOGGED:
            assert log[key] == pytest.approx(log_of_one[key], rel=1e-5, abs=1e-5), key
    expected_moves = moves(own_folder)
    for rank in range(2):
        found_moves = moves(folder, rank)
        assert found_moves.keys() == expected_moves.keys()
        for name, move in expected_moves.items():
            # weights near 1 that move by 1e-3 are rounded to fp32 twice
            rounding = 1e-7 * float(load_file(own_folder / "after0")[name].double().norm())
            assert float((found_moves[name] - move).norm()) <= 1e-5 * float(move.norm()) + rounding, name
    assert any(float(move.norm()) > 0 for move in expected_moves.values())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_of_one_process(mode, stage, of_two, of_one):
    assert_like_one(of_two[mode, stage], of_one(mode, 1), 1, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", MODES)
def test_after_five_steps_too(mode, stage, of_two_after_five_steps, of_one):
    assert_like_one(of_two_after_five_steps[mode, stage], of_one(mode, 5), 5, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_log_probs_are_not_rounded_to_bf16(stage, of_two):
    _, (first, _) = of_two["bf16", stage]
    means = torch.tensor(first["logs"][0]["logps/chosen"] * 12)  # of 12 pairs
    assert means % 0.03125 != 0  # units in the last place of bf16 between 4 and 8


@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_model_is_whole(stage, of_two):
    folder, _ = of_two["cached reference", stage]
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()
    for name, weight in load_file(folder / "after0").items():
        assert torch.equal(saved[name], weight), name
