"""The migration page's Python runs as it stands, with a tiny model in place of the ones that would be downloaded; its
commands run. Options and links are checked by test_readme.py, figures by test_page_figures.py.
"""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peers import peer
from tiny import make_byte_tokenizer, make_llama, make_rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = "".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)).replace("\\\n", " ").split("\n")
HUB_NAMES = ("Qwen/Qwen2.5-0.5B-Instruct", "EleutherAI/pythia-2.8b")


@pytest.fixture
def model_dir(tmp_path, monkeypatch):
    """A model, and the files that the page reads, in the working folder."""
    make_llama(vocab_size=260).save_pretrained(tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = make_rows(8)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    transcripts = [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}
        for row in rows
    ]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in transcripts))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model"


def with_tiny_model(text, model_dir):
    for name in HUB_NAMES:
        text = text.replace(name, str(model_dir))
    return text


@pytest.mark.parametrize("block", BLOCKS, ids=["trl", "seat", "liger", "liger-kto", "original"])
def test_python_blocks_run(block, model_dir):
    if "from trl" in block:
        peer("trl")
        if not torch.cuda.is_available():  # TRL asks for bf16 on a GPU unless it is told
            block = block.replace("beta=0.1", "beta=0.1, use_cpu=True")
    exec(with_tiny_model(block, model_dir), {})


def test_the_commands_run_one_after_the_other(model_dir):
    from fastdpo.cli.main import main

    commands = [shlex.split(with_tiny_model(line, model_dir)) for line in COMMANDS if line.strip()]
    assert [command[:2] for command in commands] == [["fastdpo", "sft"], ["fastdpo", "train"]]
    for command in commands:
        assert main([*command[1:], "--use_cpu", "true"]) == 0
    assert (model_dir.parent / "dpo" / "model.safetensors").exists()


def test_settings_that_the_page_names_in_its_right_column_exist():
    from fastdpo import DPOConfig
    from fastdpo.losses import LOSSES

    known = {field.name for field in fields(DPOConfig)} | set(LOSSES)
    rows = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| `loss") or "lr`" in line]
    named = re.findall(r"`([a-z_]+)`", " ".join(cells[1] for cells in rows))
    assert len(named) >= 6
    assert set(named) <= known
