"""The README's Python runs as it stands, with a tiny model in place of the one that would be downloaded."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from tiny import make_byte_tokenizer, make_llama, make_rows

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def model_dir(tmp_path):
    make_llama(vocab_size=260).save_pretrained(tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(8)))
    return tmp_path / "model"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_python_blocks_run(block, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 5
    exec(block.replace("Qwen/Qwen2.5-0.5B-Instruct", str(model_dir)), {})


def test_the_train_command_runs(model_dir, tmp_path, monkeypatch):
    from fastdpo.cli.main import main

    monkeypatch.chdir(tmp_path)
    block = next(block for block in COMMANDS if "fastdpo train" in block)
    command = block.replace("\\\n", " ").replace("Qwen/Qwen2.5-0.5B-Instruct", str(model_dir)).split()
    assert command[0] == "fastdpo"
    assert main([*command[1:], "--use_cpu", "true"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def options_of(command):
    from fastdpo.cli.main import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--([a-z_0-9]+)", output.getvalue()))


def test_every_path_and_option_that_the_readme_names_exists():
    from dataclasses import fields

    from fastdpo import DPOConfig
    from fastdpo.cli.arguments import AdapterArguments, RunArguments

    known = {f.name for cls in (DPOConfig, AdapterArguments, RunArguments) for f in fields(cls)} | {"config", "help"}
    known |= options_of("verify") | options_of("plan")
    known |= set(re.findall(r"--([a-z_0-9]+)", (Path(__file__).parents[1] / "benchmarks/gpu_suite.py").read_text()))
    for option in re.findall(r"--([a-z_0-9]+)", README):
        assert option in known, option
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", README, flags=re.MULTILINE)}
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("https://") or (Path(__file__).parents[1] / path).exists(), path
