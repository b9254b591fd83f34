"""Processes that compute packed rows together have the losses, gradients and metrics of one; they send what
docs/scaling.md says, and each keeps its part.
"""

import math

import pytest
from like_one import assert_runs_like_one
from memory_record import SHARES, keep
from parallel_record import refuses, works
from processes import on_processes
from sequence_runs import evaluate, run, sample
from sharded_runs import share_by_formula, train
from tiny_runs import tiny_config, tiny_trainer
from transformers import Trainer

from fastdpo import TokenizedPair, pack_pairs
from fastdpo.data.batches.shares import with_shares
from fastdpo.evidence.bad_batch import load_bad_batch
from fastdpo.training.callbacks.finite import save_bad_batch
from fastdpo.training.memory.cluster.layouts import Layout

MODES = ("LoRA, checkpointing", "micro-batches", "listwise")
SLOW_MODES = ("accumulation", "no reference, sft")  # of these after one step, too
MORE_MODES = (
    *SLOW_MODES,
    *("cached reference", "frozen reference", "LoRA", "LoRA on the head", "LoRA, cached reference"),
    *("LoRA, micro-batches", "checkpointing", "tied embeddings"),
)
# sinks; values narrower than keys
EXACT = ("gpt_oss", "deepseek_v3")
# windows; experts with a load-balancing loss; softcaps; a mask that carries the row; learned positions; chunks and
# queries scaled by position; ...
MORE_EXACT = (
    *("mistral", "qwen3_moe", "gemma2", "stablelm", "gpt2", "llama4_text", "gemma3_text", "phi3", "olmo2", "cohere2"),
    *("granite", "opt"),
)
THREE_KEY_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
REFUSED = {
    "mamba": "must be 1 for MambaForCausalLM, got 2: 2 x MambaMixer, .* mix tokens outside attention",
    "bloom": "must be 1 for BloomForCausalLM, got 2: its layers add masks to their own logits",
}
SIZES_REFUSED = {
    "three processes": ({"size": 3}, "sequence_parallel_size must divide the number of processes, 2, got 3: start 3"),
    "three heads": (
        {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 36},
        "sequence_parallel_size must divide the 3 attention heads of the model, got 2; nearest below: 1",
    ),
}
# heads of queries, of keys; lengths; the case. Heads of 64 / 4 = 16 numbers
SENT = (
    {"heads": (4, 2), "lengths": [(9, 14, 3), (2, 5, 21)], "outputs": ["entropy", "is_top1"]},
    {"heads": (4, 1), "lengths": [(9, 14, 3)], "autocast": True},
    {"heads": (4, 4), "lengths": [(3, 2, 2)], "checkpoints": True},
)


