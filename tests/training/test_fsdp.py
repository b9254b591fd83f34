"""FSDP2 divides weights, gradients and optimizer state over processes, and changes no number."""

import pytest
import torch
from like_one import assert_evaluates_like_one, assert_runs_like_one
from parallel_record import works
from processes import on_processes
from safetensors.torch import load_file
from sharded_runs import resume, share_by_formula, train
from transformers import AutoModelForCausalLM

from fastdpo.training.memory.cluster.layouts import Layout

MODES = (
    "cached reference",
    "frozen reference",
    "reference of another class",
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
# run by default; the others, which change less of what FSDP2 gathers and reduces, are slow
FEW = (
    "cached reference",
    "LoRA on the head",
    "LoRA, micro-batches",
    "accumulation",
    "tiles, checkpointing",
    "tied embeddings",
)
SLOW = tuple(mode for mode in MODES if mode not in FEW)
KINDS = [("cached reference", "SHARDED_STATE_DICT"), ("LoRA", "FULL_STATE_DICT")]
SLOW_KINDS = [("cached reference", "FULL_STATE_DICT"), ("LoRA", "SHARDED_STATE_DICT")]
EVALUATED = ("LoRA on the head", "tied embeddings", "frozen reference")
STEPS = {"uneven pairs": 5}  # of the modes that need more than one: to the end of an epoch and beyond


def run_on(num_processes, folder, modes, steps, **settings):
    same = {"num_processes": num_processes, **settings}
    cases = [
        {"mode": mode, "steps": max(steps, STEPS.get(mode, 1)), "evaluates": mode in EVALUATED, **same}
        for mode in modes
    ]
    found = on_processes(train, cases, folder, num_processes)
    return {
        mode: (folder / str(number), results) for number, (mode, results) in enumerate(zip(modes, found, strict=True))
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return run_on(2, tmp_path_factory.mktemp("two"), (*FEW, "uneven pairs", "bf16", "bf16, large vocabulary"), 1)


@pytest.fixture(scope="module")
def more_of_two(tmp_path_factory):
    return run_on(2, tmp_path_factory.mktemp("more"), SLOW, 1)


@pytest.fixture(scope="module")
def of_four_after_five_steps(tmp_path_factory):
    return run_on(4, tmp_path_factory.mktemp("four"), MODES, 5)


@pytest.fixture(scope="module")
def of_two_copies(tmp_path_factory):
    return run_on(4, tmp_path_factory.mktemp("copies"), (*MODES, "uneven pairs"), 5, num_copies=2)


def run_and_resume(kinds, folder):
    cases = [{"mode": mode, "kind": kind} for mode, kind in kinds]
    return dict(zip(kinds, on_processes(resume, cases, folder), strict=True))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    return run_and_resume(KINDS, tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="module")
def more_resumed(tmp_path_factory):
    return run_and_resume(SLOW_KINDS, tmp_path_factory.mktemp("more_resumed"))


def assert_like_one(mode, folder, results, own_folder, steps, is_sharded=True):
    own_folder.mkdir()
    one = train(own_folder, mode, steps)
    num_sharded = one["num_parameters"] if is_sharded else 0
    assert [process["num_sharded"] for process in results] == [num_sharded] * len(results)
    assert one["num_sharded"] == 0
    is_uneven = mode.startswith("uneven pairs")
    assert_runs_like_one(folder, results, own_folder, one, steps, has_repeated_rows=is_uneven)


@pytest.mark.parametrize("mode", FEW)
def test_losses_and_gradients_are_those_of_one_process(mode, of_two, tmp_path):
    with works("FSDP2", mode, processes=2, steps=1):
        assert_like_one(mode, *of_two[mode], tmp_path / "one", 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", SLOW)
def test_losses_and_gradients_of_more_modes_too(mode, more_of_two, tmp_path):
    with works("FSDP2", mode, processes=2, steps=1):
        assert_like_one(mode, *more_of_two[mode], tmp_path / "one", 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_after_five_steps_on_four_processes_too(mode, of_four_after_five_steps, tmp_path):
    with works("FSDP2", mode, processes=4, steps=5):
        assert_like_one(mode, *of_four_after_five_steps[mode], tmp_path / "one", 5)


def test_in_an_epochs_last_step_a_process_may_have_no_rows(of_two, tmp_path):
    """9 rows are steps of 4, 4 and 1; accelerate fills the last with rows of the first, which must not count again."""
    with works("FSDP2", "uneven pairs", "fewer rows than processes", processes=2, steps=5):
        assert_like_one("uneven pairs", *of_two["uneven pairs"], tmp_path / "one", 5)


@pytest.mark.parametrize("mode", EVALUATED[:2])
def test_an_evaluation_is_that_of_one_process(mode, of_two, tmp_path):
    with works("FSDP2", "evaluation", processes=2, steps=1):
        assert_evaluates_like_one(of_two[mode][1], train(tmp_path, mode, evaluates=True))


def test_log_probs_are_not_rounded_to_bf16(of_two):
    _, (first, _) = of_two["bf16"]
    for key in ("logps/chosen", "logps/rejected"):
        means = torch.tensor(first["logs"][0][key] * 12)  # of 12 pairs
        assert means % 0.03125 != 0, key  # units in the last place of bf16 between 4 and 8


def test_each_process_holds_its_share_of_a_frozen_reference(of_two):
    """Also after its forwards: nothing of it stays gathered."""
    share = share_by_formula(Layout("FSDP2", shards=2))
    for mode in ("accumulation", "tied embeddings", "tiles, checkpointing"):
        for process in of_two[mode][1]:
            assert process["share_of_reference"] == pytest.approx(share) == 0.5, mode


def test_no_process_holds_a_whole_fp32_gradient_of_the_head(of_two):
    """Its weight is gathered in bf16; the gradient is summed in fp32 block by block, and handed on in bf16."""
    for process in of_two["bf16, large vocabulary"][1]:
        assert process["num_heads_in"]["torch.bfloat16"] > 0
        assert process["num_heads_in"]["torch.float32"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_copies_that_are_each_divided_over_two_processes_too(mode, of_two_copies, tmp_path):
    folder, results = of_two_copies[mode]
    with works("HSDP", mode, processes=4, steps=5):
        assert_like_one(mode, folder, results, tmp_path / "one", 5)
    if mode == "frozen reference":
        share = share_by_formula(Layout("HSDP", shards=2, copies=2))
        assert [process["share_of_reference"] for process in results] == [pytest.approx(share)] * 4


@pytest.mark.slow
def test_copies_of_which_one_has_no_rows_in_an_epochs_last_step_too(of_two_copies, tmp_path):
    with works("HSDP", "uneven pairs", "fewer rows than processes", processes=4, steps=5):
        assert_like_one("uneven pairs", *of_two_copies["uneven pairs"], tmp_path / "one", 5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", EVALUATED)
def test_an_evaluation_of_two_copies_is_that_of_one_process(mode, of_two_copies, tmp_path):
    with works("HSDP", "evaluation", processes=4, steps=5):
        assert_evaluates_like_one(of_two_copies[mode][1], train(tmp_path, mode, 5, evaluates=True))


@pytest.mark.parametrize(("mode", "kind"), KINDS)
def test_a_resumed_run_ends_in_the_same_weights(mode, kind, resumed):
    with works("FSDP2", "resuming", processes=2, steps=4):
        for weights, again in resumed[mode, kind]:  # the same computation, so the same bits
            assert weights == again


@pytest.mark.slow
def test_a_resumed_run_of_two_copies_does_too(tmp_path):
    case = {"mode": "cached reference", "kind": "SHARDED_STATE_DICT", "num_processes": 4, "num_copies": 2}
    with works("HSDP", "resuming", processes=4, steps=4):
        for weights, again in on_processes(resume, [case], tmp_path, 4)[0]:
            assert weights == again


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "kind"), SLOW_KINDS)
def test_a_resumed_run_of_the_other_kind_of_checkpoint_does_too(mode, kind, more_resumed):
    for weights, again in more_resumed[mode, kind]:
        assert weights == again


def test_the_saved_model_is_whole(of_two):
    folder, _ = of_two["cached reference"]
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()
    for name, weight in load_file(folder / "after0").items():
        assert torch.equal(saved[name], weight), name
