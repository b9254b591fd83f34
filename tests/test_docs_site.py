"""The site of documentation: each page is in its navigation, and links of the repository become links of the site."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NAVIGATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("docs_site_pages", ROOT / "docs" / "site" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(entry):
    if isinstance(entry, str):
        return {entry}
    return set().union(*(named(inner) for inner in (entry.values() if isinstance(entry, dict) else entry)))


def test_every_page_of_docs_is_in_the_navigation_and_every_entry_is_a_page(pages):
    written = {path.name for path in (ROOT / "docs").glob("*.md")}
    generated = {*pages.elsewhere().values(), *pages.API} - {"index.md"}
    listed = named(NAVIGATION) - {"recipes/"}
    assert written - listed == set()
    assert listed - written - generated == set()


@pytest.mark.parametrize(
    ("page", "written", "shown"),
    [
        ("memory.md", "[a](data.md#columns)", "[a](data.md#columns)"),
        ("memory.md", "[a](../kernels/README.md#forward)", "[a](kernels.md#forward)"),
        ("memory.md", "[a](../recipes/plackett_luce/README.md)", "[a](recipes/plackett_luce.md)"),
        ("memory.md", "[tests](../tests/test_layers.py)", "tests"),
        ("memory.md", "[a](https://arxiv.org/abs/2305.18290)", "[a](https://arxiv.org/abs/2305.18290)"),
        ("memory.md", "[a](nowhere.py)", "[a](nowhere.py)"),
        ("memory.md", "```\n[a](../tests/test_layers.py)\n```", "```\n[a](../tests/test_layers.py)\n```"),
        ("index.md", "[a](../recipes/README.md)", "[a](recipes/index.md)"),
        ("kernels.md", "[a](../docs/memory.md)", "[a](memory.md)"),
        ("contributing.md", "[a](docs/code_tour.md)", "[a](code_tour.md)"),
        ("recipes/index.md", "[a](plackett_luce/README.md)", "[a](plackett_luce.md)"),
        (
            "recipes/label_noise.md",
            "![a](expected/plot_1.svg)",
            "![a](label_noise/expected/plot_1.svg)",
        ),
        ("mathematics.md", "![a](pictures/weight.svg)", "![a](pictures/weight.svg)"),
        ("benchmarks.md", "![a](../docs/pictures/speed.svg)", "![a](pictures/speed.svg)"),
        ("commands/train.md", "[a](../tests/test_layers.py)", "[a](../tests/test_layers.py)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(pages, page, written, shown):
    assert pages.relinked(written, page) == shown


def test_files_that_are_no_page_are_links_where_the_repository_has_an_address(pages):
    shown = pages.relinked("[tests](../tests/test_layers.py)", "memory.md", "https://example.org/fastdpo/")
    assert shown == "[tests](https://example.org/fastdpo/blob/main/tests/test_layers.py)"


def test_every_command_has_a_page_with_its_help(pages):
    from fastdpo.cli.main import COMMANDS

    texts = dict(pages.commands())
    assert list(texts) == list(COMMANDS)
    for name, text in texts.items():
        assert re.match(rf"# fastdpo {name}\n\n[A-Z]", text)
        assert f"usage: fastdpo {name}" in text


def test_the_objects_of_the_api_pages_are_public_and_none_that_users_call_is_missing(pages):
    import fastdpo

    listed = {name.removeprefix("fastdpo.") for _, names in pages.API.values() for name in names}
    assert listed <= set(fastdpo.__all__)
    assert set(fastdpo.__all__) - listed == {"IGNORE_INDEX", "LOSSES", "PairScores", "PreferenceRow", "__version__"}
