"""CONTRIBUTING.md followed literally, in a copy: its loss, form, attention backend and kernel train a step."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
STEP = re.compile(
    r"<!-- (append to|insert into) (\S+?)(?: (before|after): (.+?))? -->\n```(?:python|text)\n(.*?)```", re.DOTALL
)
TRAIN = """
import json, sys
from tiny import make_llama, make_tokenizer
import fastdpo
from fastdpo.losses.table import losses_table

rows = [{"task": "ab", "won": "ba c", "lost": "b"}, {"task": "ba", "won": "ab", "lost": "cc a"}]
options = {"max_steps": 1, "logging_steps": 1, "report_to": "none", "use_cpu": True, "reference": "frozen"}
for settings in json.loads(sys.argv[2]):
    args = fastdpo.DPOConfig(sys.argv[1], disable_tqdm=True, **options, **settings)
    trainer = fastdpo.DPOTrainer(make_llama(), args=args, train_dataset=rows, processing_class=make_tokenizer())
    trainer.train()
    found = {
        "file": fastdpo.__file__,
        "loss": trainer.state.log_history[0]["loss"],
        "attention": str(trainer.packing_check),
        "table": losses_table(),
    }
    print("found:", json.dumps(found))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with every step of the page done."""
    root = tmp_path_factory.mktemp("contributed")
    shutil.copytree(ROOT / "fastdpo", root / "fastdpo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "kernels" / "fused", root / "fastdpo" / "kernels")
    for way, file, side, line, code in STEP.findall(PAGE):
        path = root / file
        text = path.read_text()
        if way == "append to":
            text = f"{text.rstrip()}\n\n\n{code}"
        else:
            assert text.count(f"{line}\n") == 1, f"{file} must have the line once: {line}"
            text = text.replace(f"{line}\n", f"{line}\n{code}" if side == "after" else f"{code}\n\n{line}\n")
        path.write_text(text)
    return root


def trained(copy, tmp_path, *settings):
    """What a run with each of the settings has found, all in one process."""
    path = os.pathsep.join([str(copy), str(ROOT / "tests")])
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "out"), json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=copy)
    assert run.returncode == 0, run.stderr[-2000:]
    words = "found: "
    found = [json.loads(line.removeprefix(words)) for line in run.stdout.splitlines() if line.startswith(words)]
    assert {one["file"] for one in found} == {str(copy / "fastdpo" / "__init__.py")}
    return found


def test_the_page_has_a_loss_a_form_a_backend_and_a_kernel():
    files = {file for _, file, *_ in STEP.findall(PAGE)}
    for part in ("losses/", "data/forms/", "modeling/attention/", "ops/"):
        assert any(part in file for file in files), part
    assert len(re.findall(r"<!-- (?:append|insert)", PAGE)) == len(STEP.findall(PAGE))


def test_what_the_page_adds_trains_a_step(copy, tmp_path):
    """At the first step every margin is 0: the squared hinge is 1, whatever computes it."""
    new = {"loss_type": "squared_hinge", "attention_backend": "written_out", "impl": "small", "beta": 0.1}
    plain, added = trained(copy, tmp_path, {"loss_type": "sigmoid", "dataset_format": "duel"}, new)
    assert plain["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert added["loss"] == pytest.approx(1.0, abs=1e-4)
    assert "written_out" in added["attention"]
    assert "| `squared_hinge` |" in added["table"]
