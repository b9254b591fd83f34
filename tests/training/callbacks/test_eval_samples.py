"""Samples of policy and reference at evaluation: what they are, where they go, and that they change nothing else."""

import json
import sys
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import logged, make_lora, tiny_trainer

from fastdpo.modeling.generation import DoesNotFit
from fastdpo.training.callbacks.samples import SAMPLES_FILE, Response

ROWS = make_rows(6, seed=1)
EVERY_2 = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "learning_rate": 3e-2}
SAMPLING = {"num_eval_samples": 3, "eval_sample_tokens": 6}


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def greedy(model, prompts):
    """What transformers' own generate answers to each prompt alone."""
    tokenizer, answers = make_tokenizer(), []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        output = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("mode", ["frozen", "adapter", "cached"])
def test_policy_and_reference_answer_the_first_prompts(tmp_path, mode):
    """In cached mode there is no reference to ask any more: the policy before training answers for it."""
    settings = {"peft_config": make_lora()} if mode == "adapter" else {}
    fast = tiny_trainer(tmp_path, eval_dataset=ROWS, reference=mode, **SAMPLING, **EVERY_2, **settings)
    prompts = [row["prompt"] for row in ROWS[:3]]
    start = greedy(make_llama(), prompts)
    fast.train()
    answered = fast.eval_samples.answered
    assert [entry.step for entry in answered] == [2, 2, 2, 4, 4, 4]
    assert [entry.prompt.split() for entry in answered[:3]] == [prompt.split() for prompt in prompts]
    assert [entry.reference for entry in answered] == [*start, *start]
    assert answered[0].reference_name == ("before training" if mode == "cached" else "reference")
    assert [entry.policy for entry in answered[3:]] == greedy(fast.model, prompts)
    if mode != "adapter":  # whose few weights move too little here to change a greedy answer
        assert [entry.policy for entry in answered[3:]] != start
    lines = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert [line["policy"] for line in lines] == [entry.policy for entry in answered]
    assert all(0 < entry.policy_tokens <= 6 and 0 < entry.reference_tokens <= 6 for entry in answered)


@pytest.mark.parametrize("mode", ["frozen", "cached"])
def test_an_evaluation_before_training_is_kept_and_another_runs_are_not(tmp_path, mode):
    tmp_path.joinpath(SAMPLES_FILE).write_text('{"of": "another run"}\n')
    fast = tiny_trainer(tmp_path, eval_dataset=ROWS, reference=mode, **SAMPLING, **EVERY_2)
    fast.evaluate()
    fast.train()
    lines = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    assert [line["policy"] for line in lines[:3]] == [line["reference"] for line in lines[:3]]
    assert [entry.step for entry in fast.eval_samples.answered] == [line["step"] for line in lines]


@pytest.mark.parametrize("mode", ["frozen", "cached"])
def test_samples_that_do_not_fit_into_memory_are_left_out_and_the_run_goes_on(tmp_path, monkeypatch, mode, caplog):
    """They do not fit before training and at step 2, and do at step 4."""
    fast = tiny_trainer(tmp_path, eval_dataset=ROWS, reference=mode, **SAMPLING, **EVERY_2)
    generate = fast.eval_samples._generate

    def failing(model):
        if fast.state.global_step < 4:
            raise DoesNotFit("max_new_tokens must be smaller, got 6")
        return generate(model)

    monkeypatch.setattr(fast.eval_samples, "_generate", failing)
    fast.train()
    assert fast.state.global_step == 4
    assert [entry.step for entry in fast.eval_samples.answered] == [4, 4, 4]
    assert all((entry.reference is None) == (mode == "cached") for entry in fast.eval_samples.answered)
    assert "No samples at step 2: eval_sample_tokens must be smaller, got 6" in caplog.text


