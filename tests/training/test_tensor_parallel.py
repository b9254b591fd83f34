"""A model that is cut over processes, layers and LM head, trains as on one process."""

import pytest
import torch
from like_one import assert_evaluates_like_one, assert_runs_like_one
from parallel_record import MODES as MODES_OF_TABLE
from parallel_record import refuses, works
from peft import PeftModel
from processes import on_processes
from safetensors.torch import load_file
from sharded_runs import share_by_formula
from tensor_parallel_runs import run, train
from test_fsdp import MODES as MODES_OF_FSDP
from tiny import make_llama, save_model
from transformers import AutoModelForCausalLM, Trainer

from fastdpo import DPOConfig
from fastdpo.training.memory.cluster.layouts import Layout
from fastdpo.training.setup.tensor_parallel import check_not_resumed

pytestmark = pytest.mark.skipif(
    not hasattr(Trainer, "_sync_replicated_trainable_parameters"),
    reason="this transformers does not train models that are cut when they are loaded",
)

MODES = ("clipped", "tied embeddings", "LoRA on every layer, micro-batches", "qwen3-moe")
MORE_MODES = (
    *(mode for mode in MODES_OF_FSDP if mode not in (*MODES, "tiles, checkpointing")),
    "given by name",
    "cut when loaded",
    "stream",
    "AdamW",
    "vocabulary that does not divide",
    "biases",
    "qwen3, accumulation",
    "qwen3, micro-batches",
    "qwen3-moe, balanced",
)
# a balance of experts over a group's rows is another one than over all rows
MODES_OF_TWO_GROUPS = [mode for mode in (*MODES, *MORE_MODES, "uneven pairs") if mode != "qwen3-moe, balanced"]
REFUSED = {
    "heads": ({"model": "one key head"}, "tensor_parallel_size must divide num_key_value_heads, which is 1"),
    "adapter": ({"model": "a model with an adapter"}, "model must be without an adapter if tensor_parallel_size is 2"),
    "start": ({"peft_config": "LoRA, PiSSA"}, "init_lora_weights must be one of"),
    "whole head": ({"peft_config": "LoRA, whole head"}, "modules_to_save must be unset with tensor_parallel_size=2"),
    "embeddings": ({"peft_config": "LoRA on embeddings"}, "target_modules must name linear layers"),
    "groups": ({"tensor_parallel_size": 3}, "tensor_parallel_size must divide the number of processes, got 3 on 2"),
    "resuming": ({"save_strategy": "steps"}, "save_only_model must be True (or save_strategy 'no')"),
    "checkpoint": ({"resume_from_checkpoint": "runs/checkpoint-2"}, "resume_from_checkpoint must be off with"),
    "free memory": (
        {"max_tokens_per_microbatch": "auto"},
        "max_tokens_per_microbatch must be a number with tensor_parallel_size=2, got 'auto'",
    ),
    "samples": ({"num_eval_samples": 2}, "num_eval_samples must be 0 under FSDP, DeepSpeed and tensor parallelism"),
    "moving": ({"sync_ref_model": True}, "sync_ref_model must be off under FSDP, DeepSpeed and tensor parallelism"),
    # of --accelerate_config fsdp2, which leaves `fsdp` of the settings off
    "accelerate's FSDP": (
        {"environment": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}},
        "tensor_parallel_size must be 1 with an accelerate config for FSDP, got 2: start with --accelerate_config tp",
    ),
}
_FULL = ("full weights", "shared prompts", "frozen reference")
IN_TABLE = {
    "resuming": "resuming",
    "free memory": "micro-batches by free memory",
    "samples": "num_eval_samples",
    "moving": "sync_ref_model",
}
FEATURES = {  # of the table in docs/scaling.md, of the modes that it does not know
    "clipped": _FULL,
    "LoRA on every layer, micro-batches": ("LoRA on the head", "LoRA, micro-batches"),
    "qwen3, accumulation": (*_FULL, "accumulation"),
    "qwen3, micro-batches": (*_FULL, "uneven micro-batches"),
    "uneven pairs": ("uneven pairs", "fewer rows than processes"),  # 9 rows: in the last step one group has none
}


def trained(modes, num_processes=2, steps=1, **more):
    return [
        {"what": "train", "mode": mode, "steps": steps, "cut_over": 2, "num_processes": num_processes, **more}
        for mode in modes
    ]


def features(mode):
    """What a mode shows, as the table names it."""
    return FEATURES.get(mode, (mode,) if mode in MODES_OF_TABLE else _FULL)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    cases = trained(MODES)
    cases[0]["evaluates"] = True
    refusals = [{"what": "refusal", **settings} for settings, _ in REFUSED.values()]
    found = on_processes(run, [*cases, *refusals], folder)
    results = {mode: (folder / str(number), found[number]) for number, mode in enumerate(MODES)}
    return results | dict(zip(REFUSED, found[len(MODES) :], strict=True))