def on_two(cases, folder, num_processes=2):
    return dict(zip(cases, on_processes(run, list(cases.values()), folder, num_processes), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def of_two(folder):
    """What each of two processes has found, by the number of the folder and the case."""
    cases = {mode: {"what": "trains", "mode": mode} for mode in MODES}
    cases |= {"evaluates": {"what": "evaluates"}, "finds a leak": {"what": "finds a leak"}, "keeps": {"what": "keeps"}}
    cases |= {model_type: {"what": "is right for", "model_type": model_type} for model_type in EXACT}
    cases |= {"three key heads": {"what": "is right for", **THREE_KEY_HEADS}}
    cases |= {model_type: {"what": "refuses", "model_type": model_type} for model_type in REFUSED}
    cases |= {name: {"what": "refuses", **settings} for name, (settings, _) in SIZES_REFUSED.items()}
    cases |= {str(case["heads"]): {"what": "sends", **case} for case in SENT}
    found = on_two(cases, folder)
    return {name: (folder / str(number), results) for number, (name, results) in enumerate(found.items())}


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_are_those_of_one_process(mode, of_two, tmp_path):
    with works("SP", mode, processes=2):
        assert_runs_like_one(*of_two[mode], tmp_path, train(tmp_path, mode), 1)


@pytest.mark.parametrize("model_type", [*EXACT, "three key heads"])
def test_gradients_of_models_of_many_kinds_are_those_of_whole_rows(model_type, of_two):
    _, errors = of_two[model_type]
    assert all(error < 1e-12 for process in errors for error in process), errors


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_mix_tokens_outside_attention_are_refused_by_name(model_type, of_two):
    for message in of_two[model_type][1]:
        assert_matches(f"sequence_parallel_size {REFUSED[model_type]}", message)
        assert message.endswith("use gradient_checkpointing, FSDP2 or LoRA")


@pytest.mark.parametrize("name", SIZES_REFUSED)
def test_sizes_that_processes_or_heads_cannot_have_are_refused_on_all_of_them(name, of_two):
    for message in of_two[name][1]:
        assert_matches(SIZES_REFUSED[name][1], message)


def assert_matches(pattern, message):
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(message)


def test_a_model_whose_layers_look_past_the_own_part_is_found_out(of_two):
    for message in of_two["finds a leak"][1]:
        assert "tokens affect each other outside attention" in message


def test_evaluation_streams_and_epochs_count_every_row_once(of_two, tmp_path):
    one, (_, of_both) = evaluate(tmp_path, size=1), of_two["evaluates"]
    assert len(one["predictions"]) == 5
    with works("SP", "evaluation", processes=2):
        for found in of_both:
            assert found["predictions"] == pytest.approx(one["predictions"], rel=1e-5)
            for key in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_first_length"):
                assert found["eval"][key] == pytest.approx(one["eval"][key], abs=1e-5), key
    for found, expected in zip(of_both[0]["logs"], one["logs"], strict=True):
        for key in ("loss", "grad_norm", "num_tokens", "rewards/margins"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    padding = of_both[0]["seen"] - one["seen"]
    assert 0 <= padding <= 3  # of three steps, at most one token each


@pytest.mark.parametrize("case", SENT, ids=lambda case: str(case["heads"]))
def test_what_crosses_the_wire_is_what_the_formula_says(case, of_two):
    for found in of_two[str(case["heads"])][1]:
        T, R, (q, kv) = found["tokens"], found["rows"], case["heads"]
        N, L, D, K = 2, 2, 16, len(case.get("outputs", ()))
        kv = math.lcm(kv, N)
        itemsize = 2 if case.get("autocast") else 4
        layers = L * T * (N - 1) * 2 * (q + kv) * D * itemsize // N**2
        again = layers if case.get("checkpoints") else 0
        assert found["forward"] == {"exchanged": layers, "gathered": (N - 1) * (1 + K) * R * 4}
        assert found["backward"] == {"exchanged": layers + again + (N - 1) * R * 4}


def test_each_process_keeps_its_part_of_the_activations_as_the_estimate_says(of_two):
    for found in of_two["keeps"][1]:
        assert found["parts"] <= 0.55 * found["whole"]
        assert found["peak"] == pytest.approx(found["estimate"], rel=0.1)
    keep(SHARES, 2, kept=found["parts"], whole=found["whole"], peak=found["peak"], estimate=found["estimate"])


def test_a_batch_that_is_saved_for_debugging_is_one_that_a_single_process_runs(tmp_path):
    batch = with_shares(pack_pairs([TokenizedPair([1, 2, 3], [4, 5], [6])]), 2)
    save_bad_batch(tmp_path / "batch.pt", batch.asdict(), None, step=1, loss=math.nan, args=None)
    assert load_bad_batch(tmp_path / "batch.pt").batch.shares is None


def test_the_table_of_what_works_has_these_refusals(tmp_path):
    for feature, settings in {
        "padded rows": {"packing": "padded"},
        "micro-batches by free memory": {"max_tokens_per_microbatch": "auto"},
    }.items():
        with pytest.raises(ValueError, match="with sequence_parallel_size=2") as refusal:
            tiny_config(tmp_path, sequence_parallel_size=2, **settings)
        refuses("SP", feature, str(refusal.value))


# Slower: more modes and models, five steps, four processes


@pytest.fixture(scope="module")
def more_of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    cases = {mode: {"what": "trains", "mode": mode, "steps": 5} for mode in (*MODES, *MORE_MODES)}
    cases |= {(mode, 1): {"what": "trains", "mode": mode} for mode in SLOW_MODES}
    cases |= {model_type: {"what": "is right for", "model_type": model_type} for model_type in MORE_EXACT}
    cases |= {"lfm2": {"what": "refuses", "model_type": "lfm2"}, "samples": {"what": "samples"}}
    cases |= {"SP": {"what": "resumes", "mode": "cached reference"}}
    cases |= {"FSDP2 x SP": {"what": "resumes", "mode": "LoRA", "kind": "SHARDED_STATE_DICT"}}
    found = on_two(cases, folder)
    return {name: (folder / str(number), results) for number, (name, results) in enumerate(found.items())}


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    """Keys of two heads on four processes; two groups under DDP and under FSDP2."""
    folder = tmp_path_factory.mktemp("four")
    kinds = {"one group": {"size": 4}, "two groups": {"size": 2}, "FSDP2": {"size": 2, "shards": True}}
    cases = {
        (kind, mode): {"what": "trains", "mode": mode, "steps": 5, "num_processes": 4, **settings}
        for kind, settings in kinds.items()
        for mode in (*MODES, *MORE_MODES, "uneven pairs")
    }
    cases |= {"qwen3_moe": {"what": "is right for", "model_type": "qwen3_moe", "size": 4}}
    cases |= {"keeps": {"what": "keeps", "size": 4}}
    found = on_two(cases, folder, 4)
    return {name: (folder / str(number), results) for number, (name, results) in enumerate(found.items())}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MODES, *MORE_MODES])
def test_after_five_steps_too(mode, more_of_two, tmp_path):
    with works("SP", mode, processes=2, steps=5):
        assert_runs_like_one(*more_of_two[mode], tmp_path, train(tmp_path, mode, 5), 5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", SLOW_MODES)
def test_after_one_step_in_more_modes(mode, more_of_two, tmp_path):
    with works("SP", mode, processes=2):
        assert_runs_like_one(*more_of_two[mode, 1], tmp_path, train(tmp_path, mode), 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*MODES, *MORE_MODES, "uneven pairs"])
@pytest.mark.parametrize("kind", ["one group", "two groups", "FSDP2"])
def test_four_processes_train_like_one(kind, mode, of_four, tmp_path):
    folder, results = of_four[kind, mode]
    names = ("uneven pairs", "fewer rows than processes") if mode == "uneven pairs" else (mode,)
    repeats = mode == "uneven pairs" and kind != "one group"
    with works("FSDP2 x SP" if kind == "FSDP2" else "SP", *names, processes=4, steps=5):
        assert_runs_like_one(folder, results, tmp_path, train(tmp_path, mode, 5), 5, has_repeated_rows=repeats)
    assert [process["num_sharded"] > 0 for process in results] == [kind == "FSDP2"] * 4
    if mode in ("micro-batches", "frozen reference"):  # a copy of the policy, and one that is given
        share = share_by_formula(Layout("SP 2", sequence=2, **({"shards": 4} if kind == "FSDP2" else {"copies": 4})))
        assert [process["share_of_reference"] for process in results] == [pytest.approx(share)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MORE_EXACT)
def test_gradients_of_more_kinds_of_models_are_those_of_whole_rows(model_type, more_of_two):
    _, errors = more_of_two[model_type]
    assert all(error < 1e-12 for process in errors for error in process), errors


@pytest.mark.slow
def test_short_convolutions_are_refused_by_name(more_of_two):
    for message in more_of_two["lfm2"][1]:
        assert_matches("must be 1 for Lfm2ForCausalLM, got 2: .*Lfm2ShortConv.* mix tokens outside", message)


@pytest.mark.slow
def test_samples_and_a_moving_reference_are_those_of_one_process(more_of_two, tmp_path):
    one, (_, of_both) = sample(tmp_path, size=1), more_of_two["samples"]
    assert len(one["samples"]) > 0
    with works("SP", "num_eval_samples", "sync_ref_model", processes=2, steps=3):
        for found in of_both:
            assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
            assert found["samples"] == one["samples"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SP", "FSDP2 x SP"])
def test_a_resumed_run_ends_in_the_same_weights(kind, more_of_two):
    with works(kind, "resuming", processes=2, steps=4):
        for weights, again in more_of_two[kind][1]:  # the same computation, so the same bits
            assert weights == again


@pytest.mark.slow
def test_four_processes_repeat_keys_and_keep_a_quarter(of_four):
    assert all(error < 1e-12 for process in of_four["qwen3_moe"][1] for error in process)
    for found in of_four["keeps"][1]:
        assert found["parts"] <= 0.3 * found["whole"]
    keep(SHARES, 4, kept=found["parts"], whole=found["whole"])


@pytest.mark.parametrize("name", ["sequence_parallel_size", "tensor_parallel_size"])
def test_deepspeed_that_accelerates_own_settings_have_chosen_is_refused(name, tmp_path, monkeypatch):
    """`deepspeed` of the config is None then."""
    create = Trainer.create_accelerator_and_postprocess

    def create_with_deepspeed(self):
        create(self)
        self.is_deepspeed_enabled = True
        setattr(self.args, name, 2)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_with_deepspeed)
    with pytest.raises(ValueError, match=f"{name} must be 1 with DeepSpeed, got 2: this is untested"):
        tiny_trainer(tmp_path)
