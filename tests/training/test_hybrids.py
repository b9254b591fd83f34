"""Models that mix tokens outside attention, and others that are not built like Llama, through the trainer: packed and
shared, with everything that changes how a step is done, they take the steps of padded rows.
"""

import contextlib
import functools
import math

import pytest
import tiny_runs
import torch
from covering import every_pair
from hybrids import HYBRIDS, WholeDoubles, build_any, build_hybrid
from tiny import make_tokenizer
from tiny_runs import SILENT

from fastdpo import DPOConfig, DPOTrainer, TokenizedGroup, pack_pairs, packed_logps, prepare_model
from fastdpo.evidence.memory import peak_live_bytes
from fastdpo.modeling import packed_loss
from fastdpo.modeling.mixers import mixers_of
from fastdpo.training.callbacks.summary import summary_lines
from fastdpo.training.memory import dry_run
from fastdpo.training.memory.dry_run import RowShape, dry_step, fake_mode, shape_only

ROWS = [  # one prompt twice, responses of one token, responses that share a start, and more than a chunk of 64 tokens
    {"prompt_ids": [1, 5, 6], "chosen_ids": [7], "rejected_ids": [8]},
    {"prompt_ids": [1, 9, 9, 9], "chosen_ids": [5, 6, 7, 8, 9], "rejected_ids": [12, 13, 14]},
    {"prompt_ids": [1, 5, 6], "chosen_ids": [7], "rejected_ids": [9, 10]},
    {"prompt_ids": [1, 8], "chosen_ids": [9, 10, 11, 12], "rejected_ids": [9, 10, 11, 13, 14]},
    {"prompt_ids": [1, *range(3, 40)], "chosen_ids": list(range(20, 60)), "rejected_ids": [3, 4]},
    {"prompt_ids": [1, 20], "chosen_ids": [21, 22], "rejected_ids": [23]},
]
# what mixes tokens outside attention, and what else transformers builds a decoder of: experts, latent attention, layers
# that use the keys of others, sinks, windows, chunks, attention that runs by sequence, linear biases
NAMED = [
    *("qwen3_5_text", "qwen3_next", "granitemoehybrid", "nemotron_h", "lfm2", "kimi_linear", "falcon_h1", "mamba2"),
    *("rwkv", "minimax", "mamba", "deepseek_v3", "llama4_text", "gemma3n_text", "gemma4_text", "gpt_oss", "glm4_moe"),
    *("deepseek_v4", "bloom"),
]
FAST = ("lfm2", "deepseek_v3", "glm4_moe", "gpt_oss")  # tried where slow tests are left out
# where PEFT refuses out_proj, which is among all-linear's
TARGETS = {name: ["in_proj", "q_proj", "v_proj", "up_proj"] for name in ("falcon_h1", "nemotron_h")}
TARGETS |= {name: ["in_proj"] for name in ("mamba", "mamba2")}
WAYS = {"checkpointing": (False, True), "max_tokens": (None, 24), "reference": ("auto", "cached")}


def losses(folder, model_type, has_adapter, dtype=torch.float32, **settings):
    """Of two steps."""
    peft_config = None
    if has_adapter:
        import peft

        target = TARGETS.get(model_type, "all-linear")
        peft_config = peft.LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM")
    args = DPOConfig(
        str(folder),
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_steps=2,
        per_device_train_batch_size=len(ROWS),
        beta=0.5,
        train_sampling_strategy="sequential",
        router_aux_loss_coef=0.0,
        ref_cache_dir=str(folder / "cache"),
        **{**SILENT, **settings},
    )
    model = build_any(model_type).to(dtype)
    trainer = DPOTrainer(
        model, args=args, train_dataset=ROWS, processing_class=make_tokenizer(), peft_config=peft_config
    )
    # layers that compute in fp32 whatever their weights are would round, and softmax there makes nan of fp64's masks
    with WholeDoubles() if dtype == torch.float64 else contextlib.nullcontext():
        return tiny_runs.losses(trainer)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """By type and adapter: losses of padded rows in the stock model, in fp64, and how far they are off in fp32."""

    @functools.cache
    def run(model_type, has_adapter):
        exact, whole, split = (
            torch.tensor(losses(tmp_path_factory.mktemp("run"), model_type, has_adapter, packing="padded", **settings))
            for settings in ({"dtype": torch.float64}, {}, {"max_tokens_per_microbatch": 24})
        )
        return exact, max((single - exact).abs().max().item() for single in (whole, split))

    return run