def assert_like_one(mode, folder, results, own_folder, steps, **more):
    own_folder.mkdir()
    one = train(own_folder, mode, steps, **more)
    assert_runs_like_one(folder, results, own_folder, one, steps, has_repeated_rows=mode == "uneven pairs")
    return one


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_of_one_process(mode, of_two, tmp_path):
    folder, results = of_two[mode]
    with works("TP", *features(mode), processes=2, steps=1):
        assert_like_one(mode, folder, results, tmp_path / "one", 1)
    assert [process["head_rows"] for process in results] == [16, 16]  # of 32
    assert all(process["num_cut"] > 0 for process in results)


def test_a_process_holds_its_part_of_a_frozen_reference(of_two):
    share = share_by_formula(Layout("TP 2", tensor=2))
    assert [process["share_of_reference"] for process in of_two["clipped"][1]] == [pytest.approx(share)] * 2


def test_an_evaluation_is_that_of_one_process(of_two, tmp_path):
    results = of_two[MODES[0]][1]
    with works("TP", "evaluation", processes=2, steps=1):
        assert_evaluates_like_one(results, train(tmp_path, MODES[0], evaluates=True))
        for process in results:
            assert "x 1 groups of 2 processes)" in process["evaluation"]["summary"]
            assert "not estimated for a model that is cut over processes" in process["evaluation"]["summary"]


def test_the_saved_model_is_whole(of_two):
    folder, _ = of_two["clipped"]
    saved = AutoModelForCausalLM.from_pretrained(folder / "saved").state_dict()
    for name, weight in load_file(folder / "after0").items():
        assert torch.equal(saved[name], weight), name


def test_the_saved_adapter_is_whole(of_two):
    folder, _ = of_two["LoRA on every layer, micro-batches"]
    saved = dict(PeftModel.from_pretrained(make_llama(), folder / "saved").named_parameters())
    for name, weight in load_file(folder / "after0").items():
        assert torch.equal(saved[name], weight), name


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_work_is_refused_by_name(case, of_two):
    for message in of_two[case]:
        assert message.startswith(REFUSED[case][1]), message
    if case in IN_TABLE:
        refuses("TP", IN_TABLE[case], REFUSED[case][1])


def test_a_size_must_be_a_count(tmp_path):
    with pytest.raises(ValueError, match="tensor_parallel_size must be an integer >= 1, got 0"):
        DPOConfig(str(tmp_path), tensor_parallel_size=0)


def test_going_on_from_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="resume_from_checkpoint must be None with tensor_parallel_size, got 'here'"):
        check_not_resumed("here")


@pytest.mark.slow
def test_other_settings_after_five_steps(tmp_path):
    modes = (*MODES, *MORE_MODES)
    save_model(tmp_path / "model")
    found = on_processes(run, trained(modes, steps=5), tmp_path)
    for number, (mode, results) in enumerate(zip(modes, found, strict=True)):
        with works("TP", *features(mode), processes=2, steps=5):
            assert_like_one(mode, tmp_path / str(number), results, tmp_path / f"one {mode}", 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "modes",
    [MODES_OF_TWO_GROUPS[start : start + 5] for start in range(0, len(MODES_OF_TWO_GROUPS), 5)],
    ids=lambda modes: modes[0],
)
def test_two_groups_that_shard_their_parts_too(modes, tmp_path):
    """In a few modes at a time: each makes a dozen process groups, whose threads stay until its processes end."""
    save_model(tmp_path / "model")
    cases = trained(modes, 4, steps=5)
    cases[0]["evaluates"] = evaluates = modes[0] == MODES[0]
    found = on_processes(run, cases, tmp_path, 4)
    share = share_by_formula(Layout("TP 2 x FSDP2", shards=2, tensor=2))
    for mode, number, results in zip(modes, range(len(modes)), found, strict=True):
        more = {"evaluates": evaluates and number == 0}
        with works("FSDP2 x TP", *features(mode), *["evaluation"] * more["evaluates"], processes=4, steps=5):
            one = assert_like_one(mode, tmp_path / str(number), results, tmp_path / f"one {mode}", 5, **more)
            if more["evaluates"]:
                assert_evaluates_like_one(results, one)
        if mode in ("clipped", "frozen reference"):  # a copy of the policy, and one that is given
            assert [process["share_of_reference"] for process in results] == [pytest.approx(share)] * 4, mode
