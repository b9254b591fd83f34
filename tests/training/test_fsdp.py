"""FSDP2 divides weights, gradients and optimizer state over processes, and changes no number."""

import pytest
import torch
from processes import on_processes
from safetensors.torch import load_file
from sharded_runs import resume, train
from transformers import AutoModelForCausalLM

MODES = (
    "cached reference",
    "frozen reference",
    "LoRA",
    "LoRA on the head",
    "LoRA, cached reference",
    "LoRA, checkpointing",
    "LoRA, micro-batches",
    "micro-batches",
    "accumulation",
    "checkpointing",
    "tied embeddings",
    "no reference, sft",
    "padded",
    "listwise",
    "tiles, checkpointing",
)
LOGGED = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy")


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def moves(folder, rank=0):
    """By name, how far each weight has moved: with SGD the sum of the gradients."""
    before, after = (load_file(folder / f"{name}{rank}") for name in ("before", "after"))
    return {name: after[name].double() - before[name].double() for name in after}


def run_on(num_processes, folder, modes, steps, num_copies=1):
    same = {"steps": steps, "num_processes": num_processes, "num_copies": num_copies}
    cases = [{"mode": mode, **same} for mode in modes]
    found = on_processes(train, cases, folder, num_processes)
    return {
        mode: (folder / str(number), results) for number, (mode, results) in enumerate(zip(modes, found, strict=True))
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return run_on(2, tmp_path_factory.mktemp("two"), (*MODES, "bf16"), 1)


@pytest.fixture(scope="module")
def of_four_after_five_steps(tmp_path_factory):
    return run_on(4, tmp_path_factory.mktemp("four"), MODES, 5)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    kinds = [
        (mode, kind) for mode in ("cached reference", "LoRA") for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
    ]
    cases = [{"mode": mode, "kind": kind} for mode, kind in kinds]
    return dict(zip(kinds, on_processes(resume, cases, tmp_path_factory.mktemp("resumed")), strict=True))


def assert_like_one(mode, folder, results, own_folder, steps):
    own_folder.mkdir()
    one = train(own_folder, mode, steps)
    assert [process["num_sharded"] for process in results] == [one["num_parameters"]] * len(results)
    assert one["num_sharded"] == 0
    logs = results[0]["logs"]
    assert len(logs) == len(one["logs"]) == steps
    for found, expected in zip(logs, one["logs"], strict=True):
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


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_of_one_process(mode, of_two, tmp_path):
    assert_like_one(mode, *of_two[mode], tmp_path / "one", 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_after_five_steps_on_four_processes_too(mode, of_four_after_five_steps, tmp_path):
    assert_like_one(mode, *of_four_after_five_steps[mode], tmp_path / "one", 5)


def test_log_probs_are_not_rounded_to_bf16(of_two):
    _, (first, _) = of_two["bf16"]
    for key in ("logps/chosen", "logps/rejected"):
        means = torch.tensor(first["logs"][0][key] * 12)  # of 12 pairs
        assert means % 0.03125 != 0, key  # units in the last place of bf16 between 4 and 8


@pytest.mark.slow
def test_two_copies_that_are_each_divided_over_two_processes_too(tmp_path):
    modes = ("cached reference", "LoRA", "LoRA, micro-batches")
    for mode, (folder, results) in run_on(4, tmp_path, modes, 2, num_copies=2).items():
        assert_like_one(mode, folder, results, tmp_path / f"one {mode}", 2)


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("mode", ["cached reference", "LoRA"])
def test_a_resumed_run_ends_in_the_same_weights(kind, mode, resumed):
    for weights, again in resumed[mode, kind]:  # the same computation, so the same bits
        assert weights == again


def test_the_saved_model_is_whole(of_two):
    folder, _ = of_two["cached reference"]
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()
    for name, weight in load_file(folder / "after0").items():
        assert torch.equal(saved[name], weight), name
