"""What a run will do is said before it starts, from Python as from the command line."""

import pytest
import torch
from datasets import Dataset
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import logged, make_lora, tiny_trainer

from fastdpo import SFTConfig, SFTTrainer
from fastdpo.training.callbacks.summary import summary_lines

SHOWN = {"disable_tqdm": False, "max_steps": 1}
WHAT = ["model", "train data", "reference", "batches", "attention", "head op", "steps", "peak memory"]


def on_one_line(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_train_says_once_what_it_will_do(tmp_path, capsys):
    run = tiny_trainer(tmp_path, **SHOWN)
    assert capsys.readouterr().out == ""
    run.train()
    out = on_one_line(capsys)
    for fact in (
        "LlamaForCausalLM",
        "kept 16 of 16",
        "frozen: all weights",
        "packed: one row",
        "sdpa",
        "tiled (chosen",
    ):
        assert out.count(fact) == 1, fact
    assert "1 optimizer steps of 4 rows" in out
    run.train()
    assert "LlamaForCausalLM" not in capsys.readouterr().out


def test_a_silent_run_says_nothing(tmp_path, capsys):
    tiny_trainer(tmp_path, max_steps=1, disable_tqdm=True).train()
    assert "LlamaForCausalLM" not in capsys.readouterr().out


def test_summary_is_text_with_a_line_for_every_fact(tmp_path):
    run = tiny_trainer(tmp_path, peft_config=make_lora())
    lines = run.summary().splitlines()
    assert len(lines) == len(summary_lines(run))
    assert [what for what in WHAT if any(line.startswith(f"{what} ") for line in lines)] == WHAT
    assert "adapter: the model without its adapter" in run.summary()


def test_the_first_row_is_shown_as_it_is_read_and_columns_that_are_not(tmp_path, capsys):
    rows = [
        {"instruct": f"[bold]Why?\n{row['prompt']}", "chosen": row["chosen"], "rejected": [row["rejected"], "No."]}
        for row in make_rows(8)
    ]
    rows = [{**row, "id": number, "draft": "a text"} for number, row in enumerate(rows)]
    run = tiny_trainer(tmp_path, train_dataset=rows, columns={"prompt": "instruct", "ignore": ["draft"]}, **SHOWN)
    lines = summary_lines(run)
    assert ("", "columns not read: draft, id") in lines
    start = next(number for number, (what, _) in enumerate(lines) if what == "first row")
    shown = [said for _, said in lines[start : start + 4]]
    assert shown[0] == f"prompt: [bold]Why?\\n{rows[0]['instruct'].partition(chr(10))[2]}"
    assert shown[1:] == [f"best: {rows[0]['chosen']}", f"answer 2: {rows[0]['rejected'][0]}", "answer 3: No."]
    run.print_summary()
    assert "[bold]Why?" in capsys.readouterr().out  # no markup


def test_sft_says_it_too(tmp_path, capsys):
    args = SFTConfig(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", **SHOWN)
    data = {"train_dataset": Dataset.from_list(make_rows(4)), "processing_class": make_tokenizer()}
    run = SFTTrainer(make_llama(), args, **data)
    run.train()
    assert "kept 4 of 4 examples" in on_one_line(capsys)
    assert "reference" not in run.summary()


def test_it_changes_nothing_about_the_run(tmp_path):
    """The estimate of memory runs a step on shapes: order, weights and dropout stay as they were."""
    said, silent = (tiny_trainer(tmp_path, disable_tqdm=flag, max_steps=3) for flag in (False, True))
    torch.manual_seed(5)
    said.train()
    torch.manual_seed(5)
    silent.train()
    assert logged(said) == logged(silent)
    state = torch.get_rng_state()
    said.summary()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trainer_that_only_evaluates_has_a_summary_too(tmp_path):
    run = tiny_trainer(tmp_path, train_dataset=None, eval_dataset=make_rows(4))
    assert "eval data" in run.summary()
    with pytest.raises(ValueError, match="requires a train_dataset"):
        tiny_trainer(tmp_path, train_dataset=None, eval_dataset=make_rows(4), disable_tqdm=False).train()


def test_the_time_that_preparing_the_model_took_is_no_metric(tmp_path):
    run = tiny_trainer(tmp_path, eval_dataset=make_rows(4))
    metrics = {**run.evaluate(), **run.predict(make_rows(4)).metrics}
    assert {"eval_loss", "test_loss"} <= metrics.keys()
    entries = [metrics, *run.state.log_history]
    assert not [key for entry in entries for key in entry if key.endswith("model_preparation_time")]
