"""Models that mix tokens outside attention through the trainer: packed and shared, with everything that changes how a
step is done, they take the steps of padded rows.
"""

import pytest
import torch
from hybrids import HYBRIDS, build_hybrid
from tiny import make_tokenizer

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
NAMED = [
    *("qwen3_5_text", "qwen3_next", "granitemoehybrid", "nemotron_h", "lfm2", "kimi_linear", "falcon_h1", "mamba2"),
    *("rwkv", "minimax", "mamba"),
]


def losses(tmp_path, model_type, has_adapter, **settings):
    model = build_hybrid(model_type)
    peft_config = None
    if has_adapter:
        import peft

        refused = model_type in ("mamba", "mamba2", "falcon_h1", "nemotron_h")  # PEFT: out_proj, which is all-linear's
        target = ["in_proj"] if refused else "all-linear"
        peft_config = peft.LoraConfig(r=4, target_modules=target, task_type="CAUSAL_LM")
    args = DPOConfig(
        str(tmp_path),
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=6,
        beta=0.5,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        router_aux_loss_coef=0.0,
        **settings,
    )
    trainer = DPOTrainer(
        model, args=args, train_dataset=ROWS, processing_class=make_tokenizer(), peft_config=peft_config
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("model_type", NAMED)
def test_every_way_to_do_a_step_takes_the_steps_of_padded_rows(model_type, has_adapter, tmp_path):
    expected = losses(tmp_path / "padded", model_type, has_adapter, packing="padded", gradient_checkpointing=False)
    assert expected[0] == pytest.approx(0.693147, abs=1e-5)
    assert expected[2] < expected[1] < expected[0]
    for settings in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "max_tokens_per_microbatch": 24},
        {"gradient_checkpointing": False, "reference": "cached", "ref_cache_dir": str(tmp_path / "cache")},
    ):
        found = losses(tmp_path / "packed", model_type, has_adapter, packing="packed", **settings)
        assert found == pytest.approx(expected, rel=1e-4), settings


def test_a_step_of_everything_at_once(tmp_path):
    """The same for one model, for those who leave slow tests out."""
    expected = losses(tmp_path / "padded", "lfm2", False, packing="padded")
    settings = {"gradient_checkpointing": True, "max_tokens_per_microbatch": 24, "reference": "cached"}
    found = losses(tmp_path / "packed", "lfm2", False, packing="packed", ref_cache_dir=str(tmp_path), **settings)
    assert found == pytest.approx(expected, rel=1e-4)


def test_packing_that_was_asked_for_is_refused_by_the_name_of_what_leaks(tmp_path, monkeypatch):
    from fastdpo.modeling.mixers import adapter

    monkeypatch.setattr(adapter, "run_sequences", lambda forward, rows, args, kwargs: forward(*args, **kwargs))
    with pytest.raises(
        ValueError, match=r"packing must be 'auto' or 'padded' for this model, got 'packed': packed log-"
    ):
        losses(tmp_path, "lfm2", False, packing="packed")


def test_the_summary_of_a_hybrid_says_that_it_is_packed_and_estimates_its_memory(tmp_path):
    args = DPOConfig(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to="none")
    trainer = DPOTrainer(build_hybrid("qwen3_5_text"), args=args, train_dataset=ROWS, processing_class=make_tokenizer())
    said = dict(summary_lines(trainer))
    assert said["batches"] == "packed: one row without padding, what responses share computed once"
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


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "lfm2", "mamba2"])
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


@pytest.mark.parametrize("model_type", ["mamba", "rwkv"])
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
