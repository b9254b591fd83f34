"""DeepSpeed's ZeRO divides optimizer state, gradients and weights over processes, and changes no number.

DeepSpeed itself runs, on two processes of a CPU. Where it is not installed, these tests are skipped.
"""

from importlib import util

import pytest
import torch
from like_one import assert_evaluates_like_one, assert_runs_like_one
from parallel_record import MODES as MODES_OF_TABLE
from parallel_record import refuses, works
from processes import on_processes
from safetensors.torch import load_file
from sharded_runs import settings_of
from sharded_runs import train as train_one
from tiny_runs import tiny_trainer
from transformers import AutoModelForCausalLM
from zero_runs import refused, resume, train

pytestmark = pytest.mark.skipif(util.find_spec("deepspeed") is None, reason="pip install 'fastdpo[deepspeed]'")

STAGES = (1, 2, 3)
MODES = [mode for mode in MODES_OF_TABLE if mode != "tiles, checkpointing"]  # ZeRO 3 refuses tiles
EVALUATED = ("frozen reference", "LoRA")
KIND = {stage: f"ZeRO {stage}" for stage in STAGES}
REFUSED = {  # by feature, the settings and how the error begins
    "micro-batches by free memory": (
        {"max_tokens_per_microbatch": "auto"},
        "max_tokens_per_microbatch must be a number with DeepSpeed",
    ),
    "num_eval_samples": ({"num_eval_samples": 2}, "num_eval_samples must be 0 under FSDP, DeepSpeed"),
    "sync_ref_model": ({"sync_ref_model": True}, "sync_ref_model must be off under FSDP, DeepSpeed"),
}


def run_on_two(function, folder, cases):
    return [(folder / str(n), found) for n, found in enumerate(on_processes(function, cases, folder))]


def of_modes(folder, modes, steps):
    """By mode and stage, the folder of the run and what both processes have seen."""
    keys = [(mode, stage) for mode in modes for stage in STAGES]
    cases = [
        {"mode": mode, "stage": stage, "steps": 5 if mode == "uneven pairs" else steps, "evaluates": mode in EVALUATED}
        for mode, stage in keys
    ]
    return dict(zip(keys, run_on_two(train, folder, cases), strict=True))


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return of_modes(tmp_path_factory.mktemp("two"), (*MODES, "uneven pairs", "bf16"), 1)


@pytest.fixture(scope="module")
def of_two_after_five_steps(tmp_path_factory):
    return of_modes(tmp_path_factory.mktemp("five"), MODES, 5)


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


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    keys = [(mode, stage) for mode in ("cached reference", "LoRA") for stage in STAGES]
    cases = [{"mode": mode, "stage": stage} for mode, stage in keys]
    return dict(zip(keys, run_on_two(resume, tmp_path_factory.mktemp("resumed"), cases), strict=True))


def assert_like_one(found, expected, steps, stage, *, has_repeated_rows=False):
    (folder, results), (own_folder, one) = found, expected
    num_divided = one["num_parameters"] if stage == 3 else 0
    assert [process["num_divided"] for process in results] == [num_divided] * 2
    assert_runs_like_one(folder, results, own_folder, one, steps, has_repeated_rows=has_repeated_rows)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_of_one_process(mode, stage, of_two, of_one):
    with works(KIND[stage], mode, processes=2, steps=1):
        assert_like_one(of_two[mode, stage], of_one(mode, 1), 1, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", MODES)
def test_after_five_steps_too(mode, stage, of_two_after_five_steps, of_one):
    with works(KIND[stage], mode, processes=2, steps=5):
        assert_like_one(of_two_after_five_steps[mode, stage], of_one(mode, 5), 5, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_in_an_epochs_last_step_a_process_may_have_no_rows(stage, of_two, of_one):
    with works(KIND[stage], "uneven pairs", "fewer rows than processes", processes=2, steps=5):
        found, expected = of_two["uneven pairs", stage], of_one("uneven pairs", 5)
        assert_like_one(found, expected, 5, stage, has_repeated_rows=True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", EVALUATED)
def test_an_evaluation_is_that_of_one_process(mode, stage, of_two, tmp_path):
    with works(KIND[stage], "evaluation", processes=2, steps=1):
        assert_evaluates_like_one(of_two[mode, stage][1], train_one(tmp_path, mode, evaluates=True))


@pytest.mark.parametrize("stage", STAGES)
def test_log_probs_are_not_rounded_to_bf16(stage, of_two):
    _, (first, _) = of_two["bf16", stage]
    means = torch.tensor(first["logs"][0]["logps/chosen"] * 12)  # of 12 pairs
    assert means % 0.03125 != 0  # units in the last place of bf16 between 4 and 8


@pytest.mark.parametrize("stage", STAGES)
def test_a_frozen_reference_is_divided_with_the_weights(stage, of_two):
    for mode in ("frozen reference", "checkpointing"):  # given, and a copy of the policy
        for process in of_two[mode, stage][1]:
            assert process["num_divided_of_reference"] == (process["num_parameters"] if stage == 3 else 0)


@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_model_is_whole(stage, of_two):
    folder, _ = of_two["cached reference", stage]
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()
    for name, weight in load_file(folder / "after0").items():
        assert torch.equal(saved[name], weight), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", ["cached reference", "LoRA"])
def test_a_resumed_run_ends_in_the_same_weights(mode, stage, resumed):
    with works(KIND[stage], "resuming", processes=2, steps=4):
        for weights, again in resumed[mode, stage][1]:  # the same computation, so the same bits
            assert weights == again


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_belongs_to_its_engine_and_number_of_processes(stage, resumed, tmp_path):
    checkpoint = resumed["LoRA", stage][0] / "a" / "checkpoint-2"
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=4, num_rows=20, **settings_of("LoRA", 1))
    words = "resume_from_checkpoint must come from a run with the same engine"
    with pytest.raises(ValueError, match=f"^{words}, got .* of DeepSpeed for one process or DDP"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    refuses(KIND[stage], "resuming on another number of processes", words)


def test_what_cannot_work_is_refused_by_name(tmp_path):
    cases = [{"stage": stage, "settings": settings} for stage in STAGES for settings, _ in REFUSED.values()]
    found = iter(on_processes(refused, cases, tmp_path))
    for stage in STAGES:
        for feature, (_, words) in REFUSED.items():
            for message in next(found):
                assert message.startswith(words)
            refuses(KIND[stage], feature, words)