def assert_steps_of_padded_rows(padded, folder, model_type, has_adapter, checkpointing, max_tokens, reference):
    expected, rounding = padded(model_type, has_adapter)
    assert expected[0].item() == pytest.approx(math.log(2), abs=1e-5)
    settings = {"gradient_checkpointing": checkpointing, "max_tokens_per_microbatch": max_tokens}
    found = losses(folder, model_type, has_adapter, packing="packed", reference=reference, **settings)
    tolerance = 2 * rounding + 1e-6
    assert (torch.tensor(found) - expected).abs().max() <= tolerance
    assert tolerance < 0.01 * (expected[0] - expected[1])  # what a step that is not that one could be off by


@pytest.mark.slow
@pytest.mark.parametrize(*every_pair(model_type=NAMED, has_adapter=(False, True), **WAYS))
def test_every_way_to_do_a_step_takes_the_steps_of_padded_rows(
    model_type, has_adapter, checkpointing, max_tokens, reference, padded, tmp_path
):
    way = (checkpointing, max_tokens, reference)
    assert_steps_of_padded_rows(padded, tmp_path, model_type, has_adapter, *way)


@pytest.mark.parametrize(*every_pair(model_type=FAST, has_adapter=(False, True), **WAYS))
def test_every_way_to_do_a_step_takes_the_steps_of_padded_rows_in_a_few_types(
    model_type, has_adapter, checkpointing, max_tokens, reference, padded, tmp_path
):
    """The same for those who leave slow tests out."""
    way = (checkpointing, max_tokens, reference)
    assert_steps_of_padded_rows(padded, tmp_path, model_type, has_adapter, *way)


def test_packing_that_was_asked_for_is_refused_by_the_name_of_what_leaks(tmp_path, monkeypatch):
    from fastdpo.modeling.mixers import adapter

    monkeypatch.setattr(adapter, "run_sequences", lambda forward, rows, args, kwargs: forward(*args, **kwargs))
    with pytest.raises(
        ValueError, match=r"packing must be 'auto' or 'padded' for this model, got 'packed': packed log-"
    ):
        losses(tmp_path, "lfm2", False, packing="packed")


@pytest.mark.slow
def test_the_summary_of_a_hybrid_says_that_it_is_packed_and_estimates_its_memory(tmp_path):
    args = DPOConfig(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to="none")
    trainer = DPOTrainer(build_hybrid("qwen3_5_text"), args=args, train_dataset=ROWS, processing_class=make_tokenizer())
    said = dict(summary_lines(trainer))
    assert said["batches"] == "packed: one row without padding, shared tokens computed once"
    assert said["peak memory"].startswith("about ")


# Memory


def long_batch(num_pairs):
    draw = torch.Generator().manual_seed(0)

    def ids(length):
        return torch.randint(67, (length,), generator=draw).tolist()

    return pack_pairs([TokenizedGroup(ids(40), [ids(30), ids(20)]) for _ in range(num_pairs)])


def estimated(model, batch, **settings):
    row = RowShape(batch.segments, len(batch.labels))
    mode = fake_mode()
    return dry_step(shape_only(model, mode), row, mode, impl="tiled", varlen=False, **settings)


@pytest.mark.parametrize("model_type", [pytest.param("qwen3_5_text", marks=pytest.mark.slow), "lfm2", "mamba2"])
def test_the_estimate_counts_prefixes_that_mixers_run_again(model_type):
    model, batch = prepare_model(build_hybrid(model_type)), long_batch(4)
    packed_logps(model, batch)
    assert list(mixers_of(model).names) == HYBRIDS[model_type][1]

    def step():
        model.zero_grad()
        loss, _ = packed_loss(model, batch, lambda sums, *_: sums.sum())
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    assert estimated(model, batch).total == pytest.approx(peak_live_bytes(step), rel=0.15)


@pytest.mark.parametrize("model_type", ["mamba", pytest.param("rwkv", marks=pytest.mark.slow)])
def test_rows_of_models_that_take_token_by_token_are_estimated_on_a_line(model_type, monkeypatch):
    model, batch = prepare_model(build_hybrid(model_type)), long_batch(2)
    packed_logps(model, batch)
    on_a_line = estimated(model, batch)
    monkeypatch.setattr(dry_run, "MOST_OPS", 10**9)
    monkeypatch.setattr(dry_run, "TRIED_TOKENS", ((16, 32),))
    whole = estimated(model, batch)
    assert on_a_line.total == pytest.approx(whole.total, rel=0.03)


def test_a_shortened_row_has_the_branches_of_the_whole_one():
    row = RowShape(((0, 60, 0, 0), (60, 80, 0, 40), (80, 100, 0, 1), (100, 101, 0, 0), (101, 141, 100, 101)), 50)
    short = row.shortened(0.1)
    assert short.segments == ((0, 6, 0, 0), (6, 8, 0, 4), (8, 10, 0, 1), (10, 11, 0, 0), (11, 15, 10, 11))
    assert short.num_rows == 5
    assert RowShape((), 50, (4, 90)).shortened(0.1) == RowShape((), 5, (4, 9))
