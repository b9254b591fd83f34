"""The README, the pages of docs/ and the text of notebooks: their Python runs as it stands, with a tiny model in place
of the one that would be downloaded, and the options, files and headings that they name exist.
"""

import contextlib
import io
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from peers import peer
from releases import SINCE_5_23
from tiny import make_byte_tokenizer, make_llama, make_rows
from torch.distributed.run import get_args_parser as torchruns_parser

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
for path in sorted(ROOT.glob("notebooks/*.ipynb")):
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    PAGES[str(path.relative_to(ROOT))] = "\n\n".join(texts)
# those pages' Python is run by test_migrating.py and test_feature_docs.py, on data and trainers that it expects
ELSEWHERE = ("docs/migrating.md", "docs/around_the_loss.md")
BLOCKS = {
    f"{page}-{i}": block
    for page, text in PAGES.items()
    if page not in ELSEWHERE
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
}


@pytest.fixture
def model_dir(tmp_path):
    make_llama(vocab_size=260).save_pretrained(tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(8)))
    return tmp_path / "model"


@pytest.mark.parametrize("name", BLOCKS)
def test_python_blocks_run(name, model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[name].replace("Qwen/Qwen2.5-0.5B-Instruct", str(model_dir)), {})


def test_the_pages_whose_python_runs_here_have_some():
    pages = {"README.md", "docs/data_checks.md", "docs/head_op.md", "docs/index.md", "docs/ranking.md"}
    pages |= {"docs/resuming.md", "docs/rewards.md"}
    assert {name.rpartition("-")[0] for name in BLOCKS} == pages
    assert len(BLOCKS) == 12


def commands_of(page):
    """The `fastdpo` commands of a page, each a list of words."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[page], flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].split() for line in lines if line.startswith("fastdpo ")]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/references.md"])
def test_the_train_command_runs(page, model_dir, tmp_path, monkeypatch):
    from fastdpo.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    commands = [command for command in commands_of(page) if command[1] in ("train", "precompute")]
    assert commands[-1][1] == "train"
    for command in commands:
        words = [word.replace("Qwen/Qwen2.5-0.5B-Instruct", str(model_dir)) for word in command[1:]]
        assert main([*words, "--use_cpu", "true"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def options_of(*command):
    from fastdpo.cli.main import main

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return set(re.findall(r"--([a-z_0-9]+)", output.getvalue()))


@pytest.fixture(scope="module")
def known_options():
    from fastdpo import DPOConfig
    from fastdpo.cli.arguments import AdapterArguments, RunArguments
    from fastdpo.cli.main import COMMANDS

    known = {f.name for cls in (DPOConfig, AdapterArguments, RunArguments) for f in fields(cls)} | {"config", "help"}
    known |= {"no_x", "x"}.union(*(options_of(command) for command in COMMANDS))
    known |= options_of("data", "inspect") | options_of("data", "clean") | options_of("data", "convert")
    known |= SINCE_5_23 | set(re.findall(r"--([a-z_]+)", torchruns_parser().format_help()))
    for script in ("benchmarks/gpu_suite", "benchmarks/gpu_page", "benchmarks/bench_training_step", "tests/portable"):
        known |= set(re.findall(r"--([a-z_0-9]+)", (ROOT / f"{script}.py").read_text()))
    known |= {"no-deps"}  # of pip
    return known | set(re.findall(r'"--([a-z-]+)"', (ROOT / "kernels/fused/tuning.py").read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_a_page_names_exists(page, known_options):
    assert set(re.findall(r"--([a-z][a-z_0-9-]*)", PAGES[page])) <= known_options


def anchors(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        if target.startswith("../../actions/"):  # of the repository on GitHub
            workflow = target.removeprefix("../../actions/workflows/").removesuffix("/badge.svg")
            assert (ROOT / ".github" / "workflows" / workflow).exists(), target
        elif not target.startswith("https://"):
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


def test_the_readme_is_the_way_to_every_page():
    for page in PAGES:
        assert page == "README.md" or f"({page}" in PAGES["README.md"], page


def test_the_page_on_data_names_every_format_of_rows():
    from fastdpo.data.forms.formats import FORMATS, SFT_FORMS

    first_cells = re.findall(r"^\| (`.+?) \|", PAGES["docs/data.md"], flags=re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(first_cells))) - {"dataset_format"}
    assert named == {row_format.name for row_format in (*FORMATS, *SFT_FORMS)}


def test_the_page_on_settings_names_all_that_trl_and_transformers_lack_and_nothing_else():
    from transformers import TrainingArguments

    from fastdpo import DPOConfig

    first_cells = re.findall(r"^\| (`.+?) \|", PAGES["docs/settings.md"], flags=re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(first_cells)))
    known = {f.name for f in fields(DPOConfig)}
    assert named - {"DPOConfig"} <= known
    theirs = {f.name for cls in (peer("trl").DPOConfig, TrainingArguments) for f in fields(cls)}
    assert known - theirs <= named