def test_a_reference_that_moves_is_asked_again(tmp_path):
    fast = tiny_trainer(
        tmp_path,
        eval_dataset=ROWS,
        sync_ref_model=True,
        ref_model_sync_steps=4,
        ref_model_mixup_alpha=1.0,
        **SAMPLING,
        **EVERY_2,
    )
    fast.train()
    first, last = fast.eval_samples.answered[:3], fast.eval_samples.answered[3:]
    assert [entry.reference for entry in last] == [entry.policy for entry in last]
    assert [entry.reference for entry in last] != [entry.reference for entry in first]


def test_samples_that_grow_are_warned_of(tmp_path):
    fast = tiny_trainer(tmp_path, num_rows=16, eval_dataset=make_rows(12, seed=1), num_eval_samples=8)
    for num_tokens, is_warned in ((30, False), (31, True)):
        fast.eval_samples._generate = lambda model, n=num_tokens: [
            Response("words", n if model is fast.model else 20) for _ in range(8)
        ]
        fast.eval_samples.take(1)
        assert ("samples_grow" in fast.watch.given) == is_warned
    assert "31 tokens on average, the reference's 20 (8 prompts)" in fast.watch.given["samples_grow"]


def test_they_change_neither_losses_nor_order(tmp_path):
    settings = {"eval_dataset": ROWS, **EVERY_2}
    plain = tiny_trainer(tmp_path / "plain", **settings)
    sampling = tiny_trainer(tmp_path / "sampling", eval_sample_temperature=1.0, **SAMPLING, **settings)
    plain.train()
    sampling.train()
    assert logged(sampling) == logged(plain)
    assert logged(sampling, "eval_loss") == logged(plain, "eval_loss")
    assert len({entry.policy for entry in sampling.eval_samples.answered}) > 3


def test_a_table_goes_to_the_console_and_brackets_are_no_markup(tmp_path, capsys):
    fast = tiny_trainer(tmp_path, eval_dataset=ROWS, **SAMPLING)
    fast.eval_samples._decoded = lambda rows: ["[red]not markup[/red] | a"] * len(rows)
    fast.evaluate()
    shown = capsys.readouterr().out
    assert "samples at step 0" in shown
    assert "[red]not" in shown
    assert "reference" in shown


def test_tensorboard_and_wandb_get_tables(tmp_path, monkeypatch):
    from transformers.integrations import TensorBoardCallback, WandbCallback

    fast = tiny_trainer(tmp_path, eval_dataset=ROWS, **SAMPLING)
    texts, tables = [], []
    fake = ModuleType("wandb")
    fake.Table = lambda columns, data: (columns, data)
    fake.run = object()
    fake.log = lambda values: tables.append(values)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    board = TensorBoardCallback(tb_writer=SimpleNamespace(add_text=lambda *a: texts.append(a)))
    monkeypatch.setattr(board, "on_log", lambda *a, **k: None)
    bias = WandbCallback.__new__(WandbCallback)
    monkeypatch.setattr(WandbCallback, "on_log", lambda *a, **k: None)
    fast.callback_handler.callbacks += [board, bias]
    fast.evaluate()
    [(tag, text, step)] = texts
    assert (tag, step) == ("eval/samples", 0)
    assert text.startswith("| prompt | policy | reference |\n| --- | --- | --- |\n")
    assert text.count("\n") == 4
    [table] = tables
    columns, rows = table["eval/samples"]
    assert columns == ["prompt", "policy", "reference"]
    assert len(rows) == 3
    assert table["train/global_step"] == 0


@pytest.mark.parametrize("is_on", [True, False], ids=["started", "not started"])
def test_trackio_gets_tables_once_it_has_started(tmp_path, monkeypatch, is_on):
    from transformers.integrations import TrackioCallback

    logs = []
    fake = ModuleType("trackio")
    fake.Table = lambda columns, data: (columns, data)
    fake.log = logs.append
    fake.context_vars = SimpleNamespace(current_run=ContextVar("run", default=object() if is_on else None))
    monkeypatch.setitem(sys.modules, "trackio", fake)
    callback = TrackioCallback.__new__(TrackioCallback)
    monkeypatch.setattr(TrackioCallback, "on_log", lambda *a, **k: None)
    fast = tiny_trainer(tmp_path, eval_dataset=ROWS, **SAMPLING)
    fast.callback_handler.callbacks.append(callback)
    fast.evaluate()
    if not is_on:
        assert logs == []
        return
    [entry] = logs
    columns, rows = entry["eval/samples"]
    assert columns == ["prompt", "policy", "reference"]
    assert [row[0].split() for row in rows] == [row["prompt"].split() for row in ROWS[:3]]
    assert entry["train/global_step"] == 0


