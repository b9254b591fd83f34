"""The settings of recipes/sizes: each file is read by `fastdpo train`, and trains a small model on rows of its form."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import make_byte_tokenizer, make_llama

from fastdpo.cli.main import main

FOLDER = Path(__file__).parents[2] / "recipes" / "sizes"
FILES = sorted(FOLDER.glob("*.yaml"))
SAID = {"chosen": "It is 4.", "rejected": "It is 5, I think."}


def _hh(number):
    return {side: f"\n\nHuman: {number}+2?\n\nAssistant: {text}" for side, text in SAID.items()}


def _tldr(number):
    post = {"post": f"I add {number}.", "title": "2+2", "subreddit": "tifu"}
    return {"info": post, "summaries": [{"text": text} for text in SAID.values()], "choice": 0}


def _orca(number):
    return {"system": "Be brief.", "question": f"{number}+2?", **SAID}


def _ultrafeedback(number):
    prompt = f"{number}+2?"
    turns = {
        side: [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        for side, text in SAID.items()
    }
    return {"prompt": prompt, **turns, "messages": turns["chosen"], "score_chosen": 9.0, "score_rejected": 3.0}


def _messages(number):
    answers = {side: [{"role": "assistant", "content": f"<think>Add.</think>{text}"}] for side, text in SAID.items()}
    return {"prompt": [{"role": "user", "content": f"{number}+2?"}], **answers}


def _tools(number):
    schema = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    return {**_messages(number), "tools": [{"type": "function", "function": schema}]}


ROWS = {
    "hh_0.5b_24gb": _hh,
    "orca_8b_qlora_24gb": _orca,
    "reasoning_8b_8x80gb": _messages,
    "tldr_0.5b_24gb": _tldr,
    "tools_8b_qlora_24gb": _tools,
    "ultrafeedback_8b_full_80gb": _ultrafeedback,
}


def test_every_file_has_a_row_in_the_page_and_rows_here():
    page = (FOLDER / "README.md").read_text()
    assert [path.stem for path in FILES] == sorted(ROWS)
    for path in FILES:
        assert f"[{path.name}]({path.name})" in page


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_model_of_a_file_has_the_size_and_training_of_its_name(path):
    settings = yaml.safe_load(path.read_text())
    assert ("0.5B" if "0.5b" in path.stem else "8B") in settings["model"]
    assert bool(settings.get("load_in_4bit")) == bool(settings.get("use_peft")) == ("qlora" in path.stem)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_trains_a_small_model_on_rows_of_its_form(path, tmp_path):
    if "4bit" in path.read_text() or "8bit" in path.read_text():
        pytest.importorskip("bitsandbytes")
    tokenizer = make_byte_tokenizer()
    make_llama(len(tokenizer), max_position_embeddings=512, hidden_size=64).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("train", "eval"):
        rows = [ROWS[path.stem](number) for number in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    replaced = {  # the machine's and the files' settings; all others are the file's
        "model": tmp_path / "model",
        "dataset": tmp_path / "train.jsonl",
        "eval_dataset": tmp_path / "eval.jsonl",
        "output_dir": tmp_path / "out",
        "ref_cache_dir": tmp_path / "cache",
        "max_length": 256,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_tokens_per_microbatch": 2048,
        "logging_steps": 1,
        "use_cpu": "true",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    settings = yaml.safe_load(path.read_text())
    for name in ("dataset_split", "eval_split", "dataset_config", "eval_fraction"):
        settings.pop(name, None)  # of the Hub's data set
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    words = [word for name, value in replaced.items() for word in (f"--{name}", str(value))]
    assert main(["train", "--config", str(config), *words]) == 0
    state = next((tmp_path / "out").glob("checkpoint-*/trainer_state.json"))
    losses = [line["loss"] for line in json.loads(state.read_text())["log_history"] if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=0.02)
    assert len(losses) == 2