def test_trackio_stores_the_samples_of_every_evaluation(tmp_path, monkeypatch):
    """With the package itself, where it is installed."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    settings = {"report_to": "trackio", "project": "samples", "run_name": "run", "trackio_static_space_id": False}
    fast = tiny_trainer(tmp_path / "out", eval_dataset=ROWS, **SAMPLING, **EVERY_2, **settings)
    fast.train()
    from trackio.sqlite_storage import SQLiteStorage

    tables = [entry["eval/samples"] for entry in SQLiteStorage.get_logs("samples", "run") if "eval/samples" in entry]
    assert [table["_type"] for table in tables] == ["trackio.table"] * 2
    stored = [row["policy"] for table in tables for row in table["_value"]]
    assert stored == [entry.policy for entry in fast.eval_samples.answered]


@pytest.mark.parametrize("is_evaluated", [False, True], ids=["at once", "after an evaluation"])
def test_a_resumed_run_goes_on_with_its_samples(tmp_path, is_evaluated):
    settings = {"eval_dataset": ROWS, "reference": "cached", **SAMPLING, **EVERY_2}
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, **settings).train()
    written = tmp_path / SAMPLES_FILE
    written.write_bytes(written.read_bytes()[:-20])  # where a kill cut it off
    again = tiny_trainer(tmp_path, **settings)
    if is_evaluated:  # as `fastdpo train` does, with the weights of the start
        again.evaluate()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    answered = again.eval_samples.answered
    assert [entry.step for entry in answered] == [2, 2, 2, 4, 4, 4]
    assert [entry.reference for entry in answered[3:]] == [entry.reference for entry in answered[:3]]
    lines = [json.loads(line) for line in (tmp_path / SAMPLES_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 2, 4, 4, 4]  # those of step 4 as they came again


def test_prompts_leave_room_for_answers_where_positions_are_learned(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_positions=24, n_embd=16, n_layer=1, n_head=2)
    lengths = [len(make_tokenizer()(row["prompt"])["input_ids"]) for row in ROWS]
    assert min(lengths) <= 6 < max(lengths)
    settings = {"eval_dataset": ROWS, "num_eval_samples": 6, "reference": "none"}
    fast = tiny_trainer(tmp_path, GPT2LMHeadModel(config), eval_sample_tokens=18, **settings)
    assert [len(ids) for ids in fast.eval_samples.prompt_ids] == [n for n in lengths if n <= 6]
    fast.evaluate()
    with pytest.raises(ValueError, match="no row of eval_dataset has a separate prompt of at most 1 tokens"):
        tiny_trainer(tmp_path, GPT2LMHeadModel(config), eval_sample_tokens=23, **settings)


def test_another_model_of_the_trainer_is_the_one_that_answers(tmp_path):
    fast = tiny_trainer(tmp_path, eval_dataset=ROWS, **SAMPLING)
    other = make_llama(seed=5)
    fast.model = other
    prompts = [row["prompt"] for row in ROWS[:3]]
    taken = fast.eval_samples.take(0)
    assert [entry.policy for entry in taken] == greedy(other, prompts)
    assert [entry.reference for entry in taken] == greedy(make_llama(), prompts)


def test_samples_without_evaluation_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_eval_samples must be 0 without eval_dataset, got 3"):
        tiny_trainer(tmp_path, num_eval_samples=3)
    with pytest.raises(ValueError, match="num_eval_samples must be an integer >= 0, got -1"):
        tiny_trainer(tmp_path, num_eval_samples=-1)
